"""The benchmark of learning signals: its arithmetic, what is run next, and a small real run of it.

No time is asserted: what the benchmark measures depends on the machine.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from scripts.benchmarks import learning
from scripts.benchmarks.learning_curves.curves import (
    Point,
    accuracy_at,
    binomial_error,
    curve_of,
    is_closed,
    is_hopeless,
    mean_accuracy,
    reached,
    stage_seconds,
    standard_error,
)
from scripts.benchmarks.learning_curves.local_run import mean_gap
from scripts.benchmarks.learning_curves.methods import (
    CASES,
    METHODS,
    VOCABULARY,
    Run,
    grid_runs,
    kl_flags,
    train_flags,
)
from scripts.benchmarks.learning_curves.plot import band, draw
from scripts.benchmarks.learning_curves.report import report, summaries
from scripts.benchmarks.learning_curves.results import (
    RESULT_FILE,
    Result,
    best_learning_rate,
    finished,
    run_folder,
    seed_runs,
)
from slime.arguments import parse_args
from slime.engines.model_facts import model_facts
from slime.tiny.paths import checkpoint_path, ensure_dataset
from tests.fakes.jobs import SHARED_FOLDERS, benchmarking
from tests.fakes.rollouts import answered_sample, teacher_tensor

HABIT = CASES["habit"]


def curve(*accuracies: float, step: float = 100.0) -> tuple[Point, ...]:
    """A curve with an evaluation every `step` tokens, each of which takes a hundredth of a second."""
    return tuple(
        Point(rollouts=n, tokens=step * n, teacher_tokens=0.0, seconds=step * n / 100, accuracy=accuracy)
        for n, accuracy in enumerate(accuracies)
    )


def result(
    points: tuple[Point, ...], *, method: str = "sampled", rate: float = 3e-4, seed: int = 1, **changes: Any
) -> Result:
    """A finished run of the habit case."""
    fields: dict[str, Any] = {
        "run": Run(case=HABIT, method=method, learning_rate=rate, seed=seed),
        "teacher": 1.0,
        "test_rows": 512,
        "points": points,
        "final_kl": 0.1,
        "final_sampled_accuracy": 0.7,
        "stage_seconds": {"perf/rollout_seconds": 1.0},
        "wall_seconds": 2.0,
    }
    return Result(**fields | changes)


# ---- curves ----


def test_what_a_level_costs_is_interpolated():
    points = curve(0.2, 0.4, 0.8, 0.6, 0.9)
    assert reached(points, 0.5, "tokens") == pytest.approx(125)
    assert reached(points, 0.5, "seconds") == pytest.approx(1.25)
    assert reached(points, 0.4, "tokens") == pytest.approx(100)
    assert reached(points, 0.85, "tokens") == pytest.approx(300 + 100 * 25 / 30)


def test_a_level_that_no_evaluation_shows_is_not_reached():
    assert reached(curve(0.2, 0.4, 0.79), 0.8, "tokens") is None


def test_a_level_that_the_start_has_costs_nothing():
    assert reached(curve(0.5, 0.4), 0.5, "tokens") == 0


def test_a_curve_that_ended_holds_its_last_accuracy():
    points = curve(0.0, 1.0)
    assert [accuracy_at(points, at) for at in (0, 25, 100, 500)] == [0, 0.25, 1, 1]
    assert mean_accuracy(points, 100) == pytest.approx(0.5)
    assert mean_accuracy(points, 200) == pytest.approx(0.75)
    assert mean_accuracy(points, 50) == pytest.approx(0.25)


def test_errors():
    assert standard_error([1.0, 2.0, 3.0]) == pytest.approx(1 / 3**0.5)
    assert standard_error([1.0]) is None
    assert binomial_error(0.5, 100) == pytest.approx(0.05)
    assert binomial_error(1.0, 100) == 0


def rollout(rollout_id: int, tokens: float = 90.0) -> dict[str, float]:
    times = {"perf/rollout_seconds": 1.0, "perf/train_seconds": 0.5, "perf/sync_seconds": 0.25}
    return {"rollout_id": rollout_id, "response_tokens": 100.0, "tokens": tokens, **times}


def evaluation(rollout_id: int, accuracy: float) -> dict[str, float]:
    return {"rollout_id": rollout_id, "eval/accuracy": accuracy, "perf/eval_seconds": 9.0}


@pytest.mark.parametrize(("teacher_samples", "teacher_tokens"), [(False, 0.0), (True, 200.0)])
def test_a_run_costs_tokens_trained_on_and_the_time_of_its_rollouts(teacher_samples, teacher_tokens):
    records = [evaluation(0, 0.3), rollout(0), rollout(1, tokens=80.0), evaluation(2, 0.6)]
    first, last = curve_of(records, teacher_samples=teacher_samples)
    assert first == Point(rollouts=0, tokens=0, teacher_tokens=0, seconds=0, accuracy=0.3)
    assert last == Point(
        rollouts=2, tokens=170, teacher_tokens=teacher_tokens, seconds=2 * 1.75, accuracy=0.6
    )
    assert stage_seconds(records)["perf/eval_seconds"] == 18


@pytest.mark.parametrize(
    ("accuracies", "share", "closed"),
    [
        ([0.2, 0.95, 0.95], 0.93, True),
        ([0.2, 0.95], 0.93, False),
        ([0.2, 0.95, 0.9], 0.93, False),
        ([0.2, 0.5, 0.95, 0.94, 0.95], 0.9, True),
        ([0.2, 1.0, 1.0], None, False),
    ],
)
def test_a_run_ends_after_two_evaluations_at_the_top(accuracies, share, closed):
    assert is_closed(accuracies, 1.0, share) is closed


@pytest.mark.parametrize(
    ("accuracies", "hopeless"),
    [([0.2] * 10, False), ([0.2] * 11, True), ([0.2] * 10 + [0.29], False), ([0.2, *[0.0] * 10], True)],
)
def test_a_run_that_learns_nothing_is_given_up(accuracies: list[float], hopeless: bool) -> None:
    assert is_hopeless(accuracies, 1.0) is hopeless


def test_the_final_kl_is_a_token_mean():
    long = answered_sample(response=(5, 6, 7), teacher_log_probs=teacher_tensor(-2, -2, -2))
    short = answered_sample(response=(5,), teacher_log_probs=teacher_tensor(-5))
    assert mean_gap([long, short]) == pytest.approx(7 / 4)


# ---- what is run ----


def test_the_grid_comes_first_and_the_best_is_run_under_more_seeds():
    runs = list(grid_runs([HABIT], ["sampled", "grpo"]))
    assert len({run.name for run in runs}) == 2 * len(HABIT.learning_rates)
    assert {run.seed for run in runs} == {1}
    grid = [
        result(curve(0.3, 0.5, 0.5), rate=1e-4),
        result(curve(0.3, 0.9, 0.9), rate=3e-4),
        result(curve(0.3, 0.9, 0.1), rate=1e-3),
        result(curve(0.3, 0.6), method="grpo", rate=1e-3),
    ]
    assert [(run.method, run.learning_rate, run.seed) for run in seed_runs(grid, 3)] == [
        *(("sampled", 3e-4, 2), ("sampled", 3e-4, 3)),
        *(("grpo", 1e-3, 2), ("grpo", 1e-3, 3)),
    ]


def test_the_best_learning_rate_has_the_highest_curve():
    slow, ended_early = result(curve(0.3, 0.5, 0.7, 0.9), rate=1e-4), result(curve(0.3, 0.9), rate=1e-3)
    assert best_learning_rate([slow, ended_early]) == 1e-3
    # over many more tokens for the same accuracies
    wordy = result(curve(0.3, 0.9, 0.9, 0.9, step=1000.0), rate=3e-4)
    assert best_learning_rate([slow, ended_early, wordy]) == 1e-3


def test_of_equal_learning_rates_the_smallest_is_chosen():
    assert best_learning_rate([result(curve(0.3, 0.9), rate=rate) for rate in (1e-3, 1e-4, 3e-4)]) == 1e-4


def write(out: Path, finished_run: Result) -> None:
    folder = run_folder(out, finished_run.run)
    folder.mkdir(parents=True)
    (folder / RESULT_FILE).write_text(json.dumps(finished_run.as_dict()))


def test_a_finished_run_is_found_again(tmp_path):
    done = result(curve(0.3, 0.9))
    assert finished(tmp_path, done.run) is None
    write(tmp_path, done)
    assert finished(tmp_path, done.run) == done


def test_a_run_of_other_settings_is_refused(tmp_path, capsys):
    done = result(curve(0.3, 0.9))
    write(tmp_path, done)
    longer = replace(done.run, case=replace(HABIT, num_rollout=21))
    with pytest.raises(ValueError, match="other settings"):
        finished(tmp_path, longer)
    argv = ["--out", str(tmp_path), "--case", "habit", "--rollouts", "21", "--report-only"]
    assert learning.main(argv) == 2
    assert "another --out" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--methods", "sampled,nonsense"], ["--seeds", "0"], ["--jobs", "0"]])
def test_what_cannot_be_run_is_refused(argv, capsys):
    with pytest.raises(SystemExit) as ended:
        learning.main(["--out", "unused", *argv])
    assert ended.value.code == 2
    assert argv[0] in capsys.readouterr().err


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", METHODS)
def test_every_run_has_flags_that_are_understood(case, method):
    run = Run(case=CASES[case], method=method, learning_rate=1e-3, seed=2)
    data = {"train": Path("train.parquet"), "test": Path("test.parquet")}
    args = parse_args(train_flags(run, data, "http://127.0.0.1:1", Path("out")))
    assert (args.seed, args.lr, args.num_rollout) == (2, 1e-3, CASES[case].num_rollout)
    assert args.grpo_std_normalization == (method in ("grpo", "sft"))
    held = parse_args(kl_flags(run.case, data, "http://127.0.0.1:1", Path("out")))
    assert (held.prompt_data, held.use_opd) == ("test.parquet", True)


def test_the_full_divergences_see_the_whole_vocabulary():
    assert model_facts(str(checkpoint_path("student"))).vocab_size == VOCABULARY


# ---- the report ----


RESULTS = [
    result(curve(0.2, 0.5, 0.8), rate=1e-4),
    result(curve(0.2, 0.6, 1.0), final_kl=0.1),
    result(curve(0.2, 0.6, 0.9), seed=2, final_kl=0.2),
    result(curve(0.2, 0.6, 0.7), seed=3, final_kl=0.3),
    result(
        tuple(replace(point, teacher_tokens=2 * point.tokens) for point in curve(0.2, 0.6, 1.0)), method="sft"
    ),
    result(curve(0.2, 0.3, 0.3), method="grpo"),
]


def test_the_report_shows_means_errors_and_what_was_not_reached():
    lines = report(RESULTS).splitlines()
    assert "Accuracy on the 512 test rows: the student before 0.200, the teacher 1.000." in lines
    sampled, sft, grpo = (
        next(line for line in lines if line.startswith(f"| {METHODS[name].label} |"))
        for name in ("sampled", "sft", "grpo")
    )
    cells = [cell.strip() for cell in sampled.strip("|").split("|")]
    assert cells[1:] == [
        *("0.0003", "0.867 ± 0.088", "0.015", "83% ± 11%", "0.700 ± 0.000", "0.200 ± 0.058"),
        *("100 ± 0", "170 ± 10 (2 of 3)", "0", "1.0 ± 0.0", "1.7 ± 0.1 (2 of 3)"),
    ]
    assert sft.split("|")[9:11] == [" 160 ", " 320 "]
    assert grpo.count("not reached") == 4
    grid = [line for line in lines if line.startswith(f"| {METHODS['sampled'].label} |")][1]
    assert grid == f"| {METHODS['sampled'].label} | 0.500 (0.800) | **0.600 (1.000)** |"


def test_the_picture_shows_the_mean_of_the_seeds(tmp_path):
    drawn = summaries(RESULTS)
    tokens, low, middle, high = band(drawn[0])
    assert (tokens[0], tokens[-1]) == (0, 200)
    assert (low[-1], middle[-1], high[-1]) == pytest.approx((0.7, 2.6 / 3, 1.0))
    assert draw(drawn, tmp_path).stat().st_size > 10_000


# ---- the real thing ----


SMALL = ["--case", "habit", "--methods", "sampled", "--rollouts", "2", "--seeds", "1", "--jobs", "1"]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An output folder with the first rows of the data, which the benchmark takes for the whole."""
    folder = tmp_path / "out"
    (folder / "data").mkdir(parents=True)
    for path in ensure_dataset(tmp_path / "whole").values():
        pq.write_table(pq.read_table(path).slice(0, 64), folder / "data" / path.name)
    return folder


def test_a_run_trains_evaluates_and_is_reported(out):
    argv = [*SMALL, "--learning-rates", "1e-3"]
    with benchmarking(argv, out) as job:
        assert job.wait() == 0, job.console
        job.assert_nothing_left()
    case = replace(HABIT, num_rollout=2, learning_rates=(1e-3,))
    done = finished(out, Run(case=case, method="sampled", learning_rate=1e-3, seed=1))
    assert done is not None, job.console
    assert done.test_rows == 64
    assert [point.rollouts for point in done.points] == [0, 2]
    assert done.accuracy > done.start + 0.2
    assert done.points[-1].tokens > 2 * 32 * 20
    assert 0 < done.final_kl < 1
    assert 0 < done.final_sampled_accuracy < 1
    written = (out / "report.md").read_text()
    assert written in job.console
    assert learning.main(["--out", str(out), *argv, "--report-only"]) == 0
    assert (out / "report.md").read_text() == written


def test_an_interrupt_ends_everything(out):
    with benchmarking([*SMALL, "--rollouts", "1000"], out) as job:
        job.wait_until(lambda: len(list(out.glob("runs/*/metrics.jsonl"))) == 1, "no run began")
        worker = job.find("learning_curves.worker")
        job.interrupt()
        assert job.wait() == 130
        job.assert_nothing_left()
    assert "Go on with the same --out" in job.console
    assert not list(SHARED_FOLDERS[0].glob(f"slime-weights-{worker.pid}-*"))
