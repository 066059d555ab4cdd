"""The control verbs: what is sent, in which form, and what becomes of a refusal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from slime.engines.control import EngineControl
from slime.engines.errors import EngineError, EngineTimeoutError, HttpError
from tests.fakes.engine_server import FakeEngine, serve
from tests.fakes.impatience import time_is_out_when


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    with serve(FakeEngine(image_token_id=90, vocab_size=100)) as fake:
        yield fake


def control(*urls: str, **options: Any) -> EngineControl:
    options.setdefault("patience", 1.0)
    return EngineControl(urls, role="student", remedy="See student.log.", **options)


async def test_the_control_verbs(engine: FakeEngine) -> None:
    async with control(engine.url + "/generate") as student:
        await student.pause()
        await student.update_weights_from_disk("/weights/3", "3")
        await student.flush_cache()
        await student.continue_()
    assert [path for path, _, _ in engine.requests] == [
        "/pause_generation",
        "/update_weights_from_disk",
        "/flush_cache",
        "/continue_generation",
    ]
    assert engine.requests[0][1] == {"mode": "retract"}


async def test_weights_that_changed_without_a_flush_are_flushed(engine: FakeEngine) -> None:
    engine.fault = "unflushed"
    async with control(engine.url) as student:
        await student.update_weights_from_disk("/weights/3", "3")
    assert [path for path, _, _ in engine.requests] == ["/update_weights_from_disk", "/flush_cache"]


async def test_a_busy_flush_is_asked_again_and_then_an_error(engine: FakeEngine) -> None:
    engine.fault, engine.fault_times = "busy", 2
    async with control(engine.url) as student:
        await student.flush_cache()
        assert len(engine.requests) == 3
        engine.fault_times = 10**9
        with pytest.raises(HttpError, match="pending"):
            await student.flush_cache(patience=0.3)


async def test_weights_that_do_not_load_are_an_error(engine: FakeEngine) -> None:
    engine.fault = "corrupt"
    async with control(engine.url) as student:
        with pytest.raises(EngineError, match="no such checkpoint"):
            await student.update_weights_from_disk("/nowhere", "3")


async def test_a_control_verb_without_an_answer_is_not_repeated(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.control_delay = 600.0
    sent = time_is_out_when(monkeypatch, lambda: len(engine.requests) > 0)
    async with control(engine.url, patience=60.0) as student:
        with pytest.raises(EngineTimeoutError):
            await student.update_weights_from_disk("/weights/3", "3")
    assert len(engine.requests) == len(sent) == 1


async def test_the_admin_key_guards_the_verbs(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIME_ENGINE_API_KEY", "public")
    async with control(engine.url) as student:
        await student.continue_()
    monkeypatch.setenv("SLIME_ENGINE_ADMIN_KEY", "secret")
    async with control(engine.url) as student:
        await student.continue_()
    sent = [headers.get("Authorization") for _, _, headers in engine.requests]
    assert sent == ["Bearer public", "Bearer secret"]


async def test_a_session_that_somebody_left_open_is_closed_first(engine: FakeEngine) -> None:
    async with control(engine.url) as student:
        await student.begin_weight_update()
        await student.begin_weight_update()
        assert engine.session_open
        await student.end_weight_update()
    assert not engine.session_open
    paths = [path.removesuffix("_weight_update") for path, _, _ in engine.requests]
    assert paths == ["/begin", "/begin", "/end", "/begin", "/end"]


async def test_an_update_outside_a_session_is_the_servers_refusal(engine: FakeEngine) -> None:
    async with control(engine.url) as student:
        with pytest.raises(HttpError, match="no session is open"):
            await student.update_weights_from_tensor([["x"]], "3")


async def test_each_server_gets_its_own_payload_and_the_last_one_names_the_version() -> None:
    fakes = [FakeEngine(image_token_id=90, vocab_size=100) for _ in range(2)]
    with serve(fakes[0]), serve(fakes[1]):
        async with control(fakes[0].url, fakes[1].url) as student:
            await student.begin_weight_update()
            await student.update_weights_from_tensor([["a"], ["b", "c"]], None)
            assert [fake.version for fake in fakes] == ["default", "default"]
            await student.update_weights_from_tensor([["d"], ["e", "f"]], "3")
            await student.end_weight_update()
    sent = [
        [body["serialized_named_tensors"] for body in fake.bodies("/update_weights_from_tensor")]
        for fake in fakes
    ]
    assert sent == [[["a"], ["d"]], [["b", "c"], ["e", "f"]]]
    assert [fake.version for fake in fakes] == ["3", "3"]
    assert not fakes[0].bodies("/update_weights_from_tensor")[0]["flush_cache"]
