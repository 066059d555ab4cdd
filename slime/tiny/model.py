"""Makes a tiny Qwen3-VL of 0.27 M parameters, or its text half alone as a Qwen3 of 0.06 M, and writes it as a
complete Hugging Face folder.

The folder loads in transformers and in SGLang like any checkpoint of its kind.
"""

import copy
import json
from pathlib import Path
from typing import Any, Final

import torch
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerBase,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from slime.tiny.shapes import CELL, SIDE
from slime.tiny.tokenizer import END, MAX_LENGTH, PAD, VOCAB_SIZE, build_tokenizer, save_tokenizer

TEXT_WIDTH: Final = 48
VISION_WIDTH: Final = 48
HEAD_DIM: Final = 16
MERGE: Final = 2
INITIALIZER_RANGE: Final = 0.1
"""With the usual 0.02 the model learns the language and stays blind."""

_PIXELS: Final = {
    "size": {"shortest_edge": 4096, "longest_edge": 262144},
    "patch_size": CELL,
    "temporal_patch_size": 2,
    "merge_size": MERGE,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "Qwen3VLProcessor",
}

TinyModel = Qwen3VLForConditionalGeneration | Qwen3ForCausalLM


def build_config(tokenizer: PreTrainedTokenizerBase) -> Qwen3VLConfig:
    """Describe the model: two text layers, two vision layers, one deepstack tap, tied embeddings."""
    ids = tokenizer.get_vocab()
    rope = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_interleaved": True,
        "mrope_section": [4, 2, 2],
    }
    vision = {
        "depth": 2,
        "deepstack_visual_indexes": [0],
        "hidden_size": VISION_WIDTH,
        "intermediate_size": 96,
        "num_heads": VISION_WIDTH // HEAD_DIM,
        "out_hidden_size": TEXT_WIDTH,
        "num_position_embeddings": (SIDE // CELL) ** 2,
        "patch_size": CELL,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
        "initializer_range": INITIALIZER_RANGE,
    }
    return Qwen3VLConfig(
        text_config=_text_settings(tokenizer, rope),
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )


def build_text_config(tokenizer: PreTrainedTokenizerBase) -> Qwen3Config:
    """Describe the model without vision: the same two text layers."""
    return Qwen3Config(**_text_settings(tokenizer, {"rope_type": "default", "rope_theta": 10000.0}))


def _text_settings(tokenizer: PreTrainedTokenizerBase, rope: dict[str, Any]) -> dict[str, Any]:
    ids = tokenizer.get_vocab()
    return {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": MAX_LENGTH,
        "rope_parameters": rope,
        "initializer_range": INITIALIZER_RANGE,
        "tie_word_embeddings": True,
        "bos_token_id": ids[PAD],
        "eos_token_id": ids[END],
        "pad_token_id": ids[PAD],
    }


def build_model(seed: int, *, sees: bool = True) -> TinyModel:
    """Make a model with random float32 weights, with or without vision."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    if sees:
        return Qwen3VLForConditionalGeneration(build_config(tokenizer)).float()
    return Qwen3ForCausalLM(build_text_config(tokenizer)).float()


def load_model(directory: Path) -> TinyModel:
    """Load a folder for inference in float32."""
    sees = (directory / "preprocessor_config.json").is_file()
    kind = Qwen3VLForConditionalGeneration if sees else Qwen3ForCausalLM
    return kind.from_pretrained(directory, dtype=torch.float32).eval()


def save_processor(directory: Path, *, sees: bool = True) -> None:
    """Write tokenizer, chat template and, for a model that sees, the pixel settings."""
    directory.mkdir(parents=True, exist_ok=True)
    save_tokenizer(directory)
    if not sees:
        return
    image = _PIXELS | {"image_processor_type": "Qwen2VLImageProcessorFast"}
    video = _PIXELS | {"video_processor_type": "Qwen3VLVideoProcessor"}
    for name, settings in (("preprocessor_config.json", image), ("video_preprocessor_config.json", video)):
        (directory / name).write_text(json.dumps(settings, indent=1) + "\n")


def save_checkpoint(model: TinyModel, directory: Path) -> None:
    """Write the whole folder, weights in bfloat16; `model` is left as it is."""
    save_processor(directory, sees=isinstance(model, Qwen3VLForConditionalGeneration))
    ids = build_tokenizer().get_vocab()
    rounded = copy.deepcopy(model).bfloat16()
    rounded.generation_config = GenerationConfig(
        bos_token_id=ids[PAD], eos_token_id=[ids[END], ids[PAD]], pad_token_id=ids[PAD]
    )
    rounded.save_pretrained(directory)
