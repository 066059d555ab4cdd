"""The launcher's processes, played by stand-ins: it ends what it started, on every path, and nothing else."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from slime.engines.process import free_port
from tests.fakes.launcher import Machine
from tests.fakes.processes import PATIENCE_SECONDS, ended, wait_until

TEACHER = "slime.engines.transformers_engine"
DOCTOR = "slime.engines.doctor"
DRIVER = "slime.train"


def assert_ended(pids: Iterable[int]) -> None:
    """Fail where a process of a launcher that is gone lives on; one that was killed may need a moment."""
    left = list(pids)
    wait_until(lambda: all(ended(pid) for pid in left), f"processes {left} end")


def nothing_listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.fixture
def bystander(machine: Machine) -> Iterator[subprocess.Popen[bytes]]:
    """A teacher of somebody else, started with the same words."""
    process = subprocess.Popen(
        [str(Path(machine.environment["VIRTUAL_ENV"]) / "bin" / "python"), "-m", TEACHER],
        env=machine.environment | {"TEACHER_PLAYS": "sleep"},
    )
    wait_until(lambda: machine.pids(TEACHER) == [process.pid], "the bystander starts")
    yield process
    process.kill()
    process.wait()


def launch(
    machine: Machine,
    *,
    teacher: str = "serve",
    doctor: str = "succeed",
    driver: str = "succeed",
    **knobs: str,
) -> subprocess.Popen[str]:
    """Start the launcher with a teacher, a doctor and a driver that behave as told."""
    knobs = {"TEACHER_PORT": str(free_port()), "OUTPUT_DIR": str(machine.root / "out")} | knobs
    plays = {"TEACHER_PLAYS": teacher, "DOCTOR_PLAYS": doctor, "DRIVER_PLAYS": driver}
    machine.environment |= plays
    return machine.start(SKIP_SETUP="1", **machine.local() | knobs)


def test_a_run_that_succeeds_leaves_nothing_but_its_output_folder(
    machine: Machine, bystander: subprocess.Popen[bytes]
) -> None:
    port = free_port()
    launcher = launch(machine, TEACHER_PORT=str(port))
    stdout, stderr = launcher.communicate(timeout=PATIENCE_SECONDS)
    assert launcher.returncode == 0, stderr
    assert stdout.splitlines()[0] == stdout.splitlines()[-1] == f"Output folder: {machine.root}/out"
    assert_ended([*machine.pids(TEACHER)[1:], *machine.pids(DRIVER)])
    assert nothing_listens(port)
    assert bystander.poll() is None
    link = machine.root / "teacher_sglang_out.log"
    assert link.resolve() == (machine.root / "out" / "logs" / "teacher_transformers.log").resolve()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_teacher_and_driver_with_all_their_children(
    machine: Machine, bystander: subprocess.Popen[bytes], number: signal.Signals, status: int
) -> None:
    launcher = launch(machine, driver="sleep with a child that ignores SIGTERM")
    wait_until(lambda: machine.pids("child"), "the driver starts")
    started = [*machine.pids(TEACHER)[1:], *machine.pids(DRIVER), *machine.pids("child")]
    assert len(started) == 3
    launcher.send_signal(number)
    launcher.communicate(timeout=PATIENCE_SECONDS)
    assert launcher.returncode == status
    assert_ended(started)
    assert bystander.poll() is None


def test_a_signal_while_the_teacher_starts_ends_it(machine: Machine) -> None:
    launcher = launch(machine, teacher="sleep")
    wait_until(lambda: machine.pids(TEACHER), "the teacher starts")
    launcher.terminate()
    launcher.communicate(timeout=PATIENCE_SECONDS)
    assert launcher.returncode == 143
    assert_ended(machine.pids(TEACHER))
    assert not machine.pids(DRIVER)


def test_a_driver_that_fails_fails_the_launcher(machine: Machine) -> None:
    launcher = launch(machine, driver="fail")
    _, stderr = launcher.communicate(timeout=PATIENCE_SECONDS)
    assert launcher.returncode == 1
    assert "training ended with status 3" in stderr
    assert_ended(machine.pids(TEACHER))


def test_a_teacher_that_cannot_start_shows_the_end_of_its_log(machine: Machine) -> None:
    launcher = launch(machine, teacher="fail")
    _, stderr = launcher.communicate(timeout=PATIENCE_SECONDS)
    assert launcher.returncode == 1
    assert "the stand-in fails on purpose" in stderr
    assert "ended before it was ready" in stderr
    assert not machine.pids(DRIVER)


def test_a_teacher_that_is_not_ready_in_time_is_ended(machine: Machine) -> None:
    launcher = launch(machine, teacher="sleep", TEACHER_TIMEOUT="1")
    _, stderr = launcher.communicate(timeout=PATIENCE_SECONDS)
    assert launcher.returncode == 1
    assert "was not ready after 1 s" in stderr
    assert_ended(machine.pids(TEACHER))


@pytest.mark.parametrize(
    ("teacher", "restarts", "sentence"),
    [
        ("serve", "0", "(status 137) in the middle of the run, and its restarts are used up (0 of 0"),
        ("serve; fail", "2", "(status 3) in the middle of the run, and its restarts are used up (2 of 2"),
    ],
    ids=["none is allowed", "none succeeds"],
)
def test_a_teacher_that_dies_for_good_ends_the_run(
    machine: Machine, teacher: str, restarts: str, sentence: str
) -> None:
    launcher = launch(machine, teacher=teacher, driver="sleep", TEACHER_RESTARTS=restarts)
    wait_until(lambda: machine.pids(DRIVER), "the driver starts")
    os.kill(machine.pids(TEACHER)[0], signal.SIGKILL)
    stdout, stderr = launcher.communicate(timeout=PATIENCE_SECONDS)
    assert launcher.returncode == 1
    assert sentence in stderr
    assert stdout.count("; restart ") == int(restarts)
    assert len(machine.pids(TEACHER)) == 1 + int(restarts)
    assert_ended([*machine.pids(TEACHER), *machine.pids(DRIVER)])


def test_a_teacher_that_dies_is_started_anew_and_the_run_goes_on(machine: Machine) -> None:
    """Killed with a child left behind, failing once more as it starts, then killed again: three restarts."""
    teacher, driver = "serve with a child; fail; serve with a child", "end on a signal of the test"
    machine.environment["STOP_GRACE_SECONDS"] = "60"  # what is left of a teacher must have ended by then
    launcher = launch(machine, teacher=teacher, driver=driver)
    log = machine.root / "out" / "logs" / "teacher_transformers.log"
    for starts, children in ((1, 1), (3, 2)):
        wait_until(lambda: machine.pids(DRIVER), "the driver starts")
        wait_until(lambda starts=starts: len(machine.pids(TEACHER)) == starts, "the teacher starts")
        wait_until(lambda children=children: len(machine.pids("child")) == children, "it has its child")
        os.kill(machine.pids(TEACHER)[-1], signal.SIGKILL)
    wait_until(lambda: len(machine.pids(TEACHER)) == 4, "the teacher starts a last time")
    assert all(ended(pid) for pid in machine.pids("child")[:2])
    assert not ended(machine.pids(DRIVER)[0])
    machine.let_end()
    stdout, stderr = launcher.communicate(timeout=PATIENCE_SECONDS)
    assert launcher.returncode == 0, stderr
    announced = [line for line in stdout.splitlines() if "; restart " in line]
    for line, status, number in zip(announced, (137, 3, 137), (1, 2, 3), strict=True):
        assert f"ended (status {status})" in line
        assert f"restart {number} of 3. Its log goes on in {log}" in line
    assert "the stand-in fails on purpose" in stderr
    assert len(set(machine.starts(TEACHER))) == 1
    assert_ended([*machine.pids(TEACHER), *machine.pids("child")])


def test_a_teacher_is_not_started_anew_while_its_port_is_taken(machine: Machine) -> None:
    port = free_port()
    machine.environment["REST_SECONDS"] = "1"
    launcher = launch(machine, driver="sleep", TEACHER_PORT=str(port))
    wait_until(lambda: machine.pids(DRIVER), "the driver starts")
    with socket.socket() as taken:
        # As a process that outlived the teacher's would, this one listens before the launcher looks.
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        launcher.send_signal(signal.SIGSTOP)
        os.kill(machine.pids(TEACHER)[0], signal.SIGKILL)
        wait_until(lambda: nothing_listens(port), "the port is free")
        taken.bind(("127.0.0.1", port))
        taken.listen()
        launcher.send_signal(signal.SIGCONT)
        _, stderr = launcher.communicate(timeout=PATIENCE_SECONDS)
    assert launcher.returncode == 1
    assert f"port {port} is taken" in stderr
    assert len(machine.pids(TEACHER)) == 1


def test_a_restarted_teacher_that_is_not_ready_in_time_ends_the_run(machine: Machine) -> None:
    launcher = launch(machine, teacher="serve; sleep", driver="sleep", TEACHER_TIMEOUT="10")
    wait_until(lambda: machine.pids(DRIVER), "the driver starts")
    os.kill(machine.pids(TEACHER)[0], signal.SIGKILL)
    _, stderr = launcher.communicate(timeout=PATIENCE_SECONDS)
    assert launcher.returncode == 1
    assert "was not ready again within 10 s (SLIME_SCRIPT_TEACHER_TIMEOUT)" in stderr
    assert_ended([*machine.pids(TEACHER), *machine.pids(DRIVER)])


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_a_restart_is_under_way_ends_everything(
    machine: Machine, number: signal.Signals, status: int
) -> None:
    launcher = launch(machine, teacher="serve; sleep", driver="sleep with a child that ignores SIGTERM")
    wait_until(lambda: machine.pids("child"), "the driver starts")
    os.kill(machine.pids(TEACHER)[0], signal.SIGKILL)
    wait_until(lambda: len(machine.pids(TEACHER)) == 2, "the teacher starts again")
    launcher.send_signal(number)
    launcher.communicate(timeout=PATIENCE_SECONDS)
    assert launcher.returncode == status
    assert_ended([*machine.pids(TEACHER), *machine.pids(DRIVER), *machine.pids("child")])


@pytest.mark.parametrize(("driver", "status"), [("end on a signal of the test", 0), ("fail later", 1)])
def test_training_that_ends_while_the_teacher_is_away_ends_the_run(
    machine: Machine, driver: str, status: int
) -> None:
    launcher = launch(machine, teacher="serve; sleep", driver=driver)
    wait_until(lambda: machine.pids(DRIVER), "the driver starts")
    os.kill(machine.pids(TEACHER)[0], signal.SIGKILL)
    wait_until(lambda: len(machine.pids(TEACHER)) == 2, "the teacher starts again")
    machine.let_end()
    _, stderr = launcher.communicate(timeout=PATIENCE_SECONDS)
    assert launcher.returncode == status, stderr
    assert ("training ended with status 3" in stderr) == (status == 1)
    assert_ended(machine.pids(TEACHER))


def test_the_pre_flight_comes_between_teacher_and_training_and_a_fault_ends_the_run(machine: Machine) -> None:
    launcher = launch(machine, doctor="fail")
    stdout, stderr = launcher.communicate(timeout=PATIENCE_SECONDS)
    assert launcher.returncode == 1
    assert "The teacher is ready." in stdout
    assert "the stand-in fails on purpose" in stdout
    assert "did not pass the pre-flight" in stderr
    assert not machine.pids(DRIVER)
    assert_ended(machine.pids(TEACHER))


def test_a_teacher_that_dies_in_the_pre_flight_shows_the_end_of_its_log(machine: Machine) -> None:
    launcher = launch(machine, doctor="fail later")
    wait_until(lambda: machine.pids(DOCTOR), "the doctor starts")
    os.kill(machine.pids(TEACHER)[0], signal.SIGKILL)
    wait_until(lambda: ended(machine.pids(TEACHER)[0]), "the teacher is gone")
    machine.let_end()
    _, stderr = launcher.communicate(timeout=PATIENCE_SECONDS)
    assert launcher.returncode == 1
    assert "--- last lines of" in stderr
    assert not machine.pids(DRIVER)


def test_the_pre_flight_can_be_left_out(machine: Machine) -> None:
    launcher = launch(machine, doctor="fail", SKIP_DOCTOR="1")
    _, stderr = launcher.communicate(timeout=PATIENCE_SECONDS)
    assert launcher.returncode == 0, stderr
    assert not machine.pids(DOCTOR)


def test_a_taken_port_is_an_error_that_names_the_variable(machine: Machine) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        launcher = launch(machine, TEACHER_PORT=str(taken.getsockname()[1]))
        _, stderr = launcher.communicate(timeout=PATIENCE_SECONDS)
    assert launcher.returncode == 1
    assert "SLIME_SCRIPT_TEACHER_PORT" in stderr
    assert not machine.pids(TEACHER)


def test_a_teacher_elsewhere_that_fails_the_pre_flight_is_found_before_the_driver_starts(
    machine: Machine,
) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    launcher = launch(machine, doctor="fail", TEACHER_URL=url)
    _, stderr = launcher.communicate(timeout=PATIENCE_SECONDS)
    assert launcher.returncode == 1
    assert f"SLIME_SCRIPT_TEACHER_URL={url}" in stderr
    assert not machine.pids(TEACHER)
    assert not machine.pids(DRIVER)


def test_a_failing_download_ends_the_run_before_any_server(machine: Machine) -> None:
    program = Path(machine.environment["VIRTUAL_ENV"]) / "bin" / "hf"
    program.write_text(f"#!{sys.executable}\nimport sys; sys.exit('no such repository')\n")
    program.chmod(0o755)
    launcher = launch(machine, STUDENT_MODEL="nobody/nothing")
    stdout, stderr = launcher.communicate(timeout=PATIENCE_SECONDS)
    assert launcher.returncode == 1
    assert "Downloading nobody/nothing" in stdout
    assert "no such repository" in stderr
    assert not machine.pids(TEACHER)
