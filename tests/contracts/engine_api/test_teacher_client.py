"""The teacher's client against recorded and live answers: the tensors of a direct forward pass."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from PIL import Image

from slime.engines.api import score_payload
from slime.engines.client import EngineClient
from slime.engines.control import EngineControl
from slime.engines.pictures import data_uris
from slime.engines.scores import score_triples, top_scores
from slime.rollout.on_policy_distillation import close_teacher_clients, post_process_rewards, reward_func
from slime.utils.types import Sample
from tests.contracts.engine_api.support import (
    IMAGE_PAD,
    MODEL,
    PICTURES,
    PROMPT,
    TEXT_PROMPT,
    Engine,
    drawn_picture,
    load_exchanges,
)
from tests.contracts.reference import TOLERANCE, Reference

RESPONSE = [278, 266, 258, 271, 313, 267, 13, 342]
TOP_K = 6
GROUP = 8
VOCABULARY = 384


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(MODEL)


def answered(
    reference: Reference,
    prompt: list[int],
    response: list[int],
    images: Sequence[Image.Image] = (),
    **fields: Any,
) -> Sample:
    """Return a sample with a response, as the rollout leaves it."""
    grids = reference.image_processor(images=list(images))["image_grid_thw"] if images else None
    return Sample(
        tokens=[*prompt, *response],
        response_length=len(response),
        multimodal_inputs={"images": list(images)} if images else None,
        multimodal_train_inputs={"image_grid_thw": grids} if images else None,
    )


async def score(args: Any, samples: list[Sample]) -> None:
    try:
        answers = await asyncio.gather(*(reward_func(args, sample) for sample in samples))
    finally:
        await close_teacher_clients()
    for sample, answer in zip(samples, answers, strict=True):
        sample.reward = answer
    post_process_rewards(args, samples)


def test_the_tensors_are_those_of_a_direct_forward_pass(engine: Engine, reference: Reference) -> None:
    args = argparse.Namespace(
        rm_url=engine.url + "/generate", reward_key=None, hf_checkpoint=str(MODEL), opd_top_k=TOP_K
    )
    wide, tall = drawn_picture(1), drawn_picture(2, 64, 128)
    two = [*PROMPT, 343, IMAGE_PAD, 344, 198]
    samples = [
        answered(reference, TEXT_PROMPT, RESPONSE),
        answered(reference, TEXT_PROMPT, RESPONSE[:1]),
        answered(reference, TEXT_PROMPT, []),
        answered(reference, PROMPT, RESPONSE, [wide]),
        answered(reference, PROMPT, RESPONSE * 20, [tall]),
        answered(reference, two, RESPONSE, [tall, wide]),
    ]
    asyncio.run(score(args, samples))
    for sample in samples:
        images = (sample.multimodal_inputs or {}).get("images", ())
        count = sample.response_length
        prompt_length = len(sample.tokens) - count
        everything = reference.logits(sample.tokens, images).log_softmax(-1)[prompt_length - 1 : -1]
        assert sample.teacher_log_probs is not None
        assert sample.teacher_top_ids is not None
        assert sample.teacher_top_log_probs is not None
        assert sample.teacher_tail_mass is not None
        expected = everything.gather(-1, torch.tensor(sample.response_tokens).long()[:, None])[:, 0]
        torch.testing.assert_close(sample.teacher_log_probs, expected, atol=TOLERANCE, rtol=0)
        top = everything.topk(TOP_K, dim=-1).values
        torch.testing.assert_close(sample.teacher_top_log_probs, top, atol=TOLERANCE, rtol=0)
        own = everything.gather(-1, sample.teacher_top_ids.long())
        named = sample.teacher_top_ids > 0  # ids from the last one on are reported as 0
        torch.testing.assert_close(own[named], top[named], atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(sample.teacher_tail_mass, 1 - top.exp().sum(-1), atol=TOLERANCE, rtol=0)


def test_a_group_prefills_prompt_and_picture_once(engine: Engine, reference: Reference) -> None:
    """The samples of a group, sent at once, find the prefix; their scores are those of each alone."""
    image = drawn_picture(3)
    (picture,) = asyncio.run(data_uris([image]))
    (grid,) = reference.image_processor(images=[image])["image_grid_thw"]
    length = len(PROMPT) - 1 + int(grid.prod()) // reference.image_processor.merge_size**2
    responses = [[*RESPONSE[turn:], *RESPONSE[:turn], 20 + turn] for turn in range(GROUP)]
    payloads = [score_payload([*PROMPT, *response], length - 1, [picture]) for response in responses]

    async def ask() -> tuple[list[Any], list[Any]]:
        async with (
            EngineClient([engine.url]) as client,
            EngineControl([engine.url], admin_key=engine.admin_key) as control,
        ):
            alone = []
            for payload in payloads:
                await control.flush_cache()
                alone.append(await client.score(payload))
            await control.flush_cache()
            return alone, await asyncio.gather(*(client.score(payload, group="g") for payload in payloads))

    alone, together = asyncio.run(ask())
    for first, second, response in zip(alone, together, responses, strict=True):
        values = [
            torch.tensor([triple[0] for triple in score_triples(answer, response, vocab_size=VOCABULARY)[1:]])
            for answer in (first, second)
        ]
        assert len(first["meta_info"]["input_token_logprobs"]) == len(response) + 1
        torch.testing.assert_close(values[0], values[1], atol=1e-4, rtol=0)
    assert [answer["meta_info"]["cached_tokens"] for answer in alone] == [0] * GROUP
    cached = sorted(answer["meta_info"]["cached_tokens"] for answer in together)
    if engine.kind == "transformers":
        assert cached == [0] * GROUP, "this engine has no prefix cache, and says so"
    else:
        assert cached == [0] + [length - 1] * (GROUP - 1)


RECORDED = {
    "10_text_score": (),
    "20_img_unexpanded_uri": ("first",),
    "26_img_other": ("second",),
    "30_text_start_1": (),
    "31_img_start_24": ("first",),
    "33_top5": (),
    "44_two_images_two_pads": ("first", "square"),
}


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_answers_are_read_as_the_forward_pass_says(name: str, reference: Reference) -> None:
    exchange = load_exchanges()[name]
    tokens, count = exchange["request"]["input_ids"], 5
    images = [Image.open(PICTURES / f"{picture}.png").convert("RGB") for picture in RECORDED[name]]
    triples = score_triples(exchange["response"], tokens[-count:], vocab_size=VOCABULARY)
    values = torch.tensor([triple[0] for triple in triples[1:]])
    torch.testing.assert_close(values, reference.log_probs(tokens, images, count), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ["33_top5", "59_flat"])
def test_recorded_top_k_is_read_as_the_forward_pass_says(name: str, reference: Reference) -> None:
    exchange = load_exchanges()[name]
    request, count = exchange["request"], 4
    triples = score_triples(exchange["response"], request["input_ids"][-count:], vocab_size=VOCABULARY)
    top = top_scores(exchange["response"], triples, request["top_logprobs_num"])
    everything = reference.logits(request["input_ids"]).log_softmax(-1)[-count - 1 : -1]
    expected = everything.topk(request["top_logprobs_num"], dim=-1).values
    torch.testing.assert_close(torch.from_numpy(top.log_probs), expected, atol=TOLERANCE, rtol=0)
