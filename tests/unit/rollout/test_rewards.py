from __future__ import annotations

import json
import math
import sys
import types
from typing import Any

import aiohttp
import pytest
import torch
from aiohttp import web
from aiohttp.test_utils import TestServer

from slime.engines.errors import ScoreMismatchError
from slime.rollout.failures import Failures
from slime.rollout.rewards import Rewards, TeacherKeyError
from slime.utils.types import Sample, SampleStatus
from tests.fakes.rollouts import answered_sample, facts, rollout_args, teacher_tensor

PLUGIN = "planted_plugin"
TRIPLES = [[None, 42, None], [-1.0, 11, None], [-2.0, 12, None], [-3.0, 2, None]]


async def score(args: Any, sample: Sample, **kwargs: Any) -> Any:
    return {"meta_info": {"input_token_logprobs": [list(triple) for triple in TRIPLES]}}


def attach(args: Any, samples: list[Sample], **kwargs: Any) -> tuple[list[float], list[float]]:
    for sample in samples:
        sample.teacher_log_probs = teacher_tensor(-1.0, -2.0, -3.0)
    return [0.0] * len(samples), [0.0] * len(samples)


def rewards(monkeypatch: pytest.MonkeyPatch, *flags: str, reward: Any = score, post: Any = attach) -> Rewards:
    module = types.ModuleType(PLUGIN)
    vars(module).update(reward=reward, post=post)
    monkeypatch.setitem(sys.modules, PLUGIN, module)
    paths = ("--custom-rm-path", f"{PLUGIN}.reward", "--custom-reward-post-process-path", f"{PLUGIN}.post")
    return Rewards(rollout_args(*paths, *flags), facts())


async def judged(judges: Rewards, *samples: Sample) -> list[Sample]:
    failures = Failures(rollout_args(), len(samples))
    for sample in samples:
        await judges.judge(sample, failures)
    await judges.finish(list(samples))
    return list(samples)


async def test_pure_distillation_grades_and_trains_on_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    right, wrong = answered_sample(), answered_sample(1, label="5")
    await judged(rewards(monkeypatch), right, wrong)
    assert [sample.metadata["task_reward"] for sample in (right, wrong)] == [1.0, 0.0]
    assert [sample.metadata["train_reward"] for sample in (right, wrong)] == [0.0, 0.0]
    assert right.reward == 0.0
    assert right.teacher_log_probs is not None
    assert right.teacher_log_probs.tolist() == [-1.0, -2.0, -3.0]


async def test_the_task_stream_is_the_unweighted_grade(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ("--rm-type", "math", "--task-reward-weight", "0.5")
    right, wrong = answered_sample(), answered_sample(1, label="5")
    await judged(rewards(monkeypatch, *flags), right, wrong)
    assert [sample.reward for sample in (right, wrong)] == [1.0, 0.0]
    assert [sample.metadata["task_reward"] for sample in (right, wrong)] == [1.0, 0.0]
    assert [sample.metadata["train_reward"] for sample in (right, wrong)] == [0.0, 0.0], "the plugin's own"


async def test_a_hybrid_plugin_returns_its_own_rewards(monkeypatch: pytest.MonkeyPatch) -> None:
    def hybrid(args: Any, samples: list[Sample], **kwargs: Any) -> tuple[list[float], list[float]]:
        attach(args, samples)
        return [1.0] * len(samples), [0.25] * len(samples)

    (sample,) = await judged(rewards(monkeypatch, post=hybrid), answered_sample())
    assert (sample.metadata["raw_reward"], sample.metadata["train_reward"]) == (1.0, 0.25)


@pytest.mark.parametrize("checks_status", [True, False])
async def test_a_plugin_without_a_header_is_told_that_the_teacher_wants_a_key(
    monkeypatch: pytest.MonkeyPatch, checks_status: bool
) -> None:
    async def refused(request: web.Request) -> web.Response:
        assert "Authorization" not in request.headers
        return web.json_response({"error": "Unauthorized"}, status=401)

    app = web.Application()
    app.router.add_post("/generate", refused)

    async def upstream(args: Any, sample: Sample, **kwargs: Any) -> Any:
        async with aiohttp.ClientSession() as session, session.post(url, json={}) as answer:
            if checks_status:
                answer.raise_for_status()
            return await answer.json()

    async with TestServer(app) as server:
        url = str(server.make_url("/generate"))
        with pytest.raises(TeacherKeyError, match=r"planted_plugin\.reward sent none.*SLIME_ENGINE_API_KEY"):
            await judged(rewards(monkeypatch, reward=upstream), answered_sample())


async def test_task_reward_twice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def hybrid(args: Any, samples: list[Sample], **kwargs: Any) -> tuple[list[float], list[float]]:
        attach(args, samples)
        return [1.0] * len(samples), [1.0] * len(samples)

    judges = rewards(monkeypatch, "--rm-type", "math", "--task-reward-weight", "0.5", post=hybrid)
    with pytest.raises(ValueError, match="post returns rewards of its own"):
        await judged(judges, answered_sample())


async def test_without_a_label_nothing_is_graded(monkeypatch: pytest.MonkeyPatch) -> None:
    (sample,) = await judged(rewards(monkeypatch), answered_sample(label=None))
    assert "task_reward" not in sample.metadata
    with pytest.raises(ValueError, match="--label-key"):
        await judged(rewards(monkeypatch, "--rm-type", "math"), answered_sample(label=None))


async def test_a_plugin_that_does_not_check_its_teacher_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ScoreMismatchError, match="sample 3"):
        await judged(rewards(monkeypatch), answered_sample(3, response=(11, 13, 2)))


@pytest.mark.parametrize(
    "values",
    [None, [-1.0, -2.0, -3.0], torch.zeros(4), torch.zeros(1, 3), torch.tensor([0.0, math.nan, 0.0])],
)
async def test_what_a_plugin_leaves_is_checked(monkeypatch: pytest.MonkeyPatch, values: Any) -> None:
    def post(args: Any, samples: list[Sample], **kwargs: Any) -> tuple[list[float], list[float]]:
        for sample in samples:
            sample.teacher_log_probs = values
        return [0.0], [0.0]

    with pytest.raises(ValueError, match="teacher"):
        await judged(rewards(monkeypatch, post=post), answered_sample())


@pytest.mark.parametrize("result", [([0.0], []), ([0.0], [math.nan]), ([], [0.0])])
async def test_one_finite_reward_a_sample(monkeypatch: pytest.MonkeyPatch, result: Any) -> None:
    def post(args: Any, samples: list[Sample], **kwargs: Any) -> Any:
        attach(args, samples)
        return result

    with pytest.raises(ValueError, match="post-processing returned"):
        await judged(rewards(monkeypatch, post=post), answered_sample())


async def test_log_probs_are_float32_in_their_own_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = torch.arange(1000, dtype=torch.float64)

    def post(args: Any, samples: list[Sample], **kwargs: Any) -> tuple[list[float], list[float]]:
        samples[0].teacher_log_probs = whole[-3:]
        return [0.0], [0.0]

    (sample,) = await judged(rewards(monkeypatch, post=post), answered_sample())
    values = sample.teacher_log_probs
    assert values is not None
    assert values.dtype == torch.float32
    assert values.untyped_storage().nbytes() == 12


@pytest.mark.parametrize("status", [SampleStatus.FAILED, SampleStatus.ABORTED])
async def test_a_failed_sample_is_masked_and_asks_nobody(
    monkeypatch: pytest.MonkeyPatch, status: SampleStatus
) -> None:
    async def never(args: Any, sample: Sample, **kwargs: Any) -> Any:
        assert sample.index == 0
        return await score(args, sample)

    good, failed = answered_sample(), answered_sample(1, status=status, rollout_log_probs=None)
    await judged(rewards(monkeypatch, reward=never), good, failed)
    assert failed.loss_mask == [0, 0, 0]
    assert failed.rollout_log_probs == [0.0, 0.0, 0.0]
    assert failed.teacher_log_probs is not None
    assert failed.teacher_log_probs.tolist() == [0.0, 0.0, 0.0]
    assert failed.metadata["train_reward"] == 0.0
    assert good.loss_mask is None


async def test_without_distillation_the_rule_is_the_reward() -> None:
    args = _grpo_args("--rm-type", "math")
    (sample,) = await judged(Rewards(args, facts()), answered_sample())
    assert sample.reward == sample.metadata["task_reward"] == sample.metadata["raw_reward"] == 1.0
    assert sample.teacher_log_probs is None


@pytest.mark.parametrize("weight", [0.0, 0.5])
async def test_with_a_teacher_in_the_trainer_grades_count_by_their_weight(weight: float) -> None:
    teacher = (
        "--use-opd",
        "--opd-type",
        "megatron",
        "--opd-teacher-load",
        "t",
        "--train-backend",
        "megatron",
    )
    graded = ("--rm-type", "math", "--label-key", "answer", "--task-reward-weight", str(weight))
    (sample,) = await judged(Rewards(_grpo_args(*teacher, *graded), facts()), answered_sample())
    assert sample.metadata["task_reward"] == sample.metadata["raw_reward"] == 1.0
    assert sample.metadata["train_reward"] == 0.0
    assert sample.reward == (1.0 if weight else 0.0)
    assert sample.teacher_log_probs is None


async def test_a_plain_reward_must_be_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    async def reward(args: Any, sample: Sample, **kwargs: Any) -> Any:
        return {"accuracy": 0.75}

    module = types.ModuleType(PLUGIN)
    vars(module).update(reward=reward)
    monkeypatch.setitem(sys.modules, PLUGIN, module)
    args = _grpo_args("--custom-rm-path", f"{PLUGIN}.reward")
    with pytest.raises(ValueError, match="--reward-key"):
        await judged(Rewards(args, facts()), answered_sample())
    keyed = _grpo_args("--custom-rm-path", f"{PLUGIN}.reward", "--reward-key", "accuracy")
    (sample,) = await judged(Rewards(keyed, facts()), answered_sample())
    assert sample.metadata["train_reward"] == 0.75


def test_a_path_that_leads_nowhere_is_a_clear_error() -> None:
    with pytest.raises(ValueError, match="no_such_module"):
        Rewards(rollout_args("--custom-rm-path", "no_such_module.f"), facts())
    with pytest.raises(ValueError, match="nothing"):
        Rewards(rollout_args("--custom-rm-path", "slime.rollout.on_policy_distillation.nothing"), facts())


def _grpo_args(*flags: str) -> Any:
    from slime.arguments import parse_args
    from tests.fakes.rollouts import CHECKPOINT

    return parse_args(
        ["--hf-checkpoint", CHECKPOINT, "--prompt-data", "x.jsonl", "--num-rollout", "1", *flags]
    )


@pytest.mark.parametrize(
    "error",
    [
        aiohttp.ClientPayloadError("cut"),
        aiohttp.ServerDisconnectedError(),
        OSError("refused"),
        json.JSONDecodeError("no JSON", "<html>", 0),
    ],
)
async def test_the_server_errors_of_a_plugin_are_within_the_budget(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    async def fails_once(args: Any, sample: Sample, **kwargs: Any) -> Any:
        if sample.index == 0:
            raise error
        return await score(args, sample)

    flags = ("--opd-misaligned", "mask", "--opd-max-failed-frac", "0.5")
    judges = rewards(monkeypatch, *flags, reward=fails_once)
    samples = [answered_sample(0), answered_sample(1)]
    failures = Failures(rollout_args(*flags), 2)
    for sample in samples:
        await judges.judge(sample, failures)
    await judges.finish(samples)
    assert samples[0].status == SampleStatus.FAILED
    assert samples[0].loss_mask == [0, 0, 0]
    assert samples[1].status == SampleStatus.COMPLETED


@pytest.mark.parametrize(
    "answer",
    [
        {"input_token_logprobs": [[None, 42, None], [-1.0, 11, None], [None, 12, None], [-3.0, 2, None]]},
        {"input_token_logprobs": TRIPLES, "finish_reason": {"type": "abort", "message": "gone"}},
    ],
)
async def test_a_plugins_unusable_answer_is_a_failed_sample(
    monkeypatch: pytest.MonkeyPatch, answer: dict[str, Any]
) -> None:
    async def unusable(args: Any, sample: Sample, **kwargs: Any) -> Any:
        return {"meta_info": answer}

    flags = ("--opd-misaligned", "mask", "--opd-max-failed-frac", "1")
    judges, sample = rewards(monkeypatch, *flags, reward=unusable), answered_sample()
    failures = Failures(rollout_args(*flags), 1)
    await judges.judge(sample, failures)
    assert sample.status == SampleStatus.FAILED
    assert failures.failed == 1
