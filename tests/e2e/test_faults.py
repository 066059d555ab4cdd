"""Real faults in the running job: a teacher that hangs or talks nonsense, a killed worker, a full disk, a
kill in the middle of a save, a signal to the launcher. What is trained is kept, and what is wrong is said."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from slime.checkpoints import resume_point
from slime.engines.process import ServerProcess, free_port
from tests.fakes.jobs import Job, arguments, launched, running, start_teacher
from tests.fakes.planting_proxy import Fault, planted
from tests.fakes.processes import unread_bytes, wait_until
from tests.fakes.teacher_faults import HTML, Instead, Scores, shift_all, with_last

ROLLOUTS = 6
PLAIN = ("--num-rollout", str(ROLLOUTS), "--skip-eval-before-train")
HANG_SECONDS = 20.0
DISK_KILOBYTES = 6000
"""Room for one checkpoint of the tiny student, and not for two."""


def recorded(folder: Path) -> list[dict[str, float]]:
    """Return the metrics of the rollouts."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "opd_reverse_kl" in record]


def assert_every_rollout_once(folder: Path, rollouts: int = ROLLOUTS) -> None:
    records = recorded(folder)
    assert [record["rollout_id"] for record in records] == list(range(rollouts))
    assert [record["step"] for record in records] == list(range(1, rollouts + 1))
    assert all(record["samples"] == 8 for record in records)


@contextmanager
def hanging_teacher(data, folder: Path, *patience: str) -> Iterator[tuple[Job, ServerProcess]]:
    """Run a job whose teacher answers the first rollout and hangs over the second until the block ends."""
    with (
        start_teacher(folder.with_name("teacher.log")) as teacher,
        running(arguments(data, teacher.url, folder, *PLAIN, *patience), folder) as job,
    ):
        port, process = int(teacher.url.rsplit(":", 1)[1]), psutil.Process(teacher.pid)
        job.wait_for(rf"rollout +1/{ROLLOUTS}")
        process.suspend()
        job.wait_until(lambda: unread_bytes(port) > 0, "nothing was asked")
        yield job, teacher
        process.resume()
        job.wait()
        job.assert_nothing_left()


@pytest.mark.slow
def test_a_teacher_that_hangs_is_asked_again(data, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    patience = ("--teacher-timeout", "15", "--teacher-patience", "120")
    with hanging_teacher(data, folder, *patience) as (job, _):
        time.sleep(HANG_SECONDS)  # the first attempt runs out meanwhile
    assert job.wait() == 0, job.console
    assert_every_rollout_once(folder)
    assert max(record["perf/rollout_seconds"] for record in recorded(folder)) > HANG_SECONDS


@pytest.mark.slow
def test_a_teacher_that_hangs_for_good_is_a_clear_error(data, tmp_path: Path) -> None:
    patience = ("--teacher-timeout", "2", "--teacher-patience", "4")
    with hanging_teacher(data, tmp_path / "run", *patience) as (job, teacher):
        assert job.wait() == 1, job.console
    last = job.console.strip().splitlines()[-1]
    assert teacher.url in last
    assert "could not be scored" in last


GARBAGE = {
    "a page": (Instead(200, HTML, "text/html"), "AnswerError"),
    "an error": (Instead(500, "Internal Server Error"), "could not be scored"),
    "scores of other tokens": (Scores(shift_all), "MissingScoreError"),
    "NaN": (Scores(with_last(float("nan"))), "MissingScoreError"),
    "half an answer": (Scores(lambda body, triples: triples[:3]), "ShortScoresError"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", GARBAGE)
def test_a_teacher_that_answers_garbage_ends_the_run_before_a_wrong_gradient(
    data, teacher: ServerProcess, tmp_path: Path, name: str
) -> None:
    fault, said = GARBAGE[name]
    folder, patience = tmp_path / "run", ("--teacher-patience", "4")
    with (
        planted(teacher.url, Sane(fault, requests=8)) as url,
        running(arguments(data, url, folder, *PLAIN, *patience), folder) as job,
    ):
        assert job.wait() == 1, job.console
        job.assert_nothing_left()
    assert said in job.console.strip().splitlines()[-1]
    assert len(recorded(folder)) == 1


class Sane(Fault):
    """A fault that begins after so many answers: those of the first rollout are right."""

    def __init__(self, fault: Fault, requests: int) -> None:
        self.fault, self.left = fault, requests

    async def instead(self, request, body):
        if body is not None:
            self.left -= 1
        return await self.fault.instead(request, body) if self.left < 0 else None

    def answer(self, body, answer):
        return self.fault.answer(body, answer) if self.left < 0 else answer


@pytest.mark.slow
def test_garbage_can_be_masked_and_is_counted(data, teacher: ServerProcess, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    mask = ("--opd-misaligned", "mask", "--opd-max-failed-frac", "0.5", "--num-rollout", "2")
    with (
        planted(teacher.url, EveryFourth(Scores(shift_all))) as url,
        running(arguments(data, url, folder, *PLAIN, *mask), folder) as job,
    ):
        assert job.wait() == 0, job.console
        job.assert_nothing_left()
    for record in recorded(folder):
        assert record["teacher/misaligned_samples"] == 2
        assert record["samples"] == 6


class EveryFourth(Fault):
    """A fault in one of four answers."""

    def __init__(self, fault: Fault) -> None:
        self.fault, self.answers = fault, 0

    def answer(self, body, answer):
        self.answers += 1
        return self.fault.answer(body, answer) if self.answers % 4 == 0 else answer


@pytest.mark.slow
def test_a_killed_ray_worker_ends_the_run_with_its_name_and_log(data, teacher, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with running(arguments(data, teacher.url, folder, "--num-rollout", "1000"), folder) as job:
        job.wait_for("rollout +1/1000")
        job.find("ray::RolloutActor").kill()
        assert job.wait(60) == 1, job.console
        job.assert_nothing_left()
    assert "rollout died" in job.console
    assert "rollout.log" in job.console


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of a few megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_KILOBYTES}k", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs the right to mount a tmpfs: {error}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_said_and_the_old_checkpoint_is_whole(
    data, teacher, tmp_path: Path, small_disk: Path
) -> None:
    folder, save = tmp_path / "run", small_disk / "checkpoints"
    flags = (*PLAIN, "--save", str(save), "--save-interval", "1")
    with running(arguments(data, teacher.url, folder, *flags), folder) as job:
        assert job.wait() == 1, job.console
        job.assert_nothing_left()
    assert f"What 2 rollouts have taught could not be written to {save}" in job.console
    assert "The newest whole checkpoint is" in job.console
    point = resume_point(str(save))
    assert point.checkpoint == save / "rollout-000001"
    assert point.note is None
    assert [path.name for path in save.iterdir() if "partial" in path.name] == []
    with running(arguments(data, teacher.url, folder, *PLAIN, "--load", str(save)), folder) as job:
        assert job.wait() == 0, job.console
    assert_every_rollout_once(folder)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["ray::TrainActor", r"-m slime\.train"])
def test_a_kill_in_the_middle_of_a_save_costs_what_was_not_saved(
    data, teacher, tmp_path: Path, victim: str
) -> None:
    folder, save = tmp_path / "run", tmp_path / "checkpoints"
    flags = (*PLAIN, "--save", str(save), "--save-interval", "1")
    with running(arguments(data, teacher.url, folder, *flags), folder) as job:
        job.wait_for(rf"rollout +2/{ROLLOUTS}")
        kill_while_it_saves(job, job.find(victim), save)
        assert job.wait() != 0, job.console
        wait_until(lambda: not job.processes(), "the killed run's processes end")
    left = [path.name for path in save.iterdir() if path.name.endswith(".partial")]
    done = resume_point(str(save)).state.rollout_id
    # A driver that lives clears up where the trainer died writing; after that, on the way to the engines, it
    # is the next save that does.
    cleared = f"What {done + 1} rollouts have taught could not be written" in job.console
    assert left == ([] if cleared else [f".rollout-{done + 1:06d}.partial"])
    with running(arguments(data, teacher.url, folder, *flags, "--load", str(save)), folder) as job:
        assert job.wait() == 0, job.console
        job.assert_nothing_left()
    assert f"(rollout {done} of {ROLLOUTS})" in job.console
    assert_every_rollout_once(folder)
    assert not list(save.glob(".*"))


def kill_while_it_saves(job: Job, process: psutil.Process, save: Path) -> None:
    """Kill a process with SIGKILL while a checkpoint is half written: stopped first, to be sure of it."""

    def stopped_in_time() -> bool:
        if not list(save.glob(".rollout-*.partial")):
            return False
        process.suspend()
        if list(save.glob(".rollout-*.partial")):
            return True
        process.resume()
        return False

    while not stopped_in_time():
        assert job.process.poll() is None, job.console
    process.kill()


@pytest.mark.parametrize("extra", ["", pytest.param("--colocate", marks=pytest.mark.slow)])
def test_a_signal_to_the_launcher_saves_and_the_same_command_goes_on(
    data, tmp_path: Path, extra: str
) -> None:
    folder = tmp_path / "run"
    flags = f"--skip-eval-before-train --train-threads 1 --save-interval 100 {extra}"
    knobs = {"SKIP_DOCTOR": "1", "EXTRA_ARGS": flags, "NUM_ROLLOUT": "1000", "EVAL_INTERVAL": "1000"}
    with launched(folder, data["train"].parent, knobs | {"TEACHER_PORT": str(free_port())}) as job:
        job.wait_for("rollout +2/1000")
        job.driver_pid = job.find(r"-m slime\.train").pid
        job.process.terminate()
        assert job.wait() == 143, job.console
        job.assert_nothing_left()
    done = len(recorded(folder))
    assert done >= 2
    assert f"saving what {done} rollouts have taught" in job.console
    assert resume_point(str(folder / "checkpoints")).state.rollout_id == done
    knobs |= {"NUM_ROLLOUT": str(done + 2), "TEACHER_PORT": str(free_port())}
    with launched(folder, data["train"].parent, knobs) as job:
        assert job.wait() == 0, job.console
    assert f"(rollout {done}" in job.console
    assert_every_rollout_once(folder, done + 2)
