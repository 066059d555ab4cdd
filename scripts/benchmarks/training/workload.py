"""What both ways train on: a random Qwen3-VL, and scored samples of mixed lengths with pictures."""

from __future__ import annotations

import hashlib
import io
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.utils.logging import disable_progress_bar

from slime.tiny.model import save_processor
from slime.tiny.tokenizer import build_tokenizer
from slime.utils.types import Sample, SampleStatus

PATCH, MERGE = 16, 2
SHORTEST = 32
"""Tokens of the shortest response."""
LEARNING_RATE = 1e-6


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where and how a step is computed."""

    device: str = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the computation; weights and optimizer are float32."""
    gradient_checkpointing: bool = False


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One optimizer step: its samples and the model."""

    vocabulary: int = 32_768
    prompts: int = 3
    samples: int = 4
    """Of each prompt."""
    question: int = 36
    """Tokens of a prompt beside its picture."""
    longest: int = 512
    """Tokens of the longest response."""
    side: int = 256
    """Of a picture, in pixels."""
    top_k: int = 0
    """Likeliest tokens of the teacher at each position; 0: its score of the sampled token alone."""
    micro_batches: int = 2
    """Of the plain way, with as many samples each; ours gets as many of as many tokens, if they fit."""

    @property
    def total(self) -> int:
        """Return the number of samples."""
        return self.prompts * self.samples

    @property
    def prompt(self) -> int:
        """Return the tokens of a prompt, its picture expanded."""
        return self.question + (self.side // (PATCH * MERGE)) ** 2

    def responses(self) -> list[int]:
        """Return the length of each response: evenly spread in the logarithm, in a mixed order."""
        steps = max(1, self.total - 1)
        lengths = [
            round(SHORTEST * (self.longest / SHORTEST) ** (place / steps)) for place in range(self.total)
        ]
        random.Random(0).shuffle(lengths)
        return lengths

    @property
    def tokens(self) -> int:
        """Return the tokens of all samples, prompts and pictures included."""
        return sum(self.responses()) + self.total * self.prompt

    @property
    def padded_tokens(self) -> int:
        """Return the positions of the plain way's micro-batches."""
        lengths = self.responses()
        rows = self.total // self.micro_batches
        return sum(
            rows * (self.prompt + max(lengths[start : start + rows])) for start in range(0, self.total, rows)
        )

    @property
    def budget(self) -> int:
        """Return the tokens of one of our micro-batches."""
        return max(-(-self.tokens // self.micro_batches) + SHORTEST, self.prompt + self.longest)


def save_model(folder: Path, vocabulary: int) -> None:
    """Write a checkpoint with random weights: 4 layers of width 256, and a small vision tower."""
    save_processor(folder)
    ids = build_tokenizer().get_vocab()
    text = {
        "vocab_size": vocabulary,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 8_192,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "mrope_interleaved": True,
            "mrope_section": [12, 10, 10],
        },
        "tie_word_embeddings": True,
    }
    vision = {
        "depth": 2,
        "deepstack_visual_indexes": [0],
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_heads": 2,
        "out_hidden_size": 256,
        "num_position_embeddings": 256,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
    }
    config = Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    disable_progress_bar()
    Qwen3VLForConditionalGeneration(config).float().save_pretrained(folder)


def make_samples(shape: Shape) -> tuple[list[Sample], dict[str, bytes]]:
    """Return samples as a rollout leaves them, and their pictures by hash; one picture a prompt."""
    ids = build_tokenizer().get_vocab()
    start, pad, end = (ids[name] for name in ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>"))
    generator = torch.Generator().manual_seed(0)

    def text(count: int) -> list[int]:
        return torch.randint(len(ids), shape.vocabulary, (count,), generator=generator).tolist()

    samples: list[Sample] = []
    pictures: dict[str, bytes] = {}
    grid = (1, shape.side // PATCH, shape.side // PATCH)
    prompts = []
    for _ in range(shape.prompts):
        png = _picture(shape.side, generator)
        sha256 = hashlib.sha256(png).hexdigest()
        pictures[sha256] = png
        prompts.append((sha256, [start, pad, end, *text(shape.question - 2)]))
    for number, length in enumerate(shape.responses()):
        sha256, prompt = prompts[number // shape.samples]
        samples.append(
            Sample(
                index=number,
                group_index=number // shape.samples,
                tokens=prompt + text(length),
                multimodal_train_inputs={"image_hashes": [sha256], "image_grid_thw": [grid]},
                response_length=length,
                rollout_log_probs=(-10 - torch.rand(length, generator=generator)).tolist(),
                teacher_log_probs=-10 - torch.rand(length, generator=generator),
                **_top_k(length, shape, generator),
                status=SampleStatus.COMPLETED,
                metadata={"train_reward": 0.0, "task_reward": 0.0},
            )
        )
    return samples, pictures


def _top_k(length: int, shape: Shape, generator: torch.Generator) -> dict[str, Any]:
    """Return a teacher's top-k, half of its mass in the tail; nothing where it is not asked for."""
    if shape.top_k == 0:
        return {}
    first = torch.randint(shape.vocabulary - shape.top_k, (length, 1), generator=generator)
    shares = torch.rand(length, shape.top_k, generator=generator).sort(descending=True).values + 0.1
    return {
        "teacher_top_ids": (first + torch.arange(shape.top_k)).int(),
        "teacher_top_log_probs": (0.5 * shares / shares.sum(dim=1, keepdim=True)).log(),
        "teacher_tail_mass": torch.full((length,), 0.5),
    }


def _picture(side: int, generator: torch.Generator) -> bytes:
    pixels = torch.randint(0, 256, (side, side, 3), generator=generator, dtype=torch.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, format="PNG")
    return buffer.getvalue()
