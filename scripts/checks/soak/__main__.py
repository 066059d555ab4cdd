"""Runs the tiny main job through random faults, and starts it anew where one ends it:

    python -m scripts.checks.soak --out outputs/soak

Prints a table; ends with 1 where samples are lost, memory grows, or anything is left behind. `--faults 0`
only watches. What appears in shared memory meanwhile counts as left behind, so nothing else should run.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from scripts.checks.soak.faults import Fault, plan
from scripts.checks.soak.job import PROMPTS, SAMPLES, Job
from scripts.checks.soak.report import Outcome, report
from scripts.checks.soak.watch import Watch, shared_things
from slime.metrics.tracker import read_metrics
from slime.ray.interrupts import exit_status, ignore, listen

POLL_SECONDS = 1.0


def main(argv: Sequence[str] | None = None) -> int:
    """Read the command line, soak, report."""
    options = _parser().parse_args(argv)
    out: Path = options.out.resolve()
    if (out / "run").exists():
        raise SystemExit(f"{out / 'run'} holds a run already; give another folder as --out.")
    out.mkdir(parents=True, exist_ok=True)
    job = Job(out / "run", out / "data", options.rollouts, options.save_interval)
    listen()
    try:
        outcome = soak(job, plan(options.faults, options.rollouts, options.seed))
    except KeyboardInterrupt:
        ignore()
        sys.stderr.write("Interrupted; the job has been ended.\n")
        return exit_status()
    finally:
        job.kill()
    sys.stdout.write(report(outcome) + "\n")
    return int(any(outcome.problems()))


def soak(job: Job, planned: Sequence[tuple[int, Fault]]) -> Outcome:
    """Run the job to its end through the planned faults.

    Raises:
        RuntimeError: it ended though nothing was done to it, or does not go on.
    """
    begin, watch, waiting, done = time.monotonic(), Watch(), list(planned), list[str]()
    before = shared_things()
    job.start()
    while (status := job.status()) != 0:
        if status is not None:
            raise RuntimeError(f"the launcher ended with status {status} by itself; look at {job.console}.")
        rollouts = len(recorded(job))
        watch.sample(job, rollouts)
        if waiting and rollouts >= waiting[0][0] and under_way(job):
            done += suffer(job, waiting.pop(0)[1])
        time.sleep(POLL_SECONDS)
    left = [*job.left(), *sorted(shared_things() - before), *listening(job.port)]
    rows = recorded(job)
    accuracies = [row["eval/accuracy"] for row in read_metrics(job.folder) if "eval/accuracy" in row]
    return Outcome(
        minutes=(time.monotonic() - begin) / 60,
        starts=job.starts,
        faults=done,
        planned_samples=job.rollouts * PROMPTS * SAMPLES,
        trained_samples=int(sum(row["samples"] for row in rows)),
        rollout_ids=[int(row["rollout_id"]) for row in rows],
        planned_rollouts=job.rollouts,
        growth=list(watch.longest()),
        left=left,
        accuracy=(accuracies[0], accuracies[-1]) if len(accuracies) > 1 else None,
    )


def suffer(job: Job, fault: Fault) -> list[str]:
    """Inject a fault, and start the job anew where that ends it; return the fault's name if it was done."""
    sys.stderr.write(f"after {len(recorded(job))} rollouts: {fault.name}\n")
    if not fault.inject(job):
        return []
    if fault.ends_run:
        job.wait_until(lambda: job.status() is not None, f"the end of the run after: {fault.name}")
        if left := job.left():
            raise RuntimeError(f"after: {fault.name}, these processes outlive the run: {left}")
        job.start()
    return [fault.name]


def under_way(job: Job) -> bool:
    """Tell whether this start of the job has trained on anything yet."""
    text = job.console.read_text(errors="replace").rpartition("Training command:")[2]
    return re.search(r"^rollout +\d+/", text, re.MULTILINE) is not None


def recorded(job: Job) -> list[dict[str, float]]:
    """Return the metrics of the rollouts that have been trained on."""
    return [row for row in read_metrics(job.folder) if "opd_reverse_kl" in row]


def listening(port: int) -> list[str]:
    """Return who listens at the teacher's port."""
    return [
        f"port {port} of process {connection.pid}"
        for connection in psutil.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr[1:] == (port,)
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.checks.soak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the run; it must hold none")
    parser.add_argument("--rollouts", type=int, default=200)
    parser.add_argument("--faults", type=int, default=18, help="how many, every kind before one comes twice")
    parser.add_argument("--save-interval", type=int, default=5, help="rollouts between checkpoints")
    parser.add_argument("--seed", type=int, default=0, help="of the faults and their moments")
    return parser


if __name__ == "__main__":
    sys.exit(main())
