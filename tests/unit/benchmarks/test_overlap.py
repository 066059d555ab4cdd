"""What the benchmark of generating ahead reads out of metrics and trace."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.benchmarks.overlap import MODES, Run, common, intervals, job_flags, summary, table
from slime.arguments import parse_args


def _records(seconds: list[float]) -> list[dict[str, float]]:
    return [
        {"rollout_id": number, "perf/step_seconds": second, "perf/scoring_exposed_share": 0.25}
        for number, second in enumerate(seconds)
    ]


def _stage(name: str, rollout_id: int, start: float, end: float) -> dict[str, object]:
    args = {"rollout_id": rollout_id}
    return {"name": name, "ph": "X", "ts": start, "dur": end - start, "args": args}


EVENTS = [
    {"name": "process_name", "ph": "M", "pid": 1, "args": {"name": "rollout"}},
    _stage("generation", 2, 0, 30),
    _stage("train", 1, 10, 20),
    _stage("train", 2, 25, 45),
]


def test_the_first_turns_do_not_count():
    run = summary(
        _records([9.0, 2.0, 1.0, 2.0]),
        EVENTS,
        cpu=[{"all": 10.0}, {"all": 12.0}, {"all": 13.0}, {"all": 14.0}],
        warm_up=1,
    )
    assert run.steps_per_minute == 30
    assert run.cpu_seconds == pytest.approx(4 / 3)
    assert run.medians == {"perf/step_seconds": 2.0, "perf/scoring_exposed_share": 0.25}


def test_training_beside_a_generation_is_a_share_of_the_training():
    trainings, generations = intervals(EVENTS, "train"), intervals(EVENTS, "generation")
    assert common(trainings, generations) == 15
    assert intervals(EVENTS, "train", 2) == [(25, 45)]
    run = summary(
        _records([9.0, 2.0, 1.0]), EVENTS, cpu=[{"all": 10.0}, {"all": 12.0}, {"all": 13.0}], warm_up=1
    )
    assert run.beside_share == 0.5


def test_ratios_are_within_a_round():
    def run(steps: float) -> Run:
        medians = {"perf/step_seconds": 60 / steps}
        return Run(steps_per_minute=steps, medians=medians, cpu={"all": 0.5}, beside_share=0.0)

    text = table({"synchronous": [run(60), run(30)], "ahead": [run(90), run(30)]}, cores=2)
    assert "Ahead makes 1.25 times the steps of the synchronous loop (1.00 to 1.50)." in text
    assert "| steps a minute | 45.00 | 60.00 |" in text


@pytest.mark.parametrize("mode", MODES)
def test_the_flags_are_those_of_a_job(tmp_path: Path, mode: str):
    args = parse_args([*job_flags(tmp_path, "http://127.0.0.1:1", 4), *MODES[mode]])
    assert (args.samples_per_rollout, args.num_rollout) == (128, 4)
    assert args.async_rollout == args.use_tis == (mode == "ahead")
