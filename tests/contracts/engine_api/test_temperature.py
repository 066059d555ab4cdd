"""Importance weights rely on it: sampled log-probs are the tempered ones, scores are at temperature 1."""

from __future__ import annotations

import base64
import io
from typing import Any

import pytest
import torch
from PIL import Image

from tests.contracts.engine_api.support import (
    IMAGE_PAD,
    MODEL,
    NO_PADS,
    PROMPT,
    Engine,
    input_logprobs,
    output_logprobs,
    picture_uri,
)
from tests.contracts.reference import Reference


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(MODEL)


def answer_at(engine: Engine, temperature: float, **more: Any) -> dict[str, Any]:
    return engine.generate(
        input_ids=PROMPT,
        image_data=[picture_uri("first")],
        sampling_params={
            "max_new_tokens": 16,
            "temperature": temperature,
            "ignore_eos": True,
            "logit_bias": NO_PADS,
            "sampling_seed": 11,
            **more,
        },
        return_logprob=True,
    )


def direct(reference: Reference, sampled: list[int], temperature: float) -> list[float]:
    """Return the log-probs of the sampled ids through transformers' own forward pass."""
    assert IMAGE_PAD not in sampled
    picture = Image.open(io.BytesIO(base64.b64decode(picture_uri("first").partition(",")[2]))).convert("RGB")
    logits = reference.logits([*PROMPT, *sampled], [picture])[-len(sampled) - 1 : -1].clone()
    for token, bias in NO_PADS.items():
        logits[:, int(token)] += bias
    log_probs = (logits / temperature).log_softmax(-1)
    return log_probs.gather(1, torch.tensor(sampled)[:, None])[:, 0].tolist()


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.4])
def test_sampled_log_probs_are_those_of_the_tempered_distribution(
    engine: Engine, reference: Reference, temperature: float
) -> None:
    answer = answer_at(engine, temperature)
    expected = direct(reference, answer["output_ids"], temperature)
    assert output_logprobs(answer) == pytest.approx(expected, abs=1e-3)


def test_they_are_taken_before_the_filters(engine: Engine, reference: Reference) -> None:
    answer = answer_at(engine, 0.7, top_p=0.5, top_k=3)
    assert output_logprobs(answer) == pytest.approx(direct(reference, answer["output_ids"], 0.7), abs=1e-3)


def test_scores_are_at_temperature_1_whatever_is_asked(engine: Engine) -> None:
    tokens = PROMPT + answer_at(engine, 1.0)["output_ids"]
    scores = [
        input_logprobs(
            engine.generate(
                input_ids=tokens,
                image_data=[picture_uri("first")],
                sampling_params={"max_new_tokens": 0, "temperature": temperature},
                return_logprob=True,
                logprob_start_len=0,
            )
        )[1:]
        for temperature in (0.0, 0.7, 1.0)
    ]
    assert scores[0] == pytest.approx(scores[2], abs=1e-4)
    assert scores[1] == pytest.approx(scores[2], abs=1e-4)
