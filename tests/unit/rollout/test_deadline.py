"""Responses that are not done in time are aborted at the engine, counted, and trained on nowhere.

The deadline comes when a test says so (`deadline_comes_when`), not when a busy machine's clock does.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from slime.engines.client import EngineClient
from slime.engines.errors import EngineTimeoutError
from slime.evaluation import evaluate
from slime.rollout.generate import GenerateFunction, Sampler, generate, generate_all
from slime.rollout.manager import RolloutManager
from slime.rollout.replay import RecordedRollouts
from slime.rollout.rollout import DeadlineError
from slime.shards import build_shards
from slime.utils.types import Sample, SampleStatus
from tests.fakes.engine_server import FakeEngine, serve
from tests.fakes.rollouts import facts, fake_engine, prompt_sample, rollout_args, write_prompts

PARAMS = {"max_new_tokens": 16}
FAR = 3600.0
"""A deadline that does not come by itself."""


@pytest.fixture
def student() -> Iterator[FakeEngine]:
    with serve(fake_engine()) as fake:
        yield fake


@pytest.fixture
def teacher() -> Iterator[FakeEngine]:
    with serve(fake_engine()) as fake:
        yield fake


def deadline_comes_when(monkeypatch: pytest.MonkeyPatch, condition: Callable[[], bool]) -> None:
    """Let every deadline of `FAR` seconds that is set from now on come when `condition` holds."""
    original = asyncio.timeout_at

    async def watch(limit: asyncio.Timeout) -> None:
        while not condition():  # noqa: ASYNC110 (it is about another thread)
            await asyncio.sleep(0.01)
        with contextlib.suppress(RuntimeError):  # the response ended meanwhile
            limit.reschedule(asyncio.get_running_loop().time())

    def timeout_at(when: float | None) -> asyncio.Timeout:
        limit, loop = original(when), asyncio.get_running_loop()
        if when is not None and when - loop.time() > FAR / 2:  # others are aiohttp's
            watching.append(loop.create_task(watch(limit)))
        return limit

    watching: list[asyncio.Task[None]] = []
    monkeypatch.setattr(asyncio, "timeout_at", timeout_at)


async def run(
    engine: FakeEngine,
    count: int,
    function: GenerateFunction = generate,
    ended: list[Sample] | None = None,
    **options: Any,
) -> list[Sample]:
    """Answer `count` samples under a deadline; `ended` collects them as they are handed on."""

    async def after(sample: Sample) -> None:
        if ended is not None:
            ended.append(sample)

    async with EngineClient([engine.url], **{"concurrency": 16, "patience": 0.5} | options) as client:
        return await generate_all(
            rollout_args(),
            [prompt_sample(index) for index in range(count)],
            PARAMS,
            Sampler(client, facts()),
            label="test",
            seed_label="rollout-0",
            after=after,
            function=function,
            deadline=FAR,
        )


async def test_a_straggler_is_aborted_at_the_engine_by_its_id(
    student: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    student.fault, student.fault_times = "straggle", 2
    ended: list[Sample] = []
    deadline_comes_when(monkeypatch, lambda: len(ended) == 3 and student.straggling == 2)
    samples = await run(student, 5, ended=ended)
    late = [sample for sample in samples if sample.status is SampleStatus.ABORTED]
    assert len(late) == 2
    assert sorted(student.aborted) == sorted(body["rid"] for body in student.bodies("/abort_request"))
    assert len(set(student.aborted)) == 2
    assert set(student.aborted) < {body["rid"] for body in student.bodies()}
    assert student.straggling == 0, "the engine has stopped before the rollout goes on"
    for sample in late:
        assert (sample.tokens, sample.response_length, sample.response) == (prompt_sample().tokens, 0, "")
    in_time = [sample for sample in samples if sample not in late]
    assert [sample.response_tokens for sample in in_time] == [[11, 12, 2]] * 3
    assert [sample.index for sample in samples] == list(range(5))
    assert len(ended) == 5
    assert all(any(sample is handed for handed in ended) for sample in samples)


async def test_requests_that_wait_for_a_place_are_never_sent(
    student: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    student.fault = "straggle"
    deadline_comes_when(monkeypatch, lambda: student.straggling == 2)
    samples = await run(student, 6, concurrency=2)
    assert [sample.status for sample in samples] == [SampleStatus.ABORTED] * 6
    assert len(student.bodies()) == len(student.aborted) == 2


async def test_a_custom_function_is_cut_off_in_any_turn(
    student: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sample 0 hangs in its second turn, sample 1 in a tool of its own; neither leaves a half-written
    sample."""

    both = asyncio.Barrier(2)

    async def turns(args: Any, sample: Sample, params: dict[str, Any]) -> Sample:
        sample = await generate(args, sample, params)
        sample.loss_mask = [1] * 99  # wrong until the last turn
        sample.metadata["turns"] = 1
        await both.wait()
        student.fault = "straggle"
        if sample.index == 1:
            await asyncio.Event().wait()
        return await generate(args, sample, params)

    deadline_comes_when(monkeypatch, lambda: student.straggling == 1)
    samples = await run(student, 2, turns, concurrency=1)
    assert len(student.aborted) == 1
    for sample in samples:
        assert (sample.status, sample.response_length) == (SampleStatus.ABORTED, 0)
        assert (sample.loss_mask, sample.metadata) == (None, {})
        assert sample.tokens == prompt_sample().tokens


async def test_another_timeout_is_no_deadline(student: FakeEngine) -> None:
    async def impatient(args: Any, sample: Sample, params: dict[str, Any]) -> Sample:
        raise EngineTimeoutError("the tool took too long")

    with pytest.raises(EngineTimeoutError, match="the tool took too long"):
        await run(student, 2, impatient)


async def test_an_engine_that_refuses_aborts_is_named_once(
    student: FakeEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    student.fault, student.abort_status = "straggle", 401
    deadline_comes_when(monkeypatch, lambda: student.straggling == 3)
    samples = await run(student, 3, role="student engine")
    assert [sample.status for sample in samples] == [SampleStatus.ABORTED] * 3
    (record,) = [record for record in caplog.records if "could not be aborted" in record.message]
    assert f"{student.url}/abort_request answered HTTP 401" in record.message


async def test_an_evaluation_has_no_deadline(student: FakeEngine) -> None:
    student.delay = 0.2
    args = rollout_args("--rollout-deadline", "0.01")
    async with EngineClient([student.url]) as client:
        metrics = await evaluate(args, {"set": [prompt_sample()]}, Sampler(client, facts()), (6,), generate)
    assert metrics["eval/accuracy"] == 1.0


def make(folder: Path, student: FakeEngine, teacher: FakeEngine, *flags: str) -> RolloutManager:
    args = rollout_args(*flags, data=str(write_prompts(folder)), rm_url=teacher.url + "/generate")
    return RolloutManager(args, [student.url])


@pytest.mark.parametrize("custom", [False, True])
def test_an_aborted_sample_is_counted_and_masked_and_no_failure_of_the_teacher(
    tmp_path: Path,
    student: FakeEngine,
    teacher: FakeEngine,
    monkeypatch: pytest.MonkeyPatch,
    custom: bool,
) -> None:
    """The budget of --opd-max-failed-frac is 0: it would not allow one. The recording replays."""

    async def own(args: Any, sample: Sample, params: dict[str, Any]) -> Sample:
        return await generate(args, sample, params)

    module = types.ModuleType("planted_deadline")
    vars(module)["own"] = own
    monkeypatch.setitem(sys.modules, "planted_deadline", module)
    student.fault, student.fault_times = "straggle", 2
    deadline_comes_when(monkeypatch, lambda: len(teacher.bodies()) == 4 and student.straggling == 2)
    flags = ("--rm-type", "math", "--task-reward-weight", "1", "--label-key", "answer")
    manager = make(
        *(tmp_path, student, teacher, "--rollout-deadline", str(FAR), "--opd-max-failed-frac", "0", *flags),
        *("--save-debug-rollout-data", str(tmp_path / "recorded")),
        *(("--custom-generate-function-path", "planted_deadline.own") if custom else ()),
    )
    batch = manager.generate(0)
    pictures = manager.pictures(batch.image_hashes())
    manager.close()
    metrics, late = batch.metrics, [s for s in batch.samples if s.status is SampleStatus.ABORTED]
    assert len(late) == len(student.aborted) == metrics["rollout/aborted_samples"] == 2
    assert (metrics["rollout/failed_samples"], metrics["teacher/failed_samples"]) == (0, 0)
    assert metrics["teacher/aligned_frac"] == 1.0
    assert (metrics["response_length"], metrics["truncated_share"], metrics["reward"]) == (3.0, 0.0, 1.0)
    assert len(teacher.bodies()) == 4, "an aborted response is not scored"
    for sample in late:
        assert "task_reward" not in sample.metadata
        assert (sample.loss_mask, sample.reward) == ([], 0.0)
    (shard,) = build_shards(manager._args, batch.samples, pictures, 1, 0)
    assert {s.index for s in shard.samples} == {s.index for s in batch.samples if s not in late}
    assert (shard.steps[0].num_samples, shard.steps[0].num_tokens) == (4, 12)
    replayed = RecordedRollouts(
        rollout_args("--load-debug-rollout-data", str(tmp_path / "recorded"), *flags, rm_url=None)
    ).generate(0)
    assert [s.status for s in replayed.samples] == [s.status for s in batch.samples]
    assert replayed.metrics["rollout/aborted_samples"] == 2
    (again,) = build_shards(manager._args, replayed.samples, pictures, 1, 0)
    assert again.steps == shard.steps


def test_the_clock_alone_ends_a_rollout_that_nobody_answers(
    tmp_path: Path, student: FakeEngine, teacher: FakeEngine
) -> None:
    student.fault = "straggle"
    manager = make(tmp_path, student, teacher, "--rollout-deadline", "0.5", "--rollout-concurrency", "2")
    start = time.monotonic()
    with pytest.raises(DeadlineError, match=r"rollout 0: --rollout-deadline 0\.5 cut off 6 of 6 .* drop it"):
        manager.generate(0)
    manager.close()
    assert time.monotonic() - start >= 0.5
    assert student.straggling == 0
    assert len(student.bodies()) <= 2
    assert teacher.requests == []


def test_too_few_samples_for_the_steps_name_the_flag() -> None:
    samples = [prompt_sample(index, status=SampleStatus.ABORTED) for index in range(4)]
    args = rollout_args("--rollout-deadline", "5")
    with pytest.raises(ValueError, match=r"'aborted': 4.*--rollout-deadline"):
        build_shards(args, samples, {}, 1, 0)
