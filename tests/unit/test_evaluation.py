from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from slime.engines.client import EngineClient
from slime.engines.errors import EngineError, EngineUnreachableError
from slime.evaluation import evaluate
from slime.rollout.generate import Sampler, generate
from slime.utils.types import Sample
from tests.fakes.engine_server import FakeEngine, serve
from tests.fakes.rollouts import facts, fake_engine, prompt_sample, rollout_args


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    with serve(fake_engine(version="3")) as fake:
        yield fake


async def run(engine: FakeEngine, sets: dict[str, list[Sample]], *flags: str) -> dict[str, float]:
    async with EngineClient([engine.url], concurrency=4, patience=0.5) as client:
        return await evaluate(rollout_args(*flags), sets, Sampler(client, facts()), (6,), generate)


def samples(*labels: str) -> list[Sample]:
    return [prompt_sample(index, index, label=label) for index, label in enumerate(labels)]


async def test_accuracy_is_by_the_rule_and_over_all_sets(engine: FakeEngine) -> None:
    metrics = await run(engine, {"easy": samples("4", "4", "4"), "hard": samples("5")})
    assert metrics.pop("perf/eval_seconds") > 0
    assert metrics == {
        "eval/accuracy": 0.75,
        "eval/easy/accuracy": 1.0,
        "eval/easy/response_length": 3.0,
        "eval/easy/truncated_share": 0.0,
        "eval/easy/samples": 3.0,
        "eval/hard/accuracy": 0.0,
        "eval/hard/response_length": 3.0,
        "eval/hard/truncated_share": 0.0,
        "eval/hard/samples": 1.0,
        "eval/weight_version": 3.0,
    }


async def test_it_is_greedy_and_bans_placeholders(engine: FakeEngine) -> None:
    await run(engine, {"set": samples("4")}, "--eval-max-response-len", "7")
    params = engine.bodies()[0]["sampling_params"]
    assert (params["temperature"], params["max_new_tokens"]) == (0.0, 7)
    assert params["logit_bias"] == {"6": -1.0e5}


async def test_requests_in_flight_are_bounded(engine: FakeEngine) -> None:
    engine.answer_when = lambda: engine.in_flight == 4 or len(engine.bodies()) == 12
    await run(engine, {"set": samples(*"4" * 12)})
    assert engine.most_in_flight == 4


async def test_truncated_answers_are_counted(engine: FakeEngine) -> None:
    engine.responses = [[11] * 40]
    metrics = await run(engine, {"set": samples("4", "4")}, "--eval-max-response-len", "5")
    assert (metrics["eval/set/truncated_share"], metrics["eval/set/response_length"]) == (1.0, 5.0)


async def test_weights_that_change_in_the_middle_are_an_error(engine: FakeEngine) -> None:
    engine.fault = "mixed"
    with pytest.raises(EngineError, match="versions 1, 2"):
        await run(engine, {"set": samples("4")})


async def test_it_never_asks_the_reward_plugin(engine: FakeEngine) -> None:
    with serve(fake_engine()) as teacher:
        async with EngineClient([engine.url]) as client:
            args = rollout_args("--custom-rm-path", "no.such.plugin", rm_url=teacher.url + "/generate")
            await evaluate(args, {"set": samples("4")}, Sampler(client, facts()), (), generate)
        assert teacher.requests == []


async def test_a_dead_engine_is_an_error() -> None:
    dead: Any = type("Dead", (), {"url": "http://127.0.0.1:9"})
    with pytest.raises(EngineUnreachableError):
        await run(dead, {"set": samples("4")})
