"""Our teacher client beside the plain one: what each costs, and what each makes the server do.

    python -m scripts.benchmarks.teacher_scoring              against a stand-in that answers at once
    python -m scripts.benchmarks.teacher_scoring --sglang     against the real SGLang on a CPU

Each client has a process of its own, and they take turns. `docs/teacher_scoring.md` says what the rows mean.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

import orjson

from scripts.benchmarks.scoring.report import SGLANG_ROWS, STUB_ROWS, Record, table
from scripts.benchmarks.scoring.servers import Server, sglang_server, stub_server
from scripts.benchmarks.scoring.workload import Shape
from slime.engines.process import PROJECT_ROOT

CLIENTS = ("plain", "ours")
STUB_SHAPES = ("400:220:512", "512:332:1024", "512:332:4096", "768:652:2048", "1024:1100:1024")
SGLANG_SHAPES = ("768:1000:100",)
TOLERANCE = 1e-3


class Worker:
    """A client in a process of its own, which scores one workload a turn."""

    def __init__(self, process: subprocess.Popen[bytes], name: str) -> None:
        self._process = process
        self._name = name

    def turn(self, server: Server, shape: Shape, number: int) -> Record:
        """Score a workload, the server's cache empty at first.

        Raises:
            RuntimeError: the client failed; its own words are on stderr.
        """
        server.flush()
        before, cpu = server.counts(), server.cpu_seconds()
        order = {"shape": asdict(shape), "vocabulary": asdict(server.vocabulary), "turn": number}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(orjson.dumps(order) + b"\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the {self._name} client ended in the middle of {shape.label}; see above.")
        after = server.counts()
        done = {name: after[name] - before[name] for name in after}
        return orjson.loads(line) | {"server": done | {"cpu": server.cpu_seconds() - cpu}}


@contextmanager
def worker(name: str, server: Server) -> Iterator[Worker]:
    """Run one client until the block ends."""
    command = [sys.executable, "-m", "scripts.benchmarks.scoring.worker", name]
    command += ["--url", server.url, "--checkpoint", str(server.checkpoint)]
    # one thread for numpy and torch: a pool of theirs would be counted as the client's
    env = dict(os.environ) | {"PYTHONPATH": str(PROJECT_ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env) as process:
        yield Worker(process, name)


def compare(server: Server, shapes: Sequence[Shape], rounds: int) -> Iterator[dict[str, list[Record]]]:
    """Let the clients take turns, in alternating order; yield each shape's records.

    The first round only warms up: connections, imports and the stand-in's answers.
    """
    with ExitStack() as stack:
        workers = {name: stack.enter_context(worker(name, server)) for name in CLIENTS}
        number = 0
        for shape in shapes:
            records: dict[str, list[Record]] = {name: [] for name in CLIENTS}
            for turns in range(rounds + 1):
                for name in CLIENTS if turns % 2 else reversed(CLIENTS):
                    record = workers[name].turn(server, shape, number)
                    number += 1
                    if turns:
                        records[name].append(record)
            yield records


def require_same_scores(records: dict[str, list[Record]]) -> None:
    """Raise RuntimeError unless both clients read the same log-probs from the same answers."""
    plain, ours = (records[name][-1]["sums"] for name in CLIENTS)
    pairs = zip(plain, ours, strict=True)
    if not all(math.isclose(one, other, abs_tol=TOLERANCE) for one, other in pairs):
        raise RuntimeError(
            "the two clients read different log-probs from the same answers; one of them errs."
        )


def run(options: argparse.Namespace, folder: Path) -> None:
    """Measure, and print a table a shape as soon as it is measured."""
    texts = options.shapes or (SGLANG_SHAPES if options.sglang else STUB_SHAPES)
    shapes = [Shape.parse(text, options.groups, options.samples) for text in texts]
    if options.sglang:
        context = sglang_server(folder, options.threads, options.embeddings_mb)
    else:
        context = stub_server(folder)
    results = []
    with context as server:
        for shape, records in zip(shapes, compare(server, shapes, options.rounds), strict=True):
            if not options.sglang:
                require_same_scores(records)
            rows = SGLANG_ROWS if options.sglang else STUB_ROWS
            say(table(shape, rows, records["plain"], records["ours"]) + "\n")
            results.append({"shape": asdict(shape), "records": records})
    if options.json:
        options.json.write_text(json.dumps(results))


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m scripts.benchmarks.teacher_scoring",
        description="Our teacher client beside the plain one, against the same server in the same run.",
        allow_abbrev=False,
    )
    made.add_argument("--sglang", action="store_true", help="ask the real SGLang on a CPU, not the stand-in")
    made.add_argument(
        "--shapes",
        nargs="+",
        metavar="SIDE:P:R",
        help="side of the drawing in pixels, tokens of prompt (picture expanded) and response",
    )
    made.add_argument("--groups", type=int, help="prompts in flight (default: 8; 1 with --sglang)")
    made.add_argument("--samples", type=int, default=8, help="n, samples a prompt (default: 8)")
    made.add_argument("--rounds", type=int, help="counted turns of each client (default: 5; 3 with --sglang)")
    made.add_argument("--threads", type=int, default=1, help="compute threads of SGLang (default: 1)")
    made.add_argument(
        "--embeddings-mb", type=int, default=256, help="SGLang's cache of vision embeddings (default: 256)"
    )
    made.add_argument("--json", type=Path, metavar="PATH", help="write every turn's numbers there")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 2 where the arguments or the environment do not allow it."""
    options = parser().parse_args(argv)
    options.groups = options.groups or (1 if options.sglang else 8)
    options.rounds = options.rounds or (3 if options.sglang else 5)
    say(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, Python {sys.version.split()[0]}\n")
    with tempfile.TemporaryDirectory() as folder:
        try:
            run(options, Path(folder))
        except (ValueError, RuntimeError) as error:
            sys.stderr.write(f"teacher_scoring: {error}\n")
            return 2
    say(f"load at the end {os.getloadavg()[0]:.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
