"""The pre-flight against a live teacher: healthy ones pass, and every planted fault is named.

The teacher is our transformers engine with the tiny checkpoint; a proxy in front of it plants one fault at a
time, so that all else in the answers is real.
"""

import asyncio
import base64
import io
import json
import random
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from PIL import Image

from slime.engines.doctor.__main__ import main
from slime.engines.process import ServerProcess, free_port, start_server
from slime.tiny.paths import checkpoint_path
from tests.contracts.reference import Http
from tests.fakes.planting_proxy import Fault, Json, planted

pytestmark = pytest.mark.timeout(300)

TEACHER, STUDENT = checkpoint_path("teacher"), checkpoint_path("student")
IMAGE_PAD = 6


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("doctor") / "teacher.log"
    with start_server("transformers", str(TEACHER), free_port(), log, role="teacher") as server:
        server.wait_ready(120)
        yield server


@dataclass(frozen=True)
class Diagnosis:
    code: int
    printed: str
    checks: dict[str, Json]
    """The last outcome of each check."""
    healthy: bool

    @property
    def faults(self) -> dict[str, str]:
        return {name: check["fault"] for name, check in self.checks.items() if check["status"] == "FAULT"}

    @property
    def first_fault(self) -> Json:
        """The check that failed first; what follows from it comes later."""
        return next(check for check in self.checks.values() if check["status"] == "FAULT")

    def skipped(self) -> list[str]:
        return [name for name, check in self.checks.items() if check["status"] == "skip"]


Examine = Callable[..., Diagnosis]


@pytest.fixture
def examine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Examine:
    def run(*urls: str, student: Path | None = STUDENT, more: tuple[str, ...] = ()) -> Diagnosis:
        file = tmp_path / "doctor.json"
        argv = [word for url in urls for word in ("--teacher-url", url)]
        argv += ["--student-path", str(student)] if student else []
        code = main([*argv, "--json", str(file), *more])
        written = json.loads(file.read_text())
        checks = {check["check"]: check for check in written["checks"]}
        return Diagnosis(code, capsys.readouterr().out, checks, written["healthy"])

    return run


# ---- healthy teachers ----


def test_a_healthy_teacher_passes_every_check(server: ServerProcess, examine: Examine) -> None:
    found = examine(server.url, more=("--max-tokens", "1000"))
    assert found.code == 0, found.printed
    assert found.healthy
    warned = [name for name, check in found.checks.items() if check["status"] == "warn"]
    assert warned == ["prefix-cache"]  # this engine keeps none
    assert found.skipped() == []
    assert found.checks["same-model"]["values"]["kl"] > 0.1
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


class TextOnly(Fault):
    def page(self, path: str, page: Json) -> Json:
        return page | {"has_image_understanding": False} if path == "/model_info" else page


def test_a_text_only_teacher_passes_where_no_prompt_has_a_picture(
    server: ServerProcess, examine: Examine
) -> None:
    with planted(server.url, TextOnly()) as url:
        found = examine(url, more=("--text-only",))
    assert found.code == 0, found.printed
    assert found.skipped() == ["image-processor", "image-receipt", "image-sizes", "sees"]
    assert found.checks["same-model"]["values"]["kl"] > 0.1


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


# ---- planted faults: what the server says of itself ----


class Says(Fault):
    """Pages with other values."""

    def __init__(self, path: str, **values: Any) -> None:
        self.path, self.values = path, values

    def page(self, path: str, page: Json) -> Json:
        return page | self.values if path == self.path else page


class Keyed(Fault):
    key = "right"


# ---- planted faults: transport ----


class Instead(Fault):
    """Answers `/generate`, or everything, with something else."""

    def __init__(self, status: int, text: str, kind: str = "text/plain", everywhere: bool = False) -> None:
        self.response = {"status": status, "text": text, "content_type": kind}
        self.everywhere = everywhere

    async def instead(self, request: web.Request, body: Json | None) -> web.StreamResponse | None:
        return web.Response(**self.response) if self.everywhere or body is not None else None


class Hang(Fault):
    async def instead(self, request: web.Request, body: Json | None) -> web.StreamResponse | None:
        if body is not None:
            await asyncio.sleep(30)
        return None


class Reset(Fault):
    async def instead(self, request: web.Request, body: Json | None) -> web.StreamResponse | None:
        if body is not None and request.transport is not None:
            request.transport.abort()
        return None


class AnswersAnother(Fault):
    """Gives each request the answer to the one before."""

    def __init__(self) -> None:
        self.last: Json | None = None

    def answer(self, body: Json, answer: Json) -> Json:
        answer["meta_info"]["id"] = body["rid"]
        given, self.last = self.last or answer, answer
        return given


# ---- planted faults: requests ----


class Retokenises(Fault):
    """Swaps two tokens of the response, as a tokenizer that finds another way to write it."""

    def request(self, body: Json) -> Json:
        ids = body.get("input_ids")
        return body | {"input_ids": [*ids[:-3], ids[-2], ids[-3], ids[-1]]} if ids else body


class Truncates(Fault):
    def request(self, body: Json) -> Json:
        return body | {"input_ids": body["input_ids"][:100]} if "input_ids" in body else body


class CutsLongOnes(Fault):
    """Cuts to the context silently, as --allow-auto-truncate does."""

    def request(self, body: Json) -> Json:
        return body | {"input_ids": body["input_ids"][:4000]} if "input_ids" in body else body


class DropsPicture(Fault):
    def request(self, body: Json) -> Json:
        return {key: value for key, value in body.items() if key != "image_data"}


class ExpandsPads(Fault):
    """Sends as many pads as a client of another server version would."""

    def request(self, body: Json) -> Json:
        ids = body.get("input_ids", [])
        if body.get("image_data"):
            body["input_ids"] = [id_ for id_ in ids for _ in range(64 if id_ == IMAGE_PAD else 1)]
        return body


class ChangesPictures(Fault):
    """Sends another picture in each one's place."""

    def __init__(self, change: Callable[[Image.Image], Image.Image]) -> None:
        self.change = change

    def request(self, body: Json) -> Json:
        if body.get("image_data"):
            body["image_data"] = [self._changed(uri) for uri in body["image_data"]]
        return body

    def _changed(self, uri: str) -> str:
        data = io.BytesIO()
        image = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
        self.change(image).save(data, format="PNG")
        return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


class MovesStart(Fault):
    def __init__(self, by: int) -> None:
        self.by = by

    def request(self, body: Json) -> Json:
        start = body.get("logprob_start_len")
        return body | {"logprob_start_len": start + self.by} if start else body


# ---- planted faults: answers ----


class Scores(Fault):
    """Changes the triples of scoring answers."""

    def __init__(self, change: Callable[[Json, list[list[Any]]], list[list[Any]]]) -> None:
        self.change = change

    def answer(self, body: Json, answer: Json) -> Json:
        meta = answer["meta_info"]
        if "logprob_start_len" in body:
            meta["input_token_logprobs"] = self.change(body, meta["input_token_logprobs"])
        return answer


class Counts(Fault):
    """Counts every pad twice."""

    def answer(self, body: Json, answer: Json) -> Json:
        meta = answer["meta_info"]
        if meta.get("image_tokens"):
            meta["prompt_tokens"] += meta["image_tokens"] - 1
            meta["image_tokens"] = 2 * meta["image_tokens"] - 1
        return answer


class OtherTokenizer(Fault):
    def answer(self, body: Json, answer: Json) -> Json:
        if "prompt_token_ids" in answer:
            answer["prompt_token_ids"] = [id_ + (id_ > 40) for id_ in answer["prompt_token_ids"]]
        return answer


def shift_all(body: Json, triples: list[list[Any]]) -> list[list[Any]]:
    return [triples[0], *([*triple] for triple in triples[:-1])]


def shift_values(body: Json, triples: list[list[Any]]) -> list[list[Any]]:
    """Give each id its neighbour's log-prob, in every answer alike."""
    values = [None, *(triple[0] for triple in triples[2:]), -1.0]
    return [[value, *triple[1:]] for value, triple in zip(values, triples, strict=True)]


def shift_late_starts(body: Json, triples: list[list[Any]]) -> list[list[Any]]:
    return shift_values(body, triples) if body["logprob_start_len"] else triples


def clip(body: Json, triples: list[list[Any]]) -> list[list[Any]]:
    return [[value, id_ if id_ < 50 else 0, None] for value, id_, _ in triples]


def with_last(value: Any) -> Callable[[Json, list[list[Any]]], list[list[Any]]]:
    return lambda body, triples: [*triples[:-1], [value, *triples[-1][1:]]]


def tempered(body: Json, triples: list[list[Any]]) -> list[list[Any]]:
    warmth = body["sampling_params"].get("temperature", 1.0)
    return [[value and value / warmth, *rest] for value, *rest in triples]


def unsteady(body: Json, triples: list[list[Any]]) -> list[list[Any]]:
    return [[value and value - random.random() * 3, *rest] for value, *rest in triples]


HTML = "<!DOCTYPE html><html>a proxy's page</html>"

PLANTED: dict[str, tuple[Fault, str, str]] = {
    # name: the fault, the check that must find it first, the name that it must give
    "shifts ids by one": (Scores(shift_all), "text-receipt", "ids-shifted"),
    "re-tokenises": (Retokenises(), "text-receipt", "retokenised"),
    "clips ids to 0": (Scores(clip), "text-receipt", "ids-clipped"),
    "truncates": (Truncates(), "text-receipt", "truncated"),
    "cuts long samples": (CutsLongOnes(), "context", "truncated"),
    "drops the picture": (DropsPicture(), "image-receipt", "picture-dropped"),
    "expands pads itself": (ExpandsPads(), "image-receipt", "picture-refused"),
    "expands pads twice": (Counts(), "image-receipt", "expanded-twice"),
    "resizes pictures": (
        ChangesPictures(lambda image: image.resize((96, 96))),
        "image-receipt",
        "picture-resized",
    ),
    "resizes large pictures": (
        ChangesPictures(lambda image: image.resize((256, 256)) if image.width > 256 else image),
        "image-sizes",
        "picture-resized",
    ),
    "is blind": (
        ChangesPictures(lambda image: Image.new("RGB", image.size, (255, 255, 255))),
        "sees",
        "blind",
    ),
    "starts one late": (MovesStart(1), "text-receipt", "off-by-one"),
    "starts one early": (MovesStart(-1), "text-receipt", "off-by-one"),
    "shifts scores": (Scores(shift_values), "generation", "scores-wrong"),
    "shifts scores of late starts": (Scores(shift_late_starts), "start-len", "off-by-one"),
    "ignores the start": (MovesStart(-40), "text-receipt", "start-ignored"),
    "divides by the temperature": (Scores(tempered), "temperature", "temperature-applied"),
    "scores differently each time": (Scores(unsteady), "prefix-cache", "unsteady"),
    "answers null": (Scores(with_last(None)), "text-receipt", "null-scores"),
    "answers NaN": (Scores(with_last(float("nan"))), "text-receipt", "null-scores"),
    "answers positive log-probs": (Scores(with_last(0.5)), "text-receipt", "null-scores"),
    "answers short": (Scores(lambda body, triples: triples[:5]), "text-receipt", "short-answer"),
    "answers for another request": (AnswersAnother(), "text-receipt", "other-request"),
    "another tokenizer": (OtherTokenizer(), "vocabulary", "vocabulary-differs"),
    "answers 500": (Instead(500, "Internal Server Error"), "vocabulary", "http-500"),
    "answers 429": (Instead(429, '{"message": "queue full"}'), "vocabulary", "overloaded"),
    "answers HTML": (Instead(200, HTML, "text/html"), "vocabulary", "html-page"),
    "is a proxy's page": (Instead(404, HTML, "text/html", everywhere=True), "reachable", "html-page"),
    "is loading": (Instead(503, "", everywhere=True), "reachable", "not-ready"),
    "resets the connection": (Reset(), "vocabulary", "reset"),
    "wants a key": (Keyed(), "model", "key-missing"),
    "an embedding model": (Says("/model_info", is_generation=False), "model", "not-generative"),
    "a text-only teacher": (TextOnly(), "model", "text-only-teacher"),
    "--allow-auto-truncate": (Says("/server_info", allow_auto_truncate=True), "settings", "truncates"),
    "a short context": (Says("/v1/models", data=[{"max_model_len": 512}]), "context", "context-short"),
}


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


class HidesPause(Fault):
    """Seems healthy, and lets `/generate` hang until it says that it is paused."""

    def __init__(self) -> None:
        self.asked = False

    async def instead(self, request: web.Request, body: Json | None) -> web.StreamResponse | None:
        if body is not None:
            self.asked = True
            await asyncio.sleep(30)
        return web.Response(status=503) if self.asked and request.path == "/ready" else None


@pytest.mark.parametrize(("fault", "name"), [(Hang(), "hangs"), (HidesPause(), "paused")])
def test_a_teacher_that_hangs_ends_the_examination(
    server: ServerProcess, examine: Examine, fault: Fault, name: str
) -> None:
    with planted(server.url, fault) as url:
        found = examine(url, more=("--timeout", "1"))
    assert found.faults == {"vocabulary": name}
    assert {"chat-template", "latency"} <= set(found.skipped())


def test_addresses_where_nothing_is_are_told_apart(examine: Examine) -> None:
    assert examine(f"http://127.0.0.1:{free_port()}").faults == {"reachable": "refused"}
    assert examine("http://no-such-host.invalid:1").faults == {"reachable": "unknown-host"}


def test_a_port_that_speaks_no_http_is_told_apart(examine: Examine) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def greet() -> None:
            connection, _ = listening.accept()
            connection.recv(100)
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


class WithoutTokenIds(Fault):
    """Drops `return_prompt_token_ids`, as a typed gateway does."""

    def answer(self, body: Json, answer: Json) -> Json:
        answer.pop("prompt_token_ids", None)
        return answer


class TakesNoText(Fault):
    """Answers text as a server with --skip-tokenizer-init does."""

    async def instead(self, request: web.Request, body: Json | None) -> web.StreamResponse | None:
        if body is None or "text" not in body:
            return None
        return web.json_response({"error": {"message": "no tokenizer"}}, status=400)


@pytest.mark.parametrize("fault", [WithoutTokenIds(), TakesNoText()])
def test_a_server_whose_tokenizer_cannot_be_asked_is_examined_by_its_files(
    server: ServerProcess, examine: Examine, fault: Fault
) -> None:
    with planted(server.url, fault) as url:
        found = examine(url)
    assert found.code == 0, found.printed
    assert found.checks["vocabulary"]["fault"] == "tokenizer-unseen"
    assert found.checks["text-receipt"]["status"] == "pass"


def test_a_slow_teacher_is_not_waited_for_forever(server: ServerProcess, examine: Examine) -> None:
    class Slow(Fault):
        async def instead(self, request: web.Request, body: Json | None) -> web.StreamResponse | None:
            if body is not None:
                await asyncio.sleep(0.3)
            return None

    with planted(server.url, Slow()) as url:
        found = examine(url, more=("--deadline", "1.5"))
    late = [name for name, check in found.checks.items() if check["fault"] == "out-of-time"]
    assert len(late) == 1, found.printed
    assert "latency" in found.skipped()
    assert found.code == 0
