from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from slime.engines.api import score_payload
from slime.engines.client import Endpoint, EngineClient
from slime.engines.errors import (
    AnswerError,
    EngineError,
    EngineTimeoutError,
    EngineUnreachableError,
    HttpError,
)
from tests.fakes.engine_server import FakeEngine, serve


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    with serve(FakeEngine(image_token_id=90, vocab_size=100)) as fake:
        yield fake


def client(*urls: str, **options: Any) -> EngineClient:
    options.setdefault("retry_seconds", 1.0)
    return EngineClient(urls, role="teacher", remedy="See teacher.log.", **options)


PAYLOAD = score_payload([5, 6, 7], 1)


async def test_answers_are_parsed(engine: FakeEngine) -> None:
    async with client(engine.url + "/generate") as teacher:
        answer = await teacher.generate(PAYLOAD)
    assert answer["meta_info"]["prompt_tokens"] == 3
    assert engine.bodies() == [PAYLOAD]


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


@pytest.mark.parametrize("fault", ["400", "500"])
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


@pytest.mark.parametrize("fault", ["429", "503", "reset"])
async def test_passing_faults_are_tried_again(engine: FakeEngine, fault: str) -> None:
    engine.fault, engine.fault_times = fault, 2
    async with client(engine.url, retry_seconds=10.0) as teacher:
        answer = await teacher.generate(PAYLOAD)
    assert answer["meta_info"]["prompt_tokens"] == 3
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
    async with client(engine.url, timeout=0.3) as teacher:
        with pytest.raises(EngineTimeoutError, match="no answer within"):
            await teacher.generate(PAYLOAD)


@pytest.mark.parametrize("fault", ["html", "truncated_json"])
async def test_what_is_no_json_is_an_error(engine: FakeEngine, fault: str) -> None:
    engine.fault = fault
    async with client(engine.url) as teacher:
        with pytest.raises(AnswerError, match="no JSON"):
            await teacher.generate(PAYLOAD)


async def test_requests_in_flight_are_bounded(engine: FakeEngine) -> None:
    engine.delay = 0.02
    async with client(engine.url, concurrency=3) as teacher:
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
    fakes = [FakeEngine(image_token_id=90, vocab_size=100, delay=0.2) for _ in range(2)]
    with serve(fakes[0]), serve(fakes[1]):
        async with client(fakes[0].url, fakes[1].url) as teacher:
            busy = [asyncio.create_task(teacher.generate(PAYLOAD, group="first")) for _ in range(4)]
            await asyncio.sleep(0.05)
            later = [teacher.generate(PAYLOAD, group=name) for name in ("second", "third")]
            await asyncio.gather(*busy, *later)
    assert sorted(len(fake.bodies()) for fake in fakes) == [2, 4]


async def test_keys_go_where_they_belong(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIME_ENGINE_API_KEY", "public")
    monkeypatch.setenv("SLIME_ENGINE_ADMIN_KEY", "secret")
    async with client(engine.url) as student:
        await student.generate(PAYLOAD)
        await student.continue_()
    sent = {path: headers.get("Authorization") for path, _, headers in engine.requests}
    assert sent == {"/generate": "Bearer public", "/continue_generation": "Bearer secret"}


async def test_without_keys_no_header_is_sent(engine: FakeEngine) -> None:
    async with client(engine.url) as student:
        await student.generate(PAYLOAD)
    assert "Authorization" not in engine.requests[0][2]


async def test_the_control_verbs(engine: FakeEngine) -> None:
    async with client(engine.url + "/generate") as student:
        await student.pause()
        await student.update_weights_from_disk("/weights/3", "3")
        await student.flush_cache()
        await student.continue_()
        assert await student.model_info() == [{"model_path": "fake", "weight_version": "3"}]
    assert [path for path, _, _ in engine.requests] == [
        "/pause_generation",
        "/update_weights_from_disk",
        "/flush_cache",
        "/continue_generation",
        "/model_info",
    ]
    assert engine.requests[0][1] == {"mode": "retract"}


async def test_weights_that_changed_without_a_flush_are_flushed(engine: FakeEngine) -> None:
    engine.fault = "unflushed"
    async with client(engine.url) as student:
        await student.update_weights_from_disk("/weights/3", "3")
    assert [path for path, _, _ in engine.requests] == ["/update_weights_from_disk", "/flush_cache"]


async def test_a_busy_flush_is_asked_again_and_then_an_error(engine: FakeEngine) -> None:
    engine.fault, engine.fault_times = "busy", 2
    async with client(engine.url) as student:
        await student.flush_cache()
        assert len(engine.requests) == 3
        engine.fault_times = 10**9
        with pytest.raises(HttpError, match="pending"):
            await student.flush_cache(patience=0.3)


async def test_weights_that_do_not_load_are_an_error(engine: FakeEngine) -> None:
    engine.fault = "corrupt"
    async with client(engine.url) as student:
        with pytest.raises(EngineError, match="no such checkpoint"):
            await student.update_weights_from_disk("/nowhere", "3")


def test_no_address_is_refused() -> None:
    with pytest.raises(ValueError, match="no address of a teacher"):
        client()
