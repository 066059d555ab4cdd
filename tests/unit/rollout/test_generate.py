from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from slime.engines.api import sampling_params
from slime.engines.client import EngineClient
from slime.engines.errors import EngineAbortedError, EngineError, ScoreMismatchError
from slime.rollout.concurrency import together
from slime.rollout.generate import Sampler, generate, generate_all, sampling_seed
from slime.utils.types import Sample, SampleStatus
from tests.fakes.engine_server import FakeEngine, log_prob, serve
from tests.fakes.rollouts import facts, fake_engine, prompt_sample, rollout_args

PARAMS = sampling_params(max_new_tokens=16)


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    with serve(fake_engine()) as fake:
        yield fake


async def nothing(sample: Sample) -> None:
    """Judge nothing."""


async def run(urls: list[str], samples: list[Sample], *flags: str, **options: Any) -> list[Sample]:
    args = rollout_args(*flags)
    async with EngineClient(urls, concurrency=args.rollout_concurrency, patience=0.5) as client:
        sampler = Sampler(client, facts())
        options = {"label": "test", "seed_label": "rollout-0", "after": nothing} | options
        return await generate_all(args, samples, PARAMS, sampler, **options)


async def test_a_response_is_its_ids(engine: FakeEngine) -> None:
    prompt = prompt_sample()
    wire = list(prompt.tokens)
    (sample,) = await run([engine.url], [prompt])
    assert sample.tokens == [*wire, 11, 12, 2]
    assert sample.response_tokens == [11, 12, 2]
    assert (sample.response, sample.response_length) == ("\\boxed{4}", 3)
    assert sample.rollout_log_probs == [log_prob(token, 9 + n, 1) for n, token in enumerate([11, 12, 2])]
    assert (sample.status, sample.weight_versions) == (SampleStatus.COMPLETED, ["default"])
    (body,) = engine.bodies()
    assert body["input_ids"] == wire
    assert body["return_logprob"] is True
    assert len(body["image_data"]) == 1


async def test_a_response_at_the_limit_is_truncated(engine: FakeEngine) -> None:
    engine.responses = [[11] * 40]
    (sample,) = await run([engine.url], [prompt_sample()])
    assert (sample.response_length, sample.status) == (16, SampleStatus.TRUNCATED)


async def test_mixed_versions_are_kept(engine: FakeEngine) -> None:
    engine.fault = "mixed"
    (sample,) = await run([engine.url], [prompt_sample()])
    assert sample.weight_versions == ["1", "2"]


@pytest.mark.parametrize(
    ("fault", "error"), [("abort", EngineAbortedError), ("drop_image", ScoreMismatchError)]
)
async def test_faults_name_the_sample(engine: FakeEngine, fault: str, error: type[Exception]) -> None:
    engine.fault = fault
    with pytest.raises(error, match="sample 17"):
        await run([engine.url], [prompt_sample(17)])


async def test_samples_come_back_in_order_and_are_judged_as_they_end(engine: FakeEngine) -> None:
    judged: list[int | None] = []
    sent_when_judged: list[int] = []

    async def after(sample: Sample) -> None:
        judged.append(sample.index)
        sent_when_judged.append(len(engine.bodies()))

    engine.delay = 0.02
    samples = [prompt_sample(index, index // 2) for index in range(8)]
    done = await run([engine.url], samples, "--rollout-concurrency", "2", after=after)
    assert [sample.index for sample in done] == list(range(8))
    assert sorted(judged, key=str) == list(range(8))
    assert engine.most_in_flight <= 2
    assert sent_when_judged[0] < 8


async def test_the_first_failure_ends_all(engine: FakeEngine) -> None:
    async def after(sample: Sample) -> None:
        if sample.index == 0:
            raise EngineError("the teacher is gone")
        await asyncio.sleep(30)

    with pytest.raises(EngineError, match="the teacher is gone"):
        await run([engine.url], [prompt_sample(index) for index in range(4)], after=after)


async def test_each_sample_has_its_own_lasting_seed(engine: FakeEngine) -> None:
    samples = [prompt_sample(index) for index in range(20)]
    await run([engine.url], samples)
    seeds = [body["sampling_params"]["sampling_seed"] for body in engine.bodies()]
    assert len(set(seeds)) == 20
    assert set(seeds) == {sampling_seed(1234, "rollout-0", index) for index in range(20)}


def test_seeds_are_31_bits_and_depend_on_everything() -> None:
    cases = itertools.product((1, 2), ("rollout-0", "rollout-1"), (0, 1))
    seeds = [sampling_seed(*case) for case in cases]
    assert len(set(seeds)) == 8
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert sampling_seed(1234, "rollout-0", 0) == 163771405


async def twice(args: Any, sample: Sample, params: dict[str, Any]) -> Sample:
    """Generate two turns."""
    sample = await generate(args, sample, params)
    sample.tokens = sample.tokens[:-1]
    sample.response_length -= 1
    sample.rollout_log_probs = (sample.rollout_log_probs or [])[:-1]
    return await generate(args, sample, params)


async def test_a_custom_function_can_take_turns(engine: FakeEngine) -> None:
    (sample,) = await run([engine.url], [prompt_sample()], function=twice)
    assert sample.response_tokens == [11, 12, 11, 12, 2]
    assert len(sample.rollout_log_probs or []) == 5
    assert [len(body["input_ids"]) for body in engine.bodies()] == [4, 6]


async def test_a_custom_function_must_return_a_sample(engine: FakeEngine) -> None:
    async def wrong(args: Any, sample: Sample, params: dict[str, Any]) -> Any:
        return [sample]

    with pytest.raises(TypeError, match="custom-generate-function-path returned list"):
        await run([engine.url], [prompt_sample()], function=wrong)


async def test_waves_are_complete_ordered_and_one_after_another() -> None:
    flags = ("--deterministic-rollout", "--engine", "transformers", "--rollout-concurrency", "3")
    with serve(fake_engine(delay=0.01)) as one, serve(fake_engine(delay=0.01)) as other:
        samples = [prompt_sample(index, index // 2) for index in range(16)]
        await run([one.url, other.url], samples[::-1], *flags)
        for engine in (one, other):
            assert engine.most_in_flight <= 3
            places = [body["sampling_params"]["custom_params"] for body in engine.bodies()]
            assert len(places) == 8
            names = [place["wave"] for place in places]
            assert names == sorted(names)
            for name in set(names):
                members = [place for place in places if place["wave"] == name]
                assert sorted(place["order"] for place in members) == list(range(len(members)))
                assert {place["wave_size"] for place in members} == {len(members)}


async def test_without_the_flag_there_are_no_waves(engine: FakeEngine) -> None:
    await run([engine.url], [prompt_sample()])
    assert "custom_params" not in engine.bodies()[0]["sampling_params"]


async def test_together_raises_one_failure_and_counts_the_others() -> None:
    async def fail(name: str) -> None:
        await asyncio.sleep(0)
        raise EngineError(name)

    with pytest.raises(EngineError, match="first") as caught:
        await together([fail("first"), fail("second")])
    assert "1 more failed" in caught.value.__notes__[0]
    assert await together([]) == []
