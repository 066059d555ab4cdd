"""What generating ahead gains: the tiny main job with and without `--async-rollout`, in turns.

    python -m scripts.benchmarks.overlap --out outputs/overlap

Both runs of a round have the same teacher and the same flags, and their order alternates. The first turns of
the loop warm up and are not counted. `docs/overlap.md` says what the rows mean.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from slime.engines.process import PROJECT_ROOT, ServerProcess, free_port, start_server
from slime.metrics.position import read_metrics
from slime.metrics.trace import TRACE_FILE, read_trace
from slime.ray.interrupts import exit_status, ignore, listen
from slime.tiny.paths import checkpoint_path, ensure_dataset

MODES: dict[str, tuple[str, ...]] = {"synchronous": (), "ahead": ("--async-rollout",)}
TEACHER_SECONDS = 300.0
RUN_SECONDS = 1800.0
POLL_SECONDS = 0.1
WHO = {
    "ray::RolloutActor": "rollout side",
    "ray::TrainActor": "trainer",
    "slime.engines.transformers_engine": "student's engine",
    "": "driver, Ray and others",
}
"""What a command line shows of a process of the job -> what it is."""
ROWS = (
    ("turn of the loop, s", "perf/step_seconds"),
    ("… rollout, s", "perf/rollout_seconds"),
    ("… training, s", "perf/train_seconds"),
    ("… sync, s", "perf/sync_seconds"),
    ("trainer waits for a rollout, s", "perf/wait_for_rollout_seconds"),
    ("rollout side waits for training, s", "perf/wait_for_train_seconds"),
    ("scoring not hidden behind generation, share", "perf/scoring_exposed_share"),
    ("importance weight, mean", "tis_weight_mean"),
)
"""(what, metric) of the table."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one run of the job was like, after its warm-up."""

    steps_per_minute: float
    medians: Mapping[str, float]
    """Metric -> median over the turns."""
    cpu: Mapping[str, float]
    """Who -> CPU seconds a turn."""
    beside_share: float
    """Of the time in which was trained, how much saw a generation too."""

    @property
    def cpu_seconds(self) -> float:
        """CPU seconds of all processes, a turn."""
        return sum(self.cpu.values())


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table."""
    options = _parser().parse_args(argv)
    listen()
    try:
        runs = measure_all(options)
    except KeyboardInterrupt:
        ignore()
        sys.stderr.write("Interrupted; job and teacher have been ended.\n")
        return exit_status()
    sys.stdout.write(table(runs, len(os.sched_getaffinity(0))) + "\n")
    return 0


def measure_all(options: argparse.Namespace) -> dict[str, list[Run]]:
    """Return the runs of each mode, one a round."""
    out: Path = options.out.resolve()
    data = out / "data"
    ensure_dataset(data)
    (out / "logs").mkdir(exist_ok=True)
    runs: dict[str, list[Run]] = {mode: [] for mode in MODES}
    model = str(checkpoint_path("teacher"))
    with start_server(
        "transformers", model, free_port(), out / "logs" / "teacher.log", role="teacher"
    ) as teacher:
        teacher.wait_ready(TEACHER_SECONDS)
        for number in range(options.rounds):
            for mode in list(MODES)[:: 1 if number % 2 == 0 else -1]:
                folder = out / f"{mode}-{number}"
                if folder.exists():
                    raise SystemExit(f"{folder} holds a run already; give another folder as --out.")
                flags = (*job_flags(data, teacher.url, options.rollouts), *MODES[mode])
                run = measure(flags, folder, teacher, options.warm_up)
                runs[mode].append(run)
                sys.stderr.write(f"{folder.name}: {run.steps_per_minute:.1f} steps a minute\n")
    return runs


def job_flags(data: Path, teacher_url: str, rollouts: int) -> list[str]:
    """Return the flags of the main job without a GPU, evaluations left out."""
    return [
        *("--hf-checkpoint", str(checkpoint_path("student")), "--engine", "transformers"),
        *("--prompt-data", str(data / "train.parquet"), "--input-key", "problem", "--label-key", "answer"),
        *("--multimodal-keys", '{"image": "images"}', "--apply-chat-template", "--rollout-shuffle"),
        *("--num-rollout", str(rollouts), "--rollout-batch-size", "32", "--n-samples-per-prompt", "4"),
        *("--rollout-max-response-len", "96", "--rollout-concurrency", "64"),
        *("--rm-type", "math", "--rm-url", f"{teacher_url}/generate"),
        *("--custom-rm-path", "examples.opd_vlm.opd_vlm_reward.reward_func"),
        *("--custom-reward-post-process-path", "examples.opd_vlm.opd_vlm_reward.post_process_rewards"),
        *("--use-opd", "--opd-type", "sglang", "--calculate-per-token-loss", "--lr", "3e-4"),
        *("--train-dtype", "float32", "--use-dynamic-batch-size", "--max-tokens-per-gpu", "4096"),
    ]


def measure(flags: Sequence[str], folder: Path, teacher: ServerProcess, warm_up: int) -> Run:
    """Run the job to its end.

    Raises:
        RuntimeError: it failed; the message ends with what it said last.
    """
    folder.mkdir(parents=True)
    console = folder / "console.log"
    command = [sys.executable, "-m", "slime.train", *flags, "--output-dir", str(folder)]
    environment = dict(os.environ) | {"PYTHONPATH": str(PROJECT_ROOT), "CUDA_VISIBLE_DEVICES": ""}
    with (
        console.open("w") as file,
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment) as job,
    ):
        try:
            cpu = _cpu_at_turns(job, folder, teacher)
        finally:
            job.terminate()  # nothing where it has ended
    if job.returncode != 0:
        end = "\n".join(console.read_text().splitlines()[-30:])
        raise RuntimeError(f"the job ended with exit status {job.returncode}. The end of {console}:\n{end}")
    return summary(read_metrics(folder), read_trace(folder / TRACE_FILE), cpu, warm_up)


def summary(
    records: Sequence[Mapping[str, float]],
    events: Sequence[Mapping[str, Any]],
    cpu: Sequence[Mapping[str, float]],
    warm_up: int,
) -> Run:
    """Return what the turns after the first `warm_up` were like.

    Args:
        records: the metrics of each turn.
        events: the trace.
        cpu: who used how many CPU seconds before the end of each turn.
        warm_up: turns that do not count.
    """
    turns = [record for record in records if record["rollout_id"] >= warm_up]
    names = [name for _, name in ROWS if name in turns[0]]
    medians = {name: median(record[name] for record in turns) for name in names}
    generations, trainings = intervals(events, "generation"), intervals(events, "train", warm_up)
    return Run(
        steps_per_minute=60.0 / medians["perf/step_seconds"],
        medians=medians,
        cpu={who: (cpu[-1][who] - cpu[warm_up - 1][who]) / (len(cpu) - warm_up) for who in cpu[-1]},
        beside_share=common(trainings, generations) / sum(end - start for start, end in trainings),
    )


def intervals(events: Sequence[Mapping[str, Any]], stage: str, first: int = 0) -> list[tuple[float, float]]:
    """Return begin and end of a stage in each rollout from `first` on, in microseconds."""
    return [
        (event["ts"], event["ts"] + event["dur"])
        for event in events
        if event["ph"] == "X" and event["name"] == stage and event["args"]["rollout_id"] >= first
    ]


def common(ones: Sequence[tuple[float, float]], others: Sequence[tuple[float, float]]) -> float:
    """Return for how long an interval of the first kind and one of the second were there at once."""
    return sum(
        max(0.0, min(end, other_end) - max(start, other_start))
        for start, end in ones
        for other_start, other_end in others
    )


def table(runs: Mapping[str, Sequence[Run]], cores: int) -> str:
    """Return medians over the runs as a Markdown table; ratios are within each round."""
    first, second = (list(runs[mode]) for mode in MODES)
    ratios = [b.steps_per_minute / a.steps_per_minute for a, b in zip(first, second, strict=True)]
    lines = [f"| median of {len(first)} rounds | {' | '.join(MODES)} |", "|---|--:|--:|"]

    def row(what: str, one: float, other: float) -> None:
        lines.append(f"| {what} | {one:.2f} | {other:.2f} |")

    def medians(value: Any) -> tuple[float, float]:
        return median(map(value, first)), median(map(value, second))

    row("steps a minute", *medians(lambda run: run.steps_per_minute))
    for what, name in ROWS:
        row(what, *medians(lambda run, name=name: run.medians.get(name, 1.0)))
    row("training beside a generation, share", *medians(lambda run: run.beside_share))
    row("CPU time of all processes a turn, s", *medians(lambda run: run.cpu_seconds))
    for who in first[0].cpu:
        row(f"… {who}, s", *medians(lambda run, who=who: run.cpu[who]))
    filled = medians(lambda run: run.cpu_seconds / run.medians["perf/step_seconds"] / cores)
    row(f"… of what {cores} cores have, share", *filled)
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    lines.append(f"\nAhead makes {median(ratios):.2f} times the steps of the synchronous loop ({spread}).")
    lines.append(f"With {cores} cores full from end to end it could make {1 / filled[0]:.2f} times.")
    return "\n".join(lines)


def _cpu_at_turns(
    job: subprocess.Popen[bytes], folder: Path, teacher: ServerProcess
) -> list[dict[str, float]]:
    """Wait for the job's end; return who had used how many CPU seconds when each turn was written."""
    deadline = time.monotonic() + RUN_SECONDS
    seen: list[dict[str, float]] = []
    while job.poll() is None:
        if time.monotonic() > deadline:
            raise RuntimeError(f"{folder.name} still runs after {RUN_SECONDS:g} s; look at its console.log.")
        turns = len(read_metrics(folder))
        if turns > len(seen):
            seen += [_cpu_seconds(job.pid, teacher.pid)] * (turns - len(seen))
        time.sleep(POLL_SECONDS)
    return seen


def _cpu_seconds(job: int, teacher: int) -> dict[str, float]:
    """Return the CPU time of the job's living processes and of the teacher's, by what they do."""
    used = dict.fromkeys(("teacher", *WHO.values()), 0.0)
    for root, known in ((teacher, "teacher"), (job, None)):
        parent = psutil.Process(root)
        for process in [parent, *parent.children(recursive=True)]:
            try:
                command, times = " ".join(process.cmdline()), process.cpu_times()
            except psutil.NoSuchProcess:  # it has just ended
                continue
            who = known or next(name for word, name in WHO.items() if word in command)
            used[who] += times.user + times.system
    return used


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="Folder for data, logs and runs.")
    parser.add_argument("--rollouts", type=int, default=12, help="Turns of the loop in a run.")
    parser.add_argument("--warm-up", type=int, default=3, help="Turns of them that do not count, at least 1.")
    parser.add_argument("--rounds", type=int, default=5, help="Runs of each kind.")
    return parser


if __name__ == "__main__":
    sys.exit(main())
