"""Command line of the GPU checks: each in a process of its own, one table, one exit status.

bash scripts/check_gpu.sh --out table.md
python -m scripts.checks.gpu --device cpu --tiny     the same code without a GPU's kernels
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from scripts.checks.gpu.registry import CHECKS, Check
from scripts.checks.gpu.report import all_passed, heading, summary, table
from scripts.checks.gpu.result import Row, failed, skipped
from slime.engines.process import PROJECT_ROOT

WHOLE_SECONDS = 470.0
"""All checks together; one that has less than `LEAST_SECONDS` of it left is not started."""
LEAST_SECONDS = 30.0
TAIL_LINES = 40
ENVIRONMENT = {
    "PYTHONPATH": str(PROJECT_ROOT),
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # some libraries round float32 to fewer bits by themselves; here both sides are to compute the same
    "NVIDIA_TF32_OVERRIDE": "0",
}


def run_check(check: Check, options: argparse.Namespace, scratch: Path, seconds: float) -> list[Row]:
    """Run one check in a process of its own, at most `seconds` long; a crash is a row more."""
    rows, log = scratch / f"{check.name}.json", scratch / f"{check.name}.log"
    command = [sys.executable, "-m", "scripts.checks.gpu.worker", check.name]
    command += ["--device", options.device, "--scratch", str(scratch), "--rows", str(rows)]
    command += ["--tiny"] if options.tiny else []
    with log.open("w") as output:
        # a session of its own, so that all that the check started can be ended with it
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=dict(os.environ) | ENVIRONMENT,
            cwd=PROJECT_ROOT,
            start_new_session=True,
        )
        try:
            status = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            end_session(process)
    found = read_rows(rows)
    if status == 0 and found:
        return found
    why = f"ended with status {status}" if status is not None else f"took more than {seconds:.0f} s"
    tail = log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
    say("\n".join([f"--- the end of what {check.name} said", *tail, "---"]))
    last = next((line for line in reversed(tail) if line.strip()), "it said nothing")
    return [*found, failed(check.name, "the rest of the check", f"{why}: {last[:300]}")]


def read_rows(path: Path) -> list[Row]:
    """Return the rows that a check wrote; one that is being written is none yet."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [Row(**json.loads(line)) for line in lines if line.endswith("\n")]


def end_session(process: subprocess.Popen[bytes]) -> None:
    """End a check that still runs, and what is left of its session."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_checks(options: argparse.Namespace, scratch: Path) -> list[Row]:
    """Run the chosen checks one after the other."""
    begin = time.monotonic()
    rows: list[Row] = []
    for name in options.only or CHECKS:
        left = WHOLE_SECONDS - (time.monotonic() - begin)
        if left < LEAST_SECONDS:
            rows.append(skipped(name, "the whole check", f"the {WHOLE_SECONDS:.0f} s were over"))
            continue
        say(f"== {name}")
        start = time.monotonic()
        found = run_check(CHECKS[name], options, scratch, min(left, CHECKS[name].seconds))
        say(f"   {summary(found)} {time.monotonic() - start:.0f} s")
        rows += found
    return rows


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="bash scripts/check_gpu.sh",
        description="What a GPU must agree on with the CPU, and what a training step costs there.",
        allow_abbrev=False,
    )
    made.add_argument("--out", type=Path, metavar="PATH", help="write the table there, too")
    made.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    made.add_argument("--tiny", action="store_true", help="sizes for a CPU; --device cpu needs it")
    made.add_argument("--only", nargs="+", choices=tuple(CHECKS), metavar="CHECK", help=", ".join(CHECKS))
    made.add_argument(
        "--scratch", type=Path, help="where 14 GB of checkpoints may be for a while (default: TMPDIR)"
    )
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the checks; 0 where all passed, 1 where one did not or could not run, 2 for a wrong call."""
    made = parser()
    options = made.parse_args(argv)
    if options.device == "cpu" and not options.tiny:
        made.error("--device cpu is for trying the checks themselves; add --tiny.")
    if options.scratch is not None and not options.scratch.is_dir():
        made.error(f"--scratch {options.scratch} is no folder.")
    if options.out is not None and not options.out.parent.is_dir():
        made.error(f"--out {options.out}: there is no folder {options.out.parent}.")
    scratch = None if options.scratch is None else options.scratch.resolve()
    begin = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # by way of `end_session`
    with tempfile.TemporaryDirectory(prefix="slime-gpu-", dir=scratch, ignore_cleanup_errors=True) as folder:
        rows = run_checks(options, Path(folder))
    text = f"{heading(options.device, time.monotonic() - begin)} {summary(rows)}\n\n{table(rows)}\n"
    say("\n" + text)
    if options.out is not None:
        options.out.write_text(text, encoding="utf-8")
    return 0 if all_passed(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
