"""A server killed under its requests costs a run nothing: a teacher, the launcher's own or one of two
replicas, and an engine of the student's, one of two or the only one."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import psutil
import pytest

from slime.engines.process import free_port
from tests.fakes.jobs import arguments, launched, running, start_teacher
from tests.fakes.processes import kill_with_requests

DRIVER = r"-m slime\.train"
ROLLOUTS = 6
SAMPLES = 8
"""Of one rollout: 4 prompts by 2 answers."""


def rollout_records(folder: Path) -> list[dict[str, float]]:
    """Return the metrics of the rollouts, after checking that every one of them is there, once."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rollouts = [record for record in records if "opd_reverse_kl" in record]
    assert [record["rollout_id"] for record in rollouts] == list(range(ROLLOUTS))
    assert [record["step"] for record in rollouts] == list(range(1, ROLLOUTS + 1))
    return rollouts


def assert_nothing_lost(folder: Path) -> None:
    """Every sample of every rollout is scored: none missing, none masked."""
    for record in rollout_records(folder):
        assert record["samples"] == SAMPLES
        assert record["teacher/failed_samples"] == 0
        assert record["teacher/misaligned_samples"] == 0
        assert record["teacher/aligned_frac"] == 1
        assert math.isfinite(record["opd_kl_loss"])


def test_the_launchers_teacher_is_killed_twice_and_the_run_loses_nothing(data, tmp_path: Path):
    """First as it answers the evaluation at the start, then as it scores a rollout."""
    folder, port = tmp_path / "run", free_port()
    flags = "--skip-eval-before-train --train-threads 1"
    knobs = {"SKIP_DOCTOR": "1", "TEACHER_PORT": str(port), "NUM_ROLLOUT": str(ROLLOUTS), "EXTRA_ARGS": flags}
    with launched(folder, data["train"].parent, knobs) as job:
        job.wait_until(lambda: bool(job.find_all(DRIVER)), "training has not started")
        job.driver_pid = job.find(DRIVER).pid
        for kills in (1, 2):
            teacher = job.find(rf"transformers_engine .*--port {port}\b")
            kill_with_requests(teacher, port, lambda: job.process.poll() is None)
            job.wait_for(rf"\(status 137\) in the middle of the run; restart {kills} of 3")
            job.wait_until(lambda kills=kills: job.console.count("ready again.") == kills, "not ready again")
            job.wait_for(rf"rollout +1/{ROLLOUTS}")
        assert job.wait() == 0, job.console
        job.assert_nothing_left()
    assert_nothing_lost(folder)
    assert "teacher_eval/accuracy" in (folder / "metrics.jsonl").read_text()


@pytest.mark.slow
def test_one_of_two_replicas_is_killed_and_the_other_does_its_work(data, teacher, tmp_path: Path):
    folder = tmp_path / "run"
    with start_teacher(tmp_path / "doomed.log") as doomed:
        port = int(doomed.url.rsplit(":", 1)[1])
        url = f"{doomed.url}/generate"
        flags = ("--rm-url", url, "--num-rollout", str(ROLLOUTS), "--skip-eval-before-train")
        with running(arguments(data, teacher.url, folder, *flags), folder) as job:
            job.wait_for(rf"rollout +1/{ROLLOUTS}")
            kill_with_requests(psutil.Process(doomed.pid), port, lambda: job.process.poll() is None)
            assert job.wait() == 0, job.console
            job.assert_nothing_left()
    assert teacher.alive
    assert_nothing_lost(folder)


@pytest.mark.parametrize(
    "engines",
    [
        ("--rollout-num-gpus", "2"),
        pytest.param(("--rollout-num-gpus", "1"), marks=pytest.mark.slow),
        pytest.param(("--colocate",), marks=pytest.mark.slow),
    ],
    ids=["two", "one", "colocated"],
)
def test_a_killed_engine_is_started_anew_with_the_current_weights(
    data, teacher, tmp_path: Path, engines: tuple[str, ...]
):
    """With another beside it the rollout goes on there; the only one's rollout is made once more."""
    folder = tmp_path / "run"
    flags = ("--num-rollout", str(ROLLOUTS), "--skip-eval-before-train", *engines)
    flags = (*flags, "--check-weight-sync", "every")
    with running(arguments(data, teacher.url, folder, *flags), folder) as job:
        job.wait_for(rf"rollout +1/{ROLLOUTS}")
        victim = job.find_all(r"transformers_engine (?!.*supervisor)")[0]
        port = int(re.search(r"--port (\d+)", " ".join(victim.cmdline())).group(1))  # type: ignore[union-attr]
        kill_with_requests(victim, port, lambda: job.process.poll() is None)
        assert job.wait() == 0, job.console
        job.assert_nothing_left()
    assert "ended with exit status 137 in the middle of the run; restart 1 of 3" in job.console
    assert_nothing_lost(folder)
    records = rollout_records(folder)
    assert records[0]["rollout/engine_restarts"] == 0
    assert records[-1]["rollout/engine_restarts"] == 1
    assert all(record["sync/logprob_abs_diff"] < 1e-3 for record in records)
    assert all(record["rollout/mixed_version_samples"] == 0 for record in records)
