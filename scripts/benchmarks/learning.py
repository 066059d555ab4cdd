"""Which signal teaches a student fastest: distillation in its forms, SFT and GRPO on the tiny set.

    python -m scripts.benchmarks.learning --out outputs/learning

Every method starts from the same students. Its learning rate is the best of a small grid under one seed, and
runs under more. Finished runs are kept in the output folder: called again, the benchmark goes on where it
was interrupted. `docs/learning_signals.md` says what came of it.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from scripts.benchmarks.learning_curves.curves import reached
from scripts.benchmarks.learning_curves.methods import CASES, METHODS, Case, Run, grid_runs
from scripts.benchmarks.learning_curves.report import report, summaries
from scripts.benchmarks.learning_curves.results import Result, all_finished, finished, seed_runs
from scripts.benchmarks.learning_curves.schedule import Workers
from slime.engines.process import free_port, start_server
from slime.ray.interrupts import exit_status, ignore, listen
from slime.tiny.paths import checkpoint_path, ensure_dataset

REPORT_FILE = "report.md"
TEACHER_SECONDS = 300.0


class Benchmark:
    """The runs of some cases and methods in one output folder."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._out: Path = options.out.resolve()
        self._jobs: int = options.jobs
        self._seeds: int = options.seeds
        self._grid = list(grid_runs(options.cases, options.methods))
        self._failed: list[str] = []
        self._ended = 0
        self._total = len(self._grid) + (self._seeds - 1) * len(options.cases) * len(options.methods)

    def run(self) -> list[str]:
        """Do every run that has not been done; return the names of those that failed."""
        logs = self._out / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        data = self._out / "data"
        ensure_dataset(data)
        teacher = start_server(
            "transformers", str(checkpoint_path("teacher")), free_port(), logs / "teacher.log", role="teacher"
        )
        with teacher, Workers(self._jobs, self._out, data, teacher.url) as workers:
            teacher.wait_ready(TEACHER_SECONDS)
            self._do(workers, self._grid)
            self._do(workers, list(seed_runs(self._of_grid(), self._seeds)))
        return self._failed

    def results(self) -> list[Result]:
        """Return all that has been done so far."""
        grid = self._of_grid()
        return grid + all_finished(self._out, seed_runs(grid, self._seeds))

    def report(self) -> str:
        """Write tables and picture into the output folder; return the tables."""
        # matplotlib takes seconds to import, and only the end needs it
        from scripts.benchmarks.learning_curves.plot import draw

        results = self.results()
        if not results:
            raise ValueError(f"{self._out} holds no finished run of these cases and methods.")
        text = report(results)
        (self._out / REPORT_FILE).write_text(text + "\n", encoding="utf-8")
        path = draw(summaries(results), self._out)
        return f"{text}\n\n{self._out}: {REPORT_FILE}, {path.name}"

    def _do(self, workers: Workers, runs: Sequence[Run]) -> None:
        waiting = [run for run in runs if finished(self._out, run) is None]
        self._ended += len(runs) - len(waiting)
        for run, log in workers.do(waiting):
            self._ended += 1
            result = finished(self._out, run)
            if result is None:
                self._failed.append(run.name)
                say(f"[{self._ended}/{self._total}] {run.name} failed; its reason is at the end of {log}")
            else:
                say(f"[{self._ended}/{self._total}] {line_of(result)}")

    def _of_grid(self) -> list[Result]:
        return all_finished(self._out, self._grid)


def line_of(result: Result) -> str:
    """Return a finished run as one line."""
    tokens = reached(result.points, result.level(0.8), "tokens")
    when = "80 % of the gap not reached" if tokens is None else f"80 % of the gap after {tokens:,.0f} tokens"
    last = result.points[-1]
    return (
        f"{result.run.name}: accuracy {result.start:.3f} -> {result.accuracy:.3f}, {when}; KL "
        f"{result.final_kl:.3f}; {last.rollouts} rollouts, {last.tokens:,.0f} tokens, "
        f"{result.wall_seconds:.0f} s"
    )


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m scripts.benchmarks.learning",
        description="Learning curves of distillation in its forms, SFT and GRPO on the tiny set.",
        allow_abbrev=False,
    )
    made.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of runs and report")
    made.add_argument("--case", choices=tuple(CASES), help="one student instead of both")
    made.add_argument(
        "--methods", default=",".join(METHODS), metavar="A,B,…", help="default: all (%(default)s)"
    )
    made.add_argument(
        "--seeds", type=int, default=3, help="runs at the best learning rate (default: %(default)s)"
    )
    made.add_argument("--jobs", type=int, default=2, help="runs at a time (default: %(default)s)")
    made.add_argument("--rollouts", type=int, metavar="N", help="length of a run (default: the case's)")
    made.add_argument(
        "--learning-rates", type=float, nargs="+", metavar="LR", help="the grid (default: the case's)"
    )
    made.add_argument("--report-only", action="store_true", help="run nothing; report what is there")
    return made


def read(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options, `cases` and `methods` resolved; ends the process where they are wrong."""
    made = parser()
    options = made.parse_args(argv)
    options.methods = options.methods.split(",")
    unknown = [name for name in options.methods if name not in METHODS]
    if unknown:
        made.error(f"--methods {','.join(unknown)}: unknown; there are {', '.join(METHODS)}.")
    if options.seeds < 1 or options.jobs < 1:
        made.error("--seeds and --jobs must be 1 or more.")
    cases = [CASES[options.case]] if options.case else list(CASES.values())
    options.cases = [_changed(case, options) for case in cases]
    return options


def _changed(case: Case, options: argparse.Namespace) -> Case:
    if options.rollouts is not None:
        case = replace(case, num_rollout=options.rollouts)
    if options.learning_rates is not None:
        case = replace(case, learning_rates=tuple(options.learning_rates))
    return case


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 where a run failed, 2 where the folder does not fit, 130 or 143 after a signal."""
    options = read(argv)
    listen()
    started = time.monotonic()
    try:
        benchmark = Benchmark(options)
        failed = [] if options.report_only else benchmark.run()
        say("\n" + benchmark.report())
    except KeyboardInterrupt:
        ignore()
        sys.stderr.write(f"Interrupted; finished runs are kept. Go on with the same --out {options.out}\n")
        return exit_status()
    except ValueError as error:
        sys.stderr.write(f"learning: {error}\n")
        return 2
    minutes = (time.monotonic() - started) / 60
    say(f"{os.cpu_count()} cores, {options.jobs} runs at a time, {minutes:.1f} minutes")
    if failed:
        sys.stderr.write(f"learning: {len(failed)} runs failed: {', '.join(failed)}\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
