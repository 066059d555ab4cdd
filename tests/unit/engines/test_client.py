from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from slime.engines.api import score_payload
from slime.engines.client import EngineClient
from slime.engines.errors import (
    AnswerError,
    EngineError,
    EnginesLostError,
    EngineTimeoutError,
    EngineUnreachableError,
    HttpError,
    MissingScoreError,
    WrongAnswerError,
)
from slime.engines.replicas import Endpoint
from tests.fakes.engine_server import FakeEngine, serve
from tests.fakes.impatience import time_is_out_when


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    with serve(FakeEngine(image_token_id=90, vocab_size=100)) as fake:
        yield fake


def client(*urls: str, **options: Any) -> EngineClient:
    options.setdefault("patience", 1.0)
    return EngineClient(urls, role="teacher", remedy="See teacher.log.", **options)


PAYLOAD = score_payload([5, 6, 7], 1)


async def test_answers_are_parsed(engine: FakeEngine) -> None:
    async with client(engine.url + "/generate") as teacher:
        answer = await teacher.generate(PAYLOAD)
    assert answer["meta_info"]["prompt_tokens"] == 3
    (body,) = engine.bodies()
    assert body == PAYLOAD | {"rid": body["rid"]}


@pytest.mark.parametrize(
    ("url", "generate", "base"),
    [
        ("http://h:1", "http://h:1/generate", "http://h:1"),
        ("http://h:1/", "http://h:1/generate", "http://h:1"),
        ("http://h:1/generate", "http://h:1/generate", "http://h:1"),
        ("https://h/teacher/generate", "https://h/teacher/generate", "https://h/teacher"),
    ],
)
def test_a_url_is_posted_to_as_it_is_given(url: str, generate: str, base: str) -> None:
    assert Endpoint.parse(url) == Endpoint(generate, base)


@pytest.mark.parametrize("url", ["", "localhost:30000", "ftp://h/generate"])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="no server address"):
        Endpoint.parse(url)


@pytest.mark.parametrize("fault", ["400"])
async def test_a_final_status_is_raised_at_once_with_url_status_and_body(
    engine: FakeEngine, fault: str
) -> None:
    engine.fault = fault
    async with client(engine.url) as teacher:
        with pytest.raises(HttpError) as caught:
            await teacher.generate(PAYLOAD)
    assert caught.value.status == int(fault)
    assert engine.url in str(caught.value)
    assert "See teacher.log." in str(caught.value)
    assert len(engine.bodies()) == 1
    assert caught.value.__cause__ is not caught.value


@pytest.mark.parametrize("fault", ["408", "429", "500", "502", "503", "504", "reset"])
async def test_passing_faults_are_tried_again(engine: FakeEngine, fault: str) -> None:
    engine.fault, engine.fault_times = fault, 2
    async with client(engine.url, patience=60.0) as teacher:
        answer = await teacher.generate(PAYLOAD)
    assert answer["meta_info"]["prompt_tokens"] == 3
    assert len(engine.bodies()) == 3


async def test_an_internal_error_is_tried_three_times(engine: FakeEngine) -> None:
    engine.fault = "500"
    async with client(engine.url, patience=60.0) as teacher:
        with pytest.raises(HttpError, match=r"HTTP 500.*3 tries"):
            await teacher.generate(PAYLOAD)
    assert len(engine.bodies()) == 3


async def test_lasting_overload_ends_in_its_own_error(engine: FakeEngine) -> None:
    engine.fault = "503"
    async with client(engine.url) as teacher:
        with pytest.raises(HttpError, match=r"HTTP 503.*tries") as caught:
            await teacher.generate(PAYLOAD)
    assert len(engine.bodies()) > 1
    assert caught.value.status == 503


async def test_a_dead_server_is_named_with_what_to_look_at() -> None:
    async with client("http://127.0.0.1:9/generate") as teacher:
        with pytest.raises(EngineUnreachableError) as caught:
            await teacher.generate(PAYLOAD)
    assert "http://127.0.0.1:9/generate" in str(caught.value)
    assert "See teacher.log." in str(caught.value)


async def test_a_hanging_server_meets_the_deadline(engine: FakeEngine) -> None:
    engine.fault = "hang"
    async with client(engine.url, timeout=0.3, patience=0.0) as teacher:
        with pytest.raises(EngineTimeoutError, match="no answer within"):
            await teacher.generate(PAYLOAD)


async def test_a_server_that_hangs_is_given_three_chances(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.fault = "hang"
    sent = time_is_out_when(monkeypatch, lambda: engine.hanging == len(sent))
    async with client(engine.url, patience=60.0) as teacher:
        with pytest.raises(EngineTimeoutError, match="3 tries"):
            await teacher.generate(PAYLOAD)
    assert len(engine.bodies()) == len(sent) == 3


async def test_a_request_without_an_answer_is_sent_again_under_another_id(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.fault, engine.fault_times = "hang", 1
    sent = time_is_out_when(monkeypatch, lambda: engine.hanging == len(sent))
    async with client(engine.url, patience=60.0) as teacher:
        answer = await teacher.generate(PAYLOAD)
    assert answer["meta_info"]["prompt_tokens"] == 3
    first, second = engine.bodies()
    assert first["rid"] != second["rid"]


async def test_an_answer_to_another_request_is_refused(engine: FakeEngine) -> None:
    engine.fault = "another_request"
    async with client(engine.url) as teacher:
        await teacher.generate(PAYLOAD)
        with pytest.raises(WrongAnswerError, match="mixes up answers"):
            await teacher.generate(PAYLOAD)


async def test_a_gateway_may_name_requests_itself(engine: FakeEngine) -> None:
    engine.fault = "gateway"
    async with client(engine.url) as teacher:
        assert (await teacher.generate(PAYLOAD))["meta_info"]["id"] == "an id of the gateway's own"


async def test_the_first_of_a_group_goes_alone_and_the_others_together(engine: FakeEngine) -> None:
    engine.delay, engine.answer_when = 0.05, lambda: len(engine.bodies()) in (1, 5)
    async with client(engine.url, timeout=60.0) as teacher:
        await asyncio.gather(*(teacher.score(PAYLOAD, group="g") for _ in range(5)))
    (first_start, first_end), *rest = sorted(engine.generate_times)
    assert first_start < first_end
    assert all(start >= first_end for start, _ in rest)
    assert min(end for _, end in rest) > max(start for start, _ in rest)
    assert engine.most_in_flight == 4


async def test_the_second_warms_a_group_whose_first_failed(engine: FakeEngine) -> None:
    engine.fault, engine.fault_times, engine.delay = "400", 1, 0.05
    engine.answer_when = lambda: len(engine.bodies()) in (1, 2, 4)
    async with client(engine.url, timeout=60.0) as teacher:
        jobs = [teacher.score(PAYLOAD, group="g") for _ in range(4)]
        outcomes = await asyncio.gather(*jobs, return_exceptions=True)
    assert [isinstance(outcome, HttpError) for outcome in outcomes] == [True, False, False, False]
    assert engine.most_in_flight == 2


async def test_a_group_is_patient_once_not_once_a_sample(engine: FakeEngine) -> None:
    engine.fault = "503"
    engine.answer_when = lambda: len({body["input_ids"][0] for body in engine.bodies()}) in (1, 8)
    async with client(engine.url, timeout=60.0, patience=1.0) as teacher:
        jobs = [teacher.score(score_payload([number, 6, 7], 1), group="g") for number in range(8)]
        outcomes = await asyncio.gather(*jobs, return_exceptions=True)
    assert all(isinstance(outcome, HttpError) for outcome in outcomes)
    assert engine.most_in_flight == 7, "behind the first, the others go side by side"


async def test_requests_without_a_group_wait_for_nobody(engine: FakeEngine) -> None:
    engine.answer_when = lambda: len(engine.bodies()) == 4
    async with client(engine.url, timeout=60.0) as teacher:
        await asyncio.gather(*(teacher.score(PAYLOAD) for _ in range(4)))
    assert engine.most_in_flight == 4


@pytest.mark.parametrize("fault", ["reset", "503", "hang"])
async def test_a_replica_that_fails_is_left_out_until_it_is_ready(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes = [FakeEngine(image_token_id=90, vocab_size=100) for _ in range(2)]
    noticed: list[int] = []

    def hangs() -> bool:
        """Tell it of each request that hangs, once."""
        if fakes[0].hanging == len(noticed):
            return False
        noticed.append(fakes[0].hanging)
        return True

    time_is_out_when(monkeypatch, hangs)
    with serve(fakes[0]), serve(fakes[1]):
        async with client(fakes[0].url, fakes[1].url, patience=60.0) as teacher:
            for group in range(4):
                await teacher.score(PAYLOAD, group=group)
            assert [len(fake.bodies()) for fake in fakes] == [2, 2]
            fakes[0].fault = fault
            for group in range(6):
                await teacher.score(PAYLOAD, group=group)
            assert len(fakes[0].bodies()) == 3, "one failure is enough to stay away"
            assert len(fakes[1].bodies()) == 2 + 6
            fakes[0].fault = None
            while not all(replica.up for replica in teacher._replicas.all):  # noqa: ASYNC110 (no event says so)
                await asyncio.sleep(0.05)
            for group in range(6, 10):
                await teacher.score(PAYLOAD, group=group)
    assert len(fakes[0].bodies()) > 3


async def test_with_all_replicas_down_somebody_is_tried_until_one_is_back() -> None:
    fakes = [FakeEngine(image_token_id=90, vocab_size=100, fault="503", fault_times=3) for _ in range(2)]
    with serve(fakes[0]), serve(fakes[1]):
        async with client(fakes[0].url, fakes[1].url, patience=60.0) as teacher:
            answers = await asyncio.gather(*(teacher.score(PAYLOAD, group=group) for group in range(4)))
    assert len(answers) == 4


@pytest.mark.parametrize("fault", ["html", "truncated_json"])
async def test_what_is_no_json_is_an_error(engine: FakeEngine, fault: str) -> None:
    engine.fault = fault
    async with client(engine.url) as teacher:
        with pytest.raises(AnswerError, match="no JSON"):
            await teacher.generate(PAYLOAD)


async def test_requests_in_flight_are_bounded(engine: FakeEngine) -> None:
    engine.delay = 0.02
    engine.answer_when = lambda: engine.in_flight == 3 or len(engine.bodies()) == 12
    async with client(engine.url, concurrency=3, timeout=60.0) as teacher:
        await asyncio.gather(*(teacher.generate(PAYLOAD) for _ in range(12)))
    assert engine.most_in_flight == 3
    assert len(engine.bodies()) == 12


async def test_a_group_stays_with_one_server_and_groups_spread() -> None:
    fakes = [FakeEngine(image_token_id=90, vocab_size=100, delay=0.01) for _ in range(2)]
    with serve(fakes[0]), serve(fakes[1]):
        async with client(fakes[0].url, fakes[1].url) as teacher:
            jobs = [
                teacher.generate(score_payload([group, 6, 7], 1), group=group)
                for group in range(6)
                for _ in range(4)
            ]
            await asyncio.gather(*jobs)
    groups = [{body["input_ids"][0] for body in fake.bodies()} for fake in fakes]
    assert not groups[0] & groups[1]
    assert [len(group) for group in groups] == [3, 3]


async def test_a_new_group_goes_to_the_least_loaded_server() -> None:
    fakes = [FakeEngine(image_token_id=90, vocab_size=100) for _ in range(2)]
    for fake in fakes:
        fake.answer_when = lambda: sum(len(fake.bodies()) for fake in fakes) == 6
    with serve(fakes[0]), serve(fakes[1]):
        async with client(fakes[0].url, fakes[1].url, timeout=60.0) as teacher:
            busy = [asyncio.create_task(teacher.generate(PAYLOAD, group="first")) for _ in range(4)]
            await asyncio.sleep(0.05)
            later = [teacher.generate(PAYLOAD, group=name) for name in ("second", "third")]
            await asyncio.gather(*busy, *later)
    assert sorted(len(fake.bodies()) for fake in fakes) == [2, 4]


async def test_a_url_that_names_its_user_brings_its_own_key_and_is_masked(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLIME_ENGINE_API_KEY", "public")
    named = engine.url.replace("://", "://user:planted@")
    async with client(named) as teacher:
        await teacher.generate(PAYLOAD)
    engine.fault = "500"
    async with client(named, patience=0.0) as teacher:
        with pytest.raises(EngineError) as caught:
            await teacher.generate(PAYLOAD)
    assert "planted" not in str(caught.value)
    assert "http://***@127.0.0.1" in str(caught.value)
    for kind in (EngineUnreachableError, AnswerError, MissingScoreError):
        assert str(kind("at http://u:planted@host/a@b: no")) == "at http://***@host/a@b: no"


async def test_the_api_key_is_sent(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIME_ENGINE_API_KEY", "public")
    monkeypatch.setenv("SLIME_ENGINE_ADMIN_KEY", "secret")
    async with client(engine.url) as student:
        await student.generate(PAYLOAD)
    assert engine.requests[0][2]["Authorization"] == "Bearer public"


async def test_without_keys_no_header_is_sent(engine: FakeEngine) -> None:
    async with client(engine.url) as student:
        await student.generate(PAYLOAD)
    assert "Authorization" not in engine.requests[0][2]


@pytest.mark.parametrize(
    "reply",
    [
        b"garbage",
        b"HTTP/1.1 abc OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 20_000 + b"\r\n\r\n",
        b"",
    ],
)
async def test_what_is_no_http_is_an_unreachable_server(reply: bytes) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(reply)
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, client(f"http://127.0.0.1:{port}", patience=0.0) as teacher:
        with pytest.raises(EngineUnreachableError, match=r"See teacher\.log"):
            await teacher.generate(PAYLOAD)


async def test_a_redirect_is_not_followed() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 302 Found\r\nLocation: ftp://elsewhere/\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, client(f"http://127.0.0.1:{port}") as teacher:
        with pytest.raises(HttpError, match="302"):
            await teacher.generate(PAYLOAD)


def test_no_address_is_refused() -> None:
    with pytest.raises(ValueError, match="no address of a teacher"):
        client()


async def test_answers_of_other_weights_than_expected_are_not_taken(engine: FakeEngine) -> None:
    engine.version = "3"
    async with client(engine.url) as student:
        await student.expect("3")
        await student.generate(PAYLOAD)
        engine.version = "default"  # started anew
        with pytest.raises(EnginesLostError, match=r"'default'.*'3'"):
            await student.generate(PAYLOAD)
    assert len(engine.bodies()) == 2


async def asked_for(fake: FakeEngine, path: str) -> None:
    """Return once a path was asked for."""
    while path not in {seen for seen, _, _ in fake.requests}:  # noqa: ASYNC110 (the fake sets no event)
        await asyncio.sleep(0.1)


async def test_a_server_that_was_started_anew_is_left_out_until_it_has_the_weights() -> None:
    fakes = [FakeEngine(image_token_id=90, vocab_size=100, version="3") for _ in range(2)]
    with serve(fakes[0]), serve(fakes[1]):
        async with client(fakes[0].url, fakes[1].url) as student:
            await student.expect("3")
            fakes[0].version = "default"
            answers = await asyncio.gather(*(student.generate(PAYLOAD) for _ in range(4)))
            assert {answer["meta_info"]["weight_version"] for answer in answers} == {"3"}
            refused = len(fakes[0].bodies())
            assert refused > 0
            await asked_for(fakes[0], "/model_info")  # it is ready, and asked for its weights
            await student.generate(PAYLOAD)
            assert len(fakes[0].bodies()) == refused
            for fake in fakes:
                fake.version = "4"
            await student.expect("4")
            await asyncio.gather(*(student.generate(PAYLOAD) for _ in range(4)))
            assert len(fakes[0].bodies()) > refused


async def test_a_lone_server_that_is_gone_is_lost_where_its_weights_were_expected(engine: FakeEngine) -> None:
    async with client("http://127.0.0.1:9", patience=0.1) as student:
        with pytest.raises(EngineUnreachableError):
            await student.generate(PAYLOAD)
        await student.expect("3")
        with pytest.raises(EnginesLostError, match="cannot be reached"):
            await student.generate(PAYLOAD)
