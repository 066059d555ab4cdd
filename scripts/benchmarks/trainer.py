"""Our trainer beside the plain way: tokens per second and peak memory of a step.

    python -m scripts.benchmarks.trainer

Each way has a process of its own, and they take turns. `docs/trainer.md` says what the plain way is, what the
rows mean and what came of it. With `--top-k K` the loss is the divergence over the teacher's K likeliest
tokens, and the other way is our trainer with a pass over the LM head for each question of the loss (apart).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from scripts.benchmarks.training.processes import worker
from scripts.benchmarks.training.report import Record, ratios, sizes, table
from scripts.benchmarks.training.workload import Machine, Shape, save_model

TOLERANCE = 1e-3
DEFAULT = Shape()


def ways(shape: Shape) -> tuple[str, str]:
    """Return the two that are compared, ours last."""
    return ("apart" if shape.top_k else "plain", "ours")


def compare(model: Path, shape: Shape, rounds: int, threads: int) -> dict[str, list[Record]]:
    """Let the ways take turns, in alternating order; return each one's records.

    The first round warms up, makes the optimizers' states, and must come to the same on both ways.

    Raises:
        RuntimeError: it does not, or one failed.
    """
    names = ways(shape)
    records: dict[str, list[Record]] = {name: [] for name in names}
    with ExitStack() as stack:
        workers = {
            name: stack.enter_context(worker(name, model, shape, Machine(), threads)) for name in names
        }
        require_same_step({name: workers[name].turn() for name in names})
        for number in range(rounds):
            for name in names if number % 2 else reversed(names):
                records[name].append(workers[name].turn())
    return records


def require_same_step(first: dict[str, Record]) -> None:
    """Raise RuntimeError unless both ways took the same first step."""
    (other, theirs), (_, ours) = ((name, record["values"]) for name, record in first.items())
    for name, value in theirs.items():
        if not math.isclose(value, ours[name], rel_tol=TOLERANCE):
            raise RuntimeError(
                f"the two ways took different steps: {name} {value:.6g} the {other} way, {ours[name]:.6g} "
                "ours; one of them errs."
            )


def run(options: argparse.Namespace, folder: Path) -> None:
    """Measure and print."""
    shape = Shape(
        vocabulary=options.vocabulary,
        prompts=options.prompts,
        samples=options.samples,
        longest=options.longest,
        side=options.side,
        top_k=options.top_k,
    )
    save_model(folder, shape.vocabulary)
    say(sizes(shape) + "\n")
    records = compare(folder, shape, options.rounds, options.threads)
    other, ours = ways(shape)
    say(table(shape, records[other], records[ours], other))
    if options.json:
        better = ratios(shape, records[other], records[ours])
        options.json.write_text(json.dumps({"shape": asdict(shape), "records": records, "ratios": better}))


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m scripts.benchmarks.trainer",
        description="Our trainer beside the plain way (padded batches, all logits) in the same run.",
        allow_abbrev=False,
    )
    whole = {
        "vocabulary": "tokens of the vocabulary",
        "prompts": "prompts of a step, with a picture each",
        "samples": "n, samples a prompt",
        "longest": "tokens of the longest response; the shortest has 32",
        "side": "of a picture, in pixels",
        "top_k": "likeliest tokens of the teacher to distil; 0: the sampled tokens' scores",
    }
    for name, text in whole.items():
        default = getattr(DEFAULT, name)
        flag = "--" + name.replace("_", "-")
        made.add_argument(flag, type=int, default=default, help=f"{text} (default: {default})")
    made.add_argument("--rounds", type=int, default=3, help="counted steps of each way (default: 3)")
    made.add_argument("--threads", type=int, default=1, help="compute threads of each way (default: 1)")
    made.add_argument("--json", type=Path, metavar="PATH", help="write every step's numbers there")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 2 where the ways disagree or the environment does not allow it."""
    options = parser().parse_args(argv)
    say(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, Python {sys.version.split()[0]}\n")
    with tempfile.TemporaryDirectory() as folder:
        try:
            run(options, Path(folder))
        except RuntimeError as error:
            sys.stderr.write(f"trainer: {error}\n")
            return 2
    say(f"\nload at the end {os.getloadavg()[0]:.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
