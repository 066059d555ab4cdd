"""Samples, arguments and data files for tests of the rollout side, on the shipped tiny student's
processor."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from slime.arguments import Args, parse_args
from slime.engines.model_facts import ModelFacts, model_facts
from slime.tiny.paths import checkpoint_path
from slime.utils.types import Sample, SampleStatus
from tests.fakes.engine_server import FakeEngine

CHECKPOINT = str(checkpoint_path("student"))
PICTURE_SIDES = (96, 64)
"""Width and height: 6 tokens."""
GRID = (1, 4, 6)


@cache
def facts() -> ModelFacts:
    """Return the tiny student's facts."""
    return model_facts(CHECKPOINT)


def fake_engine(**options: Any) -> FakeEngine:
    """Return a fake server of the tiny student's vocabulary."""
    image_token_id = facts().image_token_id
    assert image_token_id is not None
    return FakeEngine(image_token_id=image_token_id, vocab_size=facts().vocab_size, **options)


def picture(shade: int = 200) -> Image.Image:
    """Return a grey picture."""
    return Image.new("RGB", PICTURE_SIDES, (shade, shade, shade))


def prompt_sample(index: int = 0, group_index: int = 0, **changes: Any) -> Sample:
    """Return a sample with a picture and no response yet."""
    fields: dict[str, Any] = {
        "index": index,
        "group_index": group_index,
        "prompt": "how much?",
        "tokens": [40, 41, facts().image_token_id, 42],
        "label": "4",
        "multimodal_inputs": {"images": [picture()]},
        "multimodal_train_inputs": {"image_hashes": ["abc"], "image_grid_thw": [GRID]},
    }
    return Sample(**fields | changes)


def answered_sample(index: int = 0, response: tuple[int, ...] = (11, 12, 2), **changes: Any) -> Sample:
    """Return a sample with a response."""
    sample = prompt_sample(index)
    sample.tokens = [*sample.tokens, *response]
    sample.response = "\\boxed{4}"
    sample.response_length = len(response)
    sample.rollout_log_probs = [-1.0] * len(response)
    sample.weight_versions = ["default"]
    sample.status = SampleStatus.COMPLETED
    for name, value in changes.items():
        setattr(sample, name, value)
    return sample


def write_prompts(folder: Path, count: int = 6, label: str = "4") -> Path:
    """Write a data file of `count` prompts with a picture each."""
    rows = []
    for number in range(count):
        image = folder / f"{number}.png"
        picture(number).save(image)
        rows.append({"problem": f"<image>how much is {number}?", "answer": label, "images": [str(image)]})
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rollout_args(
    *flags: str,
    data: str = "prompts.jsonl",
    rm_url: str | None = "http://127.0.0.1:9/generate",
    distill: bool = True,
) -> Args:
    """Return the arguments of a small run with a teacher, which `distill` lets score."""
    return parse_args(
        [
            *("--hf-checkpoint", CHECKPOINT, "--prompt-data", data, "--num-rollout", "2"),
            *("--rollout-batch-size", "3", "--n-samples-per-prompt", "2", "--rollout-max-response-len", "16"),
            "--apply-chat-template",
            *(("--use-opd", "--opd-type", "sglang") if distill else ()),
            *(() if rm_url is None else ("--rm-url", rm_url)),
            *flags,
        ]
    )


def teacher_tensor(*values: float) -> torch.Tensor:
    """Return teacher log-probs."""
    return torch.tensor(values, dtype=torch.float32)
