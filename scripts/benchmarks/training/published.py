"""Checkpoints of published shapes with random weights, for machines that have no others.

    python -m scripts.benchmarks.training.published 2B --device cuda --out FOLDER

Text and vision shapes are those of Qwen3-VL-2B and -4B; the tokenizer is the tiny one, whose ids are the
lowest of the vocabulary.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    AutoModelForImageTextToText,
    GenerationConfig,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.utils.logging import disable_progress_bar

from slime.tiny.model import save_processor
from slime.tiny.tokenizer import END, PAD, build_tokenizer

VOCABULARY = 151_936


@dataclass(frozen=True, kw_only=True)
class Published:
    """What differs between the published sizes; all others are the same."""

    hidden: int
    layers: int
    heads: int
    feed_forward: int
    vocabulary: int = VOCABULARY
    kv_heads: int = 8
    head_dim: int = 128
    vision_hidden: int = 1024
    vision_depth: int = 24
    taps: tuple[int, ...] = (5, 11, 17)


SHAPES = {
    "2B": Published(hidden=2048, layers=28, heads=16, feed_forward=6144),
    "4B": Published(hidden=2560, layers=36, heads=32, feed_forward=9728),
    "tiny": Published(
        hidden=64,
        layers=2,
        heads=4,
        feed_forward=96,
        vocabulary=512,
        kv_heads=2,
        head_dim=16,
        vision_hidden=32,
        vision_depth=2,
        taps=(0,),
    ),
}
"""By name; "tiny" has the same parts and is for a CPU."""


def build_config(shape: Published) -> Qwen3VLConfig:
    """Describe the model; embeddings and LM head are tied, as they are in both published sizes."""
    ids = build_tokenizer().get_vocab()
    half = shape.head_dim // 2
    side = half * 5 // 16  # of 64: 24, 20, 20
    text = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.feed_forward,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": 262_144,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5_000_000.0,
            "mrope_interleaved": True,
            "mrope_section": [half - 2 * side, side, side],
        },
        "tie_word_embeddings": True,
        "bos_token_id": ids[PAD],
        "eos_token_id": ids[END],
        "pad_token_id": ids[PAD],
    }
    vision = {
        "depth": shape.vision_depth,
        "deepstack_visual_indexes": list(shape.taps),
        "hidden_size": shape.vision_hidden,
        "intermediate_size": 4 * shape.vision_hidden,
        "num_heads": 16 if shape.vision_hidden >= 1024 else 2,
        "out_hidden_size": shape.hidden,
        "num_position_embeddings": 2304,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    return Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )


def checkpoint_bytes(name: str) -> int:
    """Return what a checkpoint takes on disk, about: two bytes a weight."""
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(build_config(SHAPES[name]))
    return 2 * sum(parameter.numel() for parameter in model.parameters())


def save_published(folder: Path, name: str, device: torch.device) -> None:
    """Write a bfloat16 checkpoint of that shape; its weights are drawn on `device`."""
    save_processor(folder)
    disable_progress_bar()
    ids = build_tokenizer().get_vocab()
    torch.manual_seed(0)
    with device:
        model = AutoModelForImageTextToText.from_config(build_config(SHAPES[name]), dtype=torch.bfloat16)
    model.generation_config = GenerationConfig(eos_token_id=[ids[END], ids[PAD]], pad_token_id=ids[PAD])
    model.save_pretrained(folder)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write a random checkpoint of a published shape.")
    parser.add_argument("name", choices=tuple(SHAPES))
    parser.add_argument("--device", required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(argv)
    save_published(options.out, options.name, torch.device(options.device))
    return 0


if __name__ == "__main__":
    sys.exit(main())
