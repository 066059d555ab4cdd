"""Greedy accuracy of a tiny model on generated problems, with or without their pictures.

For pre-training and its tests only: a job grades through its engine and the task's rule.
"""

import re
from collections.abc import Sequence
from typing import Any, cast

import torch
from PIL import Image

from slime.tiny.examples import Encoder
from slime.tiny.model import TinyModel
from slime.tiny.problems import Problem

MAX_NEW_TOKENS = 64
"""The longest solution has fewer; what has not ended by then is cut, and wrong."""
_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")


def greedy_accuracy(
    model: TinyModel,
    encoder: Encoder,
    rows: Sequence[Problem],
    *,
    blank: bool = False,
    batch_size: int = 128,
) -> float:
    """Return the share of rows whose response ends and boxes the answer.

    With `blank`, every picture is white.
    """
    right = 0
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        images = [row.image for row in part if row.image is not None]
        if blank:
            images = [Image.new("RGB", image.size, "white") for image in images]
        responses = respond(model, encoder, [row.text for row in part], images)
        right += sum(boxed_answer(text) == row.answer for text, row in zip(responses, part, strict=True))
    return right / len(rows)


@torch.no_grad()
def respond(
    model: TinyModel, encoder: Encoder, texts: Sequence[str], images: Sequence[Image.Image] = ()
) -> list[str]:
    """Answer greedily; a response keeps its end token if it got that far."""
    inputs = encoder.prompts(texts, images).inputs
    ids = cast(Any, model).generate(
        **inputs,
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
        eos_token_id=encoder.end_id,
        pad_token_id=encoder.pad_id,
    )
    new = ids[:, inputs["input_ids"].shape[1] :]
    pad = encoder.tokenizer.pad_token
    return [text.replace(pad, "") for text in encoder.tokenizer.batch_decode(new)]


def boxed_answer(response: str) -> str | None:
    r"""Return what the last `\boxed{}` of a finished response holds."""
    found = _BOXED.findall(response)
    return found[-1] if found and response.endswith("<|im_end|>") else None
