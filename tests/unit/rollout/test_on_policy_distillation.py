from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from slime.engines.errors import (
    AnswerError,
    EngineAbortedError,
    EngineTimeoutError,
    EngineUnreachableError,
    HttpError,
    MissingScoreError,
    PictureMismatchError,
    ScoreMismatchError,
    ShortScoresError,
    TokenMismatchError,
    WrongAnswerError,
)
from slime.rollout.on_policy_distillation import (
    close_teacher_clients,
    post_process_rewards,
    reward_func,
    teacher_log_probs,
    teacher_settings,
)
from slime.utils.types import Sample
from tests.fakes.engine_server import FakeEngine, log_prob, serve
from tests.fakes.impatience import time_is_out_when
from tests.fakes.rollouts import CHECKPOINT, GRID, answered_sample, facts, fake_engine, picture, rollout_args

PICTURE_TOKENS = 6
PROMPT = 3 + PICTURE_TOKENS
"""Expanded length of the sample's prompt."""


@pytest.fixture
def teacher() -> Iterator[FakeEngine]:
    with serve(fake_engine()) as fake:
        yield fake


@pytest.fixture(autouse=True)
async def _closed() -> AsyncIterator[None]:
    yield
    await close_teacher_clients()


def args_for(teacher: FakeEngine, *flags: str) -> Any:
    return rollout_args(*flags, rm_url=teacher.url + "/generate")


def expected(response: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor([log_prob(token, PROMPT + place, 1) for place, token in enumerate(response)])


async def test_the_teacher_scores_the_sampled_ids(teacher: FakeEngine) -> None:
    args, sample = args_for(teacher), answered_sample()
    sample.reward = await reward_func(args, sample)
    assert [triple[1] for triple in sample.reward["meta_info"]["input_token_logprobs"]] == [42, 11, 12, 2]
    assert sample.reward["meta_info"]["input_token_logprobs"][0][0] is None
    assert sample.teacher_log_probs is None
    assert post_process_rewards(args, [sample]) == ([0.0], [0.0])
    assert sample.teacher_log_probs is not None
    assert sample.teacher_log_probs.dtype == torch.float32
    torch.testing.assert_close(sample.teacher_log_probs, expected((11, 12, 2)))


async def test_the_request_asks_for_the_response_alone(teacher: FakeEngine) -> None:
    sample = answered_sample()
    await reward_func(args_for(teacher), sample)
    (body,) = teacher.bodies()
    assert body["input_ids"] == sample.tokens
    assert body["logprob_start_len"] == PROMPT - 1
    assert body["sampling_params"]["max_new_tokens"] == 0
    assert len(body["image_data"]) == 1
    assert body["image_data"][0].startswith("data:image/png;base64,")


async def test_an_expanded_prompt_is_sent_with_one_pad_an_image(teacher: FakeEngine) -> None:
    pad = facts().image_token_id
    sample = answered_sample(tokens=[40, 41, *[pad] * PICTURE_TOKENS, 42, 11, 12, 2])
    sample.multimodal_train_inputs = {"image_grid_thw": torch.tensor([GRID])}
    await reward_func(args_for(teacher), sample)
    assert teacher.bodies()[0]["input_ids"] == [40, 41, pad, 42, 11, 12, 2]
    assert teacher.bodies()[0]["logprob_start_len"] == PROMPT - 1


async def test_without_grids_scores_are_read_from_the_end(teacher: FakeEngine) -> None:
    sample = answered_sample(multimodal_train_inputs=None)
    reward = await reward_func(args_for(teacher), sample)
    assert teacher.bodies()[0]["logprob_start_len"] == 3
    torch.testing.assert_close(teacher_log_probs(reward, 3), expected((11, 12, 2)))


async def test_an_expanded_prompt_tells_its_length_without_grids(teacher: FakeEngine) -> None:
    pad = facts().image_token_id
    sample = answered_sample(
        tokens=[40, 41, *[pad] * PICTURE_TOKENS, 42, 11, 12, 2], multimodal_train_inputs=None
    )
    await reward_func(args_for(teacher), sample)
    assert teacher.bodies()[0]["logprob_start_len"] == PROMPT - 1


async def test_text_needs_no_picture(teacher: FakeEngine) -> None:
    sample = answered_sample(
        tokens=[40, 41, 42, 11, 12, 2], multimodal_inputs=None, multimodal_train_inputs=None
    )
    await reward_func(args_for(teacher), sample)
    assert "image_data" not in teacher.bodies()[0]
    assert teacher.bodies()[0]["logprob_start_len"] == 2


async def test_an_empty_response_asks_nobody(teacher: FakeEngine) -> None:
    args, sample = args_for(teacher), answered_sample(response=())
    sample.reward = await reward_func(args, sample)
    post_process_rewards(args, [sample])
    assert sample.teacher_log_probs is not None
    assert sample.teacher_log_probs.shape == (0,)
    assert teacher.requests == []


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("shift", TokenMismatchError),
        ("retokenise", TokenMismatchError),
        ("drop_image", PictureMismatchError),
        ("clip", TokenMismatchError),
        ("short", ShortScoresError),
        ("other", TokenMismatchError),
        ("null", MissingScoreError),
        ("nan", MissingScoreError),
        ("html", AnswerError),
        ("truncated_json", AnswerError),
        ("abort", EngineAbortedError),
        ("another_request", WrongAnswerError),
        ("400", HttpError),
        ("429", HttpError),
        ("500", HttpError),
        ("503", HttpError),
        ("hang", EngineTimeoutError),
        ("reset", EngineUnreachableError),
    ],
)
async def test_every_fault_is_a_named_error(
    teacher: FakeEngine, monkeypatch: pytest.MonkeyPatch, fault: str, error: type[Exception]
) -> None:
    time_is_out_when(monkeypatch, lambda: teacher.hanging > 0)
    args = args_for(teacher, "--teacher-patience", "0")
    await reward_func(args, answered_sample(index=16))
    teacher.fault = fault
    with pytest.raises(error) as caught:
        await reward_func(args, answered_sample(index=17))
    assert type(caught.value) is error
    assert teacher.url in str(caught.value)


async def test_a_thousand_good_answers_of_all_sizes_pass(teacher: FakeEngine) -> None:
    rng = random.Random(0)
    args, pad = args_for(teacher), facts().image_token_id
    ids = [token for token in range(facts().vocab_size) if token != pad]
    samples = []
    for index in range(1000):
        response = tuple(rng.choices(ids, k=rng.randrange(0, 60)))
        pictures = rng.randrange(0, 3)
        prompt = rng.choices(ids, k=rng.randrange(1, 30)) + [
            token for _ in range(pictures) for token in (pad, 42)
        ]
        sample = answered_sample(index, response, tokens=[*prompt, *response], group_index=index // 8)
        sample.multimodal_inputs = {"images": [picture()] * pictures} if pictures else None
        sample.multimodal_train_inputs = {"image_grid_thw": [GRID] * pictures} if pictures else None
        samples.append(sample)
    answers = await asyncio.gather(*(reward_func(args, sample) for sample in samples))
    for sample, answer in zip(samples, answers, strict=True):
        sample.reward = answer
    post_process_rewards(args, samples)
    for sample in samples:
        start = len(sample.tokens) - sample.response_length
        pictures = len(sample.multimodal_inputs["images"]) if sample.multimodal_inputs else 0
        before = start + pictures * (PICTURE_TOKENS - 1)
        wanted = [
            log_prob(token, before + place, pictures) for place, token in enumerate(sample.response_tokens)
        ]
        assert sample.teacher_log_probs is not None
        torch.testing.assert_close(sample.teacher_log_probs, torch.tensor(wanted))


@pytest.mark.parametrize("form", ["base64", "flat", "long"])
async def test_the_top_k_is_kept_compactly_with_its_tail(teacher: FakeEngine, form: Any) -> None:
    teacher.top_form = form
    args, sample = args_for(teacher, "--opd-top-k", "3"), answered_sample()
    sample.reward = await reward_func(args, sample)
    post_process_rewards(args, [sample])
    assert teacher.bodies()[0]["top_logprobs_num"] == 3
    ids, log_probs, tail = sample.teacher_top_ids, sample.teacher_top_log_probs, sample.teacher_tail_mass
    assert ids is not None
    assert log_probs is not None
    assert tail is not None
    assert (ids.dtype, log_probs.dtype, tail.dtype) == (torch.int32, torch.float32, torch.float32)
    assert ids.tolist() == [[11, 1, 2], [12, 1, 2], [2, 1, 3]]
    torch.testing.assert_close(log_probs, expected((11, 12, 2))[:, None] - torch.arange(3.0))
    torch.testing.assert_close(tail, (1 - log_probs.exp().sum(1)).clamp(min=0))


async def test_a_top_k_of_other_positions_is_refused(teacher: FakeEngine) -> None:
    teacher.fault = "shifted_top"
    with pytest.raises(ScoreMismatchError, match="top-k does not belong"):
        await reward_func(args_for(teacher, "--opd-top-k", "3"), answered_sample())


async def test_a_server_without_top_k_is_named(teacher: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher, "_top", lambda *_: {})
    with pytest.raises(AnswerError, match="--opd-top-k"):
        await reward_func(args_for(teacher, "--opd-top-k", "3"), answered_sample())


async def test_an_empty_response_has_an_empty_top_k(teacher: FakeEngine) -> None:
    args, sample = args_for(teacher, "--opd-top-k", "3"), answered_sample(response=())
    sample.reward = await reward_func(args, sample)
    post_process_rewards(args, [sample])
    assert sample.teacher_top_ids is not None
    assert sample.teacher_top_ids.shape == (0, 3)


@pytest.mark.parametrize("metadata", [{}, {"data_source": "algebra"}])
async def test_a_sample_without_a_teacher_of_its_own_is_an_error(metadata: dict[str, str]) -> None:
    args = rollout_args("--opd-teachers", "geometry=http://127.0.0.1:9/generate", rm_url=None)
    with pytest.raises(ValueError, match="--opd-teachers names geometry"):
        await reward_func(args, answered_sample(metadata=metadata))


async def test_a_sampled_pad_is_refused_before_it_is_sent(teacher: FakeEngine) -> None:
    pad = facts().image_token_id
    assert pad is not None
    with pytest.raises(PictureMismatchError, match="sampled the image pad"):
        await reward_func(args_for(teacher), answered_sample(response=(11, pad, 2)))
    assert teacher.requests == []


async def test_pads_and_pictures_must_agree(teacher: FakeEngine) -> None:
    sample = answered_sample(multimodal_inputs={"images": [picture(), picture()]})
    with pytest.raises(PictureMismatchError, match="2 pictures and its prompt 1 image pad"):
        await reward_func(args_for(teacher), sample)


async def test_the_samples_of_a_group_go_to_one_teacher() -> None:
    with serve(fake_engine()) as one, serve(fake_engine()) as other:
        args: Any = SimpleNamespace(
            rm_url=one.url, rm_urls=[one.url, other.url], reward_key=None, hf_checkpoint=CHECKPOINT
        )
        for index in range(4):
            await reward_func(args, answered_sample(index, group_index=index // 2))
    assert [len(one.requests), len(other.requests)] == [2, 2]


def test_too_few_scores_are_an_error() -> None:
    answer = {"meta_info": {"input_token_logprobs": [[None, 1, None], [-1.0, 2, None]]}}
    assert teacher_log_probs(answer, 1).tolist() == [-1.0]
    assert teacher_log_probs(answer, 0).shape == (0,)
    with pytest.raises(MissingScoreError, match="null"):
        teacher_log_probs(answer, 2)
    with pytest.raises(ShortScoresError, match="scored 2 positions"):
        teacher_log_probs(answer, 3)


def test_no_teacher_is_a_clear_error() -> None:
    class Bare:
        rm_url = None
        reward_key = None

    with pytest.raises(ValueError, match="--rm-url"):
        teacher_settings(Bare())


def test_reward_key_picks_the_answer() -> None:
    answer = {"meta_info": {"input_token_logprobs": [[None, 1, None], [-1.5, 2, None]]}}
    sample = Sample(index=0, tokens=[1, 2], response_length=1, reward={"teacher": answer})
    post_process_rewards(rollout_args("--reward-key", "teacher"), [sample])
    assert sample.teacher_log_probs is not None
    assert sample.teacher_log_probs.tolist() == [-1.5]
