"""The pre-flight against a real SGLang server on a CPU: it passes, its cache hits, and faults are named."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from slime.engines.doctor.__main__ import main
from slime.engines.process import ServerProcess
from tests.contracts.doctor.support import TEACHER, Examine
from tests.contracts.reference import MODEL, Http, running_sglang
from tests.fakes.planting_proxy import planted
from tests.fakes.teacher_faults import PLANTED

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(600)]

SHARED_FAULTS = ("drops the picture", "expands pads itself", "is blind", "truncates", "starts one late")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("doctor") / "teacher.log"
    with running_sglang(TEACHER, log, role="teacher") as server:
        yield server


def test_it_is_healthy_without_a_warning(server: ServerProcess, examine: Examine) -> None:
    found = examine(server.url, more=("--max-tokens", "1000"))
    assert found.code == 0, found.printed
    assert {check["status"] for check in found.checks.values()} == {"pass"}, found.printed
    cache = found.checks["prefix-cache"]["values"]
    assert cache["cached_tokens"] == cache["prompt_tokens"] - 1
    assert found.checks["same-model"]["values"]["kl"] > 0.02


def test_it_as_its_own_student_has_nothing_to_learn(server: ServerProcess, examine: Examine) -> None:
    found = examine(server.url, student=TEACHER)
    assert found.code == 0, found.printed
    assert found.checks["same-model"]["fault"] == "same-weights"


@pytest.mark.parametrize("name", SHARED_FAULTS)
def test_a_planted_fault_is_named_as_before_our_engine(
    server: ServerProcess,
    examine: Examine,
    name: str,
) -> None:
    fault, check, fault_name = PLANTED[name]
    with planted(server.url, fault) as url:
        found = examine(url)
    assert (found.first_fault["check"], found.first_fault["fault"]) == (check, fault_name), found.printed
    assert found.code == 1


def test_a_pause_is_named(server: ServerProcess, examine: Examine) -> None:
    http = Http(server)
    http.control("/pause_generation", {"mode": "retract"})
    try:
        found = examine(server.url)
    finally:
        http.control("/continue_generation", {})
    assert found.faults == {"reachable": "paused"}


def test_the_server_outlives_the_examination_with_a_student_of_more_tokens(
    server: ServerProcess, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    argv = ["--teacher-url", server.url, "--student-path", str(MODEL)]
    assert main([*argv, "--json", str(tmp_path / "found.json")]) == 1
    assert "[vocabulary-small]" in capsys.readouterr().out
    assert Http(server)("/ready")[0] == 200
