"""However a run ends, it ends promptly, says why, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from slime.engines.process import ServerProcess
from tests.fakes.jobs import Job, arguments, running, start_teacher
from tests.fakes.processes import wait_until

MANY = ("--num-rollout", "1000", "--skip-eval-before-train")


def _wait_for_training(job: Job) -> None:
    job.wait_for(r"rollout +1/1000")


@pytest.mark.parametrize(
    ("number", "status"), [pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow), (signal.SIGTERM, 143)]
)
def test_a_signal_ends_everything(data, teacher: ServerProcess, tmp_path: Path, number, status):
    with running(arguments(data, teacher.url, tmp_path / "run", *MANY), tmp_path / "run") as job:
        _wait_for_training(job)
        if number == signal.SIGINT:
            job.interrupt()
        else:
            job.process.send_signal(number)
        assert job.wait() == status, job.console
        job.assert_nothing_left()
    assert "Traceback" not in job.console
    assert teacher.alive


def test_a_second_ctrl_c_does_not_cut_the_end_short(data, teacher, tmp_path):
    with running(arguments(data, teacher.url, tmp_path / "run", *MANY), tmp_path / "run") as job:
        job.wait_until(lambda: bool(job.shared_folders()), "Ray has not started")
        job.interrupt()
        time.sleep(0.5)
        job.interrupt()
        assert job.wait() == 130, job.console
        job.assert_nothing_left()


@pytest.mark.parametrize(
    "victim", ["ray::TrainActor", pytest.param("transformers_engine", marks=pytest.mark.slow)]
)
def test_a_dead_process_ends_the_run_with_its_name_and_log(data, teacher, tmp_path, victim):
    flags = (*MANY, "--engine-restarts", "0")
    with running(arguments(data, teacher.url, tmp_path / "run", *flags), tmp_path / "run") as job:
        _wait_for_training(job)
        os.kill(job.find(f"{victim}(?!.*supervisor)").pid, signal.SIGKILL)
        assert job.wait() == 1, job.console
        job.assert_nothing_left()
    expected = "train_0 died" if victim == "ray::TrainActor" else "student's engine"
    assert expected in job.console
    assert "log" in job.console


def test_a_killed_teacher_is_a_clear_error(data, tmp_path):
    patience = ("--teacher-patience", "4")
    with (
        start_teacher(tmp_path / "teacher.log") as doomed,
        running(arguments(data, doomed.url, tmp_path / "run", *MANY, *patience), tmp_path / "run") as job,
    ):
        _wait_for_training(job)
        os.kill(doomed.pid, signal.SIGKILL)
        assert job.wait() == 1, job.console
        job.assert_nothing_left()
    last = job.console.strip().splitlines()[-1]
    assert "teacher" in last
    assert doomed.url in last


@pytest.mark.slow
def test_a_killed_driver_takes_its_processes_along(data, teacher, tmp_path):
    with running(arguments(data, teacher.url, tmp_path / "run", *MANY), tmp_path / "run") as job:
        _wait_for_training(job)
        job.process.kill()
        job.process.wait()
        wait_until(lambda: not job.processes(), "processes outlive their driver")
