# ruff: noqa: T201 (a command line prints)
"""Examine a teacher's server before a run. Exit code 0: healthy, warnings allowed; 1: a fault; 2: bad use."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from slime.engines.doctor.examination import NAMES, examine
from slime.engines.doctor.material import Material
from slime.engines.doctor.outcome import Outcome, exit_code, record
from slime.engines.doctor.state import Options
from slime.engines.errors import without_users
from slime.engines.replicas import Endpoint


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; a mistake in it exits with 2."""
    parser = argparse.ArgumentParser(prog="python -m slime.engines.doctor", description=__doc__)
    parser.add_argument(
        "--teacher-url",
        action="append",
        required=True,
        metavar="URL",
        help="the teacher's server, as http://127.0.0.1:13141/generate; again for every replica",
    )
    parser.add_argument("--student-path", help="the student's checkpoint (--hf-checkpoint of the run)")
    parser.add_argument(
        "--teacher-path", help="the teacher's checkpoint here; default: where the server says that it is"
    )
    parser.add_argument(
        "--max-tokens", type=int, help="tokens of the longest prompt and response together in the run"
    )
    parser.add_argument("--samples", type=int, default=256, help="samples of one rollout, for the estimate")
    parser.add_argument("--text-only", action="store_true", help="no prompt of the run has a picture")
    parser.add_argument("--image-min-pixels", type=int, help="as in the run")
    parser.add_argument("--image-max-pixels", type=int, help="as in the run")
    parser.add_argument("--timeout", type=float, default=30.0, help="seconds that one request may take")
    parser.add_argument(
        "--deadline",
        type=float,
        default=60.0,
        help="seconds after which no further check is begun, and the most that one request may take",
    )
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        choices=NAMES,
        metavar="CHECK",
        help=f"count a fault of this check as a warning; one of {', '.join(NAMES)}",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the outcome here, too")
    args = parser.parse_args(argv)
    for name in ("max_tokens", "samples", "timeout", "deadline", "image_min_pixels", "image_max_pixels"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            parser.error(f"--{name.replace('_', '-')} is {value:g}; it must be above 0.")
    for url in args.teacher_url:
        try:
            Endpoint.parse(url)
        except ValueError as error:
            parser.error(str(error))
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Examine, print a line a check, and return the exit code."""
    started = time.monotonic()
    args = parse_args(argv)
    disable_progress_bar()
    try:
        material = args.student_path and Material(
            args.student_path, args.image_min_pixels, args.image_max_pixels
        )
    except (OSError, ValueError) as error:
        print(f"doctor: --student-path {args.student_path} cannot be used: {error}", file=sys.stderr)
        return 2
    options = Options(
        timeout=min(args.timeout, args.deadline),
        deadline=args.deadline,
        max_tokens=args.max_tokens,
        samples=args.samples,
        text_only=args.text_only,
        teacher_path=args.teacher_path,
        min_pixels=args.image_min_pixels,
        max_pixels=args.image_max_pixels,
    )
    several = len(args.teacher_url) > 1
    outcomes: list[Outcome] = []

    def report(outcome: Outcome) -> None:
        if outcome.status == "FAULT" and outcome.check in args.allow:
            outcome = replace(outcome, status="warn")
        outcome = replace(
            outcome, message=without_users(outcome.message), teacher=outcome.teacher.rpartition("@")[2]
        )
        outcomes.append(outcome)
        print(outcome.line(several), flush=True)

    asyncio.run(examine(args.teacher_url, material or None, options, report))
    seconds = time.monotonic() - started
    print(_summary(outcomes, seconds))
    if args.json is not None:
        args.json.write_text(json.dumps(record(outcomes, seconds), indent=2) + "\n")
    return exit_code(outcomes)


def _summary(outcomes: Sequence[Outcome], seconds: float) -> str:
    faults = [outcome for outcome in outcomes if outcome.status == "FAULT"]
    warnings = sum(outcome.status == "warn" for outcome in outcomes)
    noted = f"{warnings} warnings, {seconds:.1f} s"
    if not faults:
        return f"doctor: the teacher is healthy ({noted})"
    names = ", ".join(dict.fromkeys(f"{fault.check} [{fault.fault}]" for fault in faults))
    return f"doctor: {len(faults)} faults: {names} ({noted})"


if __name__ == "__main__":
    sys.exit(main())
