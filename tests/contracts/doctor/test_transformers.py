"""The pre-flight against a live teacher: healthy ones pass, and every planted fault is named.

The teacher is our transformers engine with the tiny checkpoint; a proxy in front of it plants one fault at a
time, so that all else in the answers is real.
"""

import json
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from slime.engines.doctor import examination
from slime.engines.doctor.__main__ import main
from slime.engines.process import ServerProcess, free_port, start_server
from slime.tiny.paths import checkpoint_path
from tests.contracts.doctor.support import TEACHER, Examine
from tests.contracts.reference import Http
from tests.fakes.impatience import time_is_out_when
from tests.fakes.planting_proxy import Fault, Json, planted
from tests.fakes.teacher_faults import (
    PLANTED,
    Hang,
    HidesPause,
    Keyed,
    Scores,
    TakesNoText,
    TextOnly,
    WithoutTokenIds,
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("doctor") / "teacher.log"
    with start_server("transformers", str(TEACHER), free_port(), log, role="teacher") as server:
        server.wait_ready(300)
        yield server


# ---- healthy teachers ----


def test_a_healthy_teacher_passes_every_check(server: ServerProcess, examine: Examine) -> None:
    found = examine(server.url, more=("--max-tokens", "1000"))
    assert found.code == 0, found.printed
    assert found.healthy
    warned = [name for name, check in found.checks.items() if check["status"] == "warn"]
    assert warned == ["prefix-cache"]  # this engine keeps none
    assert found.skipped() == []
    # Of a few sampled responses: 0.9 to 5 were seen, of text alone 0.27 to 0.8; the same model has < 1e-3.
    assert found.checks["same-model"]["values"]["kl"] > 0.02
    assert found.checks["sees"]["values"]["largest"] > 1.0
    lines = found.printed.splitlines()
    assert len(lines) == len(found.checks) + 1
    assert all(line.split()[0] in ("pass", "warn") for line in lines[:-1])


def test_the_url_may_have_its_path(server: ServerProcess, examine: Examine) -> None:
    assert examine(f"{server.url}/generate").code == 0


def test_a_teacher_that_is_the_student_has_nothing_to_teach(server: ServerProcess, examine: Examine) -> None:
    found = examine(server.url, student=TEACHER)
    assert found.code == 0
    assert found.checks["same-model"]["fault"] == "same-weights"
    assert found.checks["same-model"]["values"]["kl"] < 1e-3


def test_without_a_student_the_teacher_alone_is_examined(server: ServerProcess, examine: Examine) -> None:
    found = examine(server.url, student=None)
    assert found.code == 0
    assert found.skipped() == ["chat-template", "image-processor", "same-model"]


def test_replicas_are_examined_each_and_held_against_each_other(
    server: ServerProcess, examine: Examine
) -> None:
    with planted(server.url, Fault()) as other:
        found = examine(server.url, other)
    assert found.code == 0, found.printed
    assert found.checks["replicas"]["status"] == "pass"
    assert found.printed.count("reachable") == 2


def test_one_bad_replica_is_a_fault_of_the_whole(server: ServerProcess, examine: Examine) -> None:
    nobody = f"http://127.0.0.1:{free_port()}"
    found = examine(server.url, nobody)
    assert found.code == 1
    assert f"FAULT  {nobody.removeprefix('http://')}  reachable        [refused]" in found.printed


def test_a_text_only_teacher_passes_where_no_prompt_has_a_picture(
    server: ServerProcess, examine: Examine
) -> None:
    with planted(server.url, TextOnly()) as url:
        found = examine(url, more=("--text-only",))
    assert found.code == 0, found.printed
    assert found.skipped() == ["image-processor", "image-receipt", "image-sizes", "sees"]
    assert found.checks["same-model"]["values"]["kl"] > 0.02


def test_a_text_only_teacher_of_a_text_only_student_passes(tmp_path: Path, examine: Examine) -> None:
    teacher, student = checkpoint_path("text_teacher"), checkpoint_path("text_student")
    with start_server("transformers", str(teacher), free_port(), tmp_path / "log", role="teacher") as server:
        server.wait_ready(300)
        found = examine(server.url, student=student)
    assert found.code == 0, found.printed
    assert [name for name, check in found.checks.items() if check["status"] == "warn"] == ["prefix-cache"]
    assert found.skipped() == ["image-processor", "image-receipt", "image-sizes", "sees"]
    assert found.checks["same-model"]["values"]["kl"] > 0.02


def test_a_hub_name_is_not_compared_and_that_is_said(server: ServerProcess, examine: Examine) -> None:
    class HubName(Fault):
        def page(self, path: str, page: Json) -> Json:
            return page | {"model_path": "some/teacher", "tokenizer_path": "some/teacher"}

    with planted(server.url, HubName()) as url:
        found = examine(url)
        alone = examine(url, student=None)
    assert found.code == 0, found.printed
    for name in ("vocabulary", "chat-template", "image-processor"):
        assert found.checks[name]["fault"] == "files-unread"
    assert alone.faults == {"model": "no-checkpoint"}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_named(server: ServerProcess, examine: Examine, name: str) -> None:
    fault, check, fault_name = PLANTED[name]
    with planted(server.url, fault) as url:
        found = examine(url, more=("--max-tokens", "600"))
    assert found.code == 1, found.printed
    assert (found.first_fault["check"], found.first_fault["fault"]) == (check, fault_name), found.printed
    assert found.first_fault["message"]
    assert found.first_fault["remedy"], found.printed
    assert f"[{fault_name}]" in found.printed


# ---- faults that need more than a proxy ----


def test_a_paused_teacher_is_named(server: ServerProcess, examine: Examine) -> None:
    http = Http(server)
    http.control("/pause_generation", {"mode": "retract"})
    try:
        found = examine(server.url)
    finally:
        http.control("/continue_generation", {})
    assert found.faults == {"reachable": "paused"}


@pytest.mark.parametrize(("fault", "name"), [(Hang(), "hangs"), (HidesPause(), "paused")])
def test_a_teacher_that_hangs_ends_the_examination(
    server: ServerProcess, examine: Examine, monkeypatch: pytest.MonkeyPatch, fault: Hang, name: str
) -> None:
    time_is_out_when(monkeypatch, lambda: fault.asked)
    with planted(server.url, fault) as url:
        found = examine(url)
    assert found.faults == {"vocabulary": name}
    assert {"chat-template", "latency"} <= set(found.skipped())


def test_addresses_where_nothing_is_are_told_apart(examine: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    look_up = socket.getaddrinfo

    def unknown(host: Any, *args: Any, **options: Any) -> Any:
        """Without a network it can take a minute to learn that."""
        if host == "no-such-host.invalid":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return look_up(host, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert examine(f"http://127.0.0.1:{free_port()}").faults == {"reachable": "refused"}
    assert examine("http://no-such-host.invalid:1").faults == {"reachable": "unknown-host"}


def test_a_port_that_speaks_no_http_is_told_apart(examine: Examine) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def greet() -> None:
            connection, _ = listening.accept()
            connection.recv(2**16)
            connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")
            connection.close()

        thread = threading.Thread(target=greet)
        thread.start()
        found = examine(f"http://127.0.0.1:{listening.getsockname()[1]}")
        thread.join()
    assert found.faults == {"reachable": "no-http"}


def test_keys(server: ServerProcess, examine: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    with planted(server.url, Keyed()) as url:
        monkeypatch.setenv("SLIME_ENGINE_API_KEY", "guessed")
        wrong = examine(url)
        monkeypatch.setenv("SLIME_ENGINE_API_KEY", "right")
        right = examine(url)
    assert wrong.faults == {"model": "wrong-key"}
    assert right.code == 0, right.printed
    assert "right" not in right.printed + json.dumps(right.checks)


def test_a_teacher_of_another_kind_is_named_by_its_files(
    server: ServerProcess, examine: Examine, tmp_path: Path
) -> None:
    folder = tmp_path / "teacher"
    shutil.copytree(TEACHER, folder)
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("assistant\\n", "assistant\\n<think>"))
    processor = folder / "preprocessor_config.json"
    processor.write_text(json.dumps(json.loads(processor.read_text()) | {"image_mean": [0.4, 0.5, 0.5]}))
    found = examine(server.url, more=("--teacher-path", str(folder)))
    assert found.faults == {"chat-template": "template-differs", "image-processor": "processor-differs"}

    allowed = ("--allow", "chat-template", "--allow", "image-processor")
    found = examine(server.url, more=("--teacher-path", str(folder), *allowed))
    assert found.code == 0
    assert found.checks["chat-template"]["status"] == "warn"


def test_replicas_of_other_weights_are_named(server: ServerProcess, examine: Examine) -> None:
    def other(body: Json, triples: list[list[Any]]) -> list[list[Any]]:
        return [[value and value - 0.5, *rest] for value, *rest in triples]

    with planted(server.url, Scores(other)) as url:
        found = examine(server.url, url, more=("--allow", "generation"))
    assert found.checks["replicas"]["fault"] == "replicas-differ"
    assert found.code == 1


# ---- the command line ----


@pytest.mark.parametrize(
    ("argv", "shown"),
    [
        ([], "--teacher-url"),
        (["--teacher-url", "localhost:3000"], "http://HOST:PORT"),
        (["--teacher-url", "http://127.0.0.1:1", "--max-tokens", "0"], "--max-tokens"),
        (["--teacher-url", "http://127.0.0.1:1", "--allow", "everything"], "--allow"),
    ],
)
def test_bad_usage_exits_with_2(capsys: pytest.CaptureFixture[str], argv: list[str], shown: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert shown in capsys.readouterr().err


def test_a_student_that_is_not_there_is_bad_usage(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--teacher-url", "http://127.0.0.1:1", "--student-path", str(tmp_path / "none")]) == 2
    assert "--student-path" in capsys.readouterr().err


@pytest.mark.parametrize("fault", [WithoutTokenIds(), TakesNoText()])
def test_a_server_whose_tokenizer_cannot_be_asked_is_examined_by_its_files(
    server: ServerProcess, examine: Examine, fault: Fault
) -> None:
    with planted(server.url, fault) as url:
        found = examine(url)
    assert found.code == 0, found.printed
    assert found.checks["vocabulary"]["fault"] == "tokenizer-unseen"
    assert found.checks["text-receipt"]["status"] == "pass"


def test_a_slow_teacher_is_not_waited_for_forever(
    server: ServerProcess, examine: Examine, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow(Fault):
        """Takes a minute for its third answer, by the examination's clock."""

        asked = 0

        def request(self, body: Json) -> Json:
            self.asked += 1
            return body

    slow = Slow()
    clock = SimpleNamespace(monotonic=lambda: 60.0 if slow.asked >= 3 else 0.0)
    monkeypatch.setattr(examination, "time", clock)
    with planted(server.url, slow) as url:
        found = examine(url, more=("--deadline", "59"))
    late = [name for name, check in found.checks.items() if check["fault"] == "out-of-time"]
    assert len(late) == 1, found.printed
    assert "latency" in found.skipped()
    assert found.code == 0
