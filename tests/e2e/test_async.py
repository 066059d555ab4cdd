"""One step off: the next rollout is generated while this one trains, and is learned from as what it is."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from slime.engines.process import ServerProcess
from tests.fakes.jobs import arguments, running, start_teacher

ROLLOUTS = 4
ENDLESS = ("--async-rollout", "--num-rollout", "1000", "--skip-eval-before-train")


@pytest.fixture(scope="module")
def ahead(data: dict[str, Path], teacher: ServerProcess, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run a job that generates ahead; return its output folder."""
    folder = tmp_path_factory.mktemp("ahead") / "run"
    flags = (
        *("--async-rollout", "--num-rollout", str(ROLLOUTS), "--eval-interval", "2"),
        *("--skip-eval-before-train", "--save-debug-rollout-data", str(folder / "rollouts")),
        *("--save", str(folder / "checkpoints"), "--save-interval", "2"),
    )
    with running(arguments(data, teacher.url, folder, *flags), folder) as job:
        assert job.wait() == 0, job.console
        job.assert_nothing_left()
    return folder


def records(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def rows(folder: Path, rollout_id: int) -> dict[str, list[Any]]:
    table = pq.read_table(folder / "rollouts" / f"rollout-{rollout_id:06d}.parquet")
    return table.select(["weight_versions", "group_index"]).to_pydict()


def spans(folder: Path) -> dict[tuple[str, int], tuple[float, float]]:
    """Return begin and end of each stage of each rollout, in microseconds."""
    events = json.loads((folder / "trace.json").read_text())
    staged = [event for event in events if event["ph"] == "X" and "rollout_id" in event["args"]]
    return {
        (event["name"], event["args"]["rollout_id"]): (event["ts"], event["ts"] + event["dur"])
        for event in staged
    }


def test_every_rollout_but_the_first_is_one_version_behind(ahead: Path):
    versions = [rows(ahead, number)["weight_versions"] for number in range(ROLLOUTS)]
    expected = ["0", "0", "1", "2"]
    assert versions == [[[version]] * 8 for version in expected]
    rollouts = [record for record in records(ahead) if "opd_reverse_kl" in record]
    assert [record["step"] for record in rollouts] == [1, 2, 3, 4]
    assert [record["rollout/steps_behind"] for record in rollouts] == [0, 1, 1, 1]
    assert [record["rollout/mixed_version_samples"] for record in rollouts] == [0] * ROLLOUTS


def test_the_lag_is_corrected_for(ahead: Path):
    first, *others = [record for record in records(ahead) if "opd_reverse_kl" in record]
    assert first["tis_weight_mean"] == pytest.approx(1, abs=1e-4)
    assert first["train_rollout_logprob_abs_diff"] < 1e-3
    for record in others:
        assert record["tis_weight_mean"] == pytest.approx(1, abs=0.2)
        assert record["train_rollout_logprob_abs_diff"] > first["train_rollout_logprob_abs_diff"]


def test_an_evaluation_sees_one_version_the_newest(ahead: Path):
    seen = [record for record in records(ahead) if "eval/weight_version" in record]
    assert [(record["rollout_id"], record["eval/weight_version"]) for record in seen] == [(2, 2), (4, 4)]


def test_the_trace_shows_generation_beside_training(ahead: Path):
    when = spans(ahead)
    assert set(when) >= {
        *((stage, number) for stage in ("rollout", "generation", "scoring", "shards") for number in range(4)),
        *((stage, number) for stage in ("train", "step", "wait for rollout", "wait for train")
          for number in range(3)),
        ("evaluation", 2),
    }  # fmt: skip
    # A busy machine may begin one late; that each is ordered before the training is the loop's own test.
    assert any(when["rollout", number + 1][0] < when["train", number][1] for number in range(ROLLOUTS - 1))
    for number, (begin, _) in ((number, when["rollout", number]) for number in range(2, ROLLOUTS)):
        assert begin > when["train", number - 2][1]
    for record in (record for record in records(ahead) if "opd_reverse_kl" in record):
        waits = record["perf/wait_for_rollout_seconds"] + record["perf/wait_for_train_seconds"]
        assert 0 < waits <= record["perf/step_seconds"]
        assert 0 <= record["perf/scoring_exposed_share"] <= 1


@pytest.mark.slow
def test_a_resumed_run_generates_the_rollout_that_was_not_trained_on_again(
    ahead: Path, data: dict[str, Path], teacher: ServerProcess, tmp_path: Path
):
    state = json.loads((ahead / "checkpoints" / "rollout-000002" / "state.json").read_text())
    assert state["rollout_id"] == 2
    folder = tmp_path / "resumed"
    flags = (
        *("--async-rollout", "--num-rollout", str(ROLLOUTS), "--skip-eval-before-train"),
        *("--load", str(ahead / "checkpoints" / "rollout-000002")),
        *("--save-debug-rollout-data", str(folder / "rollouts")),
    )
    with running(arguments(data, teacher.url, folder, *flags), folder) as job:
        assert job.wait() == 0, job.console
    for number in (2, 3):
        assert rows(folder, number)["group_index"] == rows(ahead, number)["group_index"]
    assert [rows(folder, number)["weight_versions"][0] for number in (2, 3)] == [["2"], ["2"]]


@pytest.mark.slow
def test_ctrl_c_ends_a_run_that_generates_and_trains_at_once(
    data: dict[str, Path], teacher: ServerProcess, tmp_path: Path
):
    folder = tmp_path / "run"
    with running(arguments(data, teacher.url, folder, *ENDLESS), folder) as job:
        job.wait_for(r"rollout +2/1000")
        job.interrupt()
        assert job.wait() == 130, job.console
        job.assert_nothing_left()
    assert "Traceback" not in job.console
    assert json.loads((folder / "trace.json").read_text())


@pytest.mark.slow
def test_a_teacher_that_dies_ends_a_run_that_trains_meanwhile(data: dict[str, Path], tmp_path: Path):
    folder = tmp_path / "run"
    flags = (
        "--async-rollout",
        "--num-rollout",
        "1000",
        "--skip-eval-before-train",
        "--teacher-patience",
        "5",
    )
    with (
        start_teacher(tmp_path / "teacher.log") as doomed,
        running(arguments(data, doomed.url, folder, *flags), folder) as job,
    ):
        job.wait_for(r"rollout +2/1000")
        os.kill(doomed.pid, signal.SIGKILL)
        assert job.wait() == 1, job.console
        job.assert_nothing_left()
    last = job.console.strip().splitlines()[-1]
    assert doomed.url in last
