"""Checkpoints for the benchmark: the config alone for the stub, a random Qwen3-VL for the real server.

The random one is large enough that a CPU spends its time in the forward pass and not in a server's
bookkeeping, and its parts relate as in a real teacher: the vision tower is a smaller model, the head a tenth.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.utils.logging import disable_progress_bar

from scripts.benchmarks.scoring.workload import QWEN3_VL, Vocabulary
from slime.tiny.model import save_processor
from slime.tiny.tokenizer import build_tokenizer

VOCABULARY_SIZE = 8_192
TEXT = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 768,
    "intermediate_size": 3_072,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 8_192,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 5_000_000.0,
        "mrope_interleaved": True,
        "mrope_section": [12, 10, 10],
    },
    "tie_word_embeddings": True,
}
VISION = {
    "depth": 4,
    "deepstack_visual_indexes": [0, 1, 2],
    "hidden_size": 256,
    "intermediate_size": 1_024,
    "num_heads": 4,
    "out_hidden_size": 768,
    "num_position_embeddings": 2_304,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
PIXELS = {"shortest_edge": 65_536, "longest_edge": 16_777_216}
"""Least and largest area of a picture, Qwen3-VL's own."""


def save_config(folder: Path) -> Vocabulary:
    """Write the `config.json` of a Qwen3-VL with the vocabulary of the released models; no weights."""
    config = Qwen3VLConfig(text_config={"vocab_size": QWEN3_VL.size}, image_token_id=QWEN3_VL.image_pad)
    config.save_pretrained(folder)
    return QWEN3_VL


def save_model(folder: Path) -> Vocabulary:
    """Write a complete checkpoint with random weights, 66 M parameters."""
    save_processor(folder)
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        settings = json.loads((folder / name).read_text()) | {"size": PIXELS}
        (folder / name).write_text(json.dumps(settings))
    named = build_tokenizer().get_vocab()
    start, pad, end = (named[name] for name in ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>"))
    config = Qwen3VLConfig(
        text_config=TEXT,
        vision_config=VISION,
        image_token_id=pad,
        video_token_id=named["<|video_pad|>"],
        vision_start_token_id=start,
        vision_end_token_id=end,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    disable_progress_bar()
    Qwen3VLForConditionalGeneration(config).float().save_pretrained(folder)
    return Vocabulary(
        size=VOCABULARY_SIZE,
        text=(len(named), VOCABULARY_SIZE - 1),
        vision_start=start,
        image_pad=pad,
        vision_end=end,
    )
