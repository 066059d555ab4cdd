"""MODEL_ARGS of scripts/models against transformers' model of that size: names and shapes of every weight."""

from __future__ import annotations

import shlex
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    PreTrainedConfig,
    Qwen3VLConfig,
    Qwen3VLMoeConfig,
)

pytest.importorskip("megatron.core")

from slime.arguments import Args
from slime.backends.megatron.config import transformer_config
from slime.backends.megatron.model import PolicyModel
from slime.backends.megatron.parallel import Parallelism, Ranks
from slime.backends.megatron.parameters import named_parameters
from slime.backends.megatron.shape import require_declared, shape_of
from slime.tiny.paths import checkpoint_path
from tests.fakes.training import DISTILL, joined, make_args

SCRIPTS = Path(__file__).parents[4] / "scripts" / "models"
DEPTH = 4
"""Text layers that are built; the three levels of deepstack need three."""
SMALL_TOWER = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack": [5, 11, 17]}
LARGE_TOWER = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "deepstack": [8, 16, 24]}
TOWERS = {"2B": SMALL_TOWER, "4B": SMALL_TOWER}
MODELS = ("2B", "4B", "8B", "32B", "30B-A3B", "235B-A22B")


def model_args(name: str) -> Args:
    """Return the arguments of a run with the script's MODEL_ARGS."""
    command = (
        f"source {shlex.quote(str(SCRIPTS / f'qwen3-vl-{name}.sh'))}; printf '%s\\n' \"${{MODEL_ARGS[@]}}\""
    )
    words = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True).stdout.split()
    return make_args(Path("Qwen") / f"Qwen3-VL-{name}", *DISTILL, "--train-backend", "megatron", *words)


def hf_config(name: str, args: Args) -> PreTrainedConfig:
    """Return transformers' config of these numbers, of a few text layers."""
    tower = dict(TOWERS.get(name, LARGE_TOWER))
    text: dict[str, Any] = {
        "num_hidden_layers": DEPTH,
        "hidden_size": args.hidden_size,
        "num_attention_heads": args.num_attention_heads,
        "num_key_value_heads": args.num_query_groups,
        "head_dim": args.kv_channels,
        "vocab_size": args.vocab_size,
        "rms_norm_eps": args.norm_epsilon,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": args.rotary_base,
            "mrope_section": [24, 20, 20],
            "mrope_interleaved": True,
        },
    }
    if args.num_experts is None:
        text |= {"intermediate_size": args.ffn_hidden_size}
    else:
        text |= {"num_experts": args.num_experts, "num_experts_per_tok": args.moe_router_topk}
        text |= {"moe_intermediate_size": args.moe_ffn_hidden_size}
    vision = {"deepstack_visual_indexes": tower.pop("deepstack"), "num_heads": 16, **tower}
    vision |= {"out_hidden_size": args.hidden_size, "num_position_embeddings": 2304}
    kind = Qwen3VLConfig if args.num_experts is None else Qwen3VLMoeConfig
    tied = not args.untie_embeddings_and_output_weights
    return kind(text_config=text, vision_config=vision, tie_word_embeddings=tied)


@pytest.mark.parametrize("name", MODELS)
def test_every_weight_of_the_model_has_its_place(name: str) -> None:
    args = model_args(name)
    config = hf_config(name, args)
    shape = shape_of(config)
    with torch.device("meta"):
        hf: Any = AutoModelForImageTextToText.from_config(config)
    expected = {key: tuple(weight.shape) for key, weight in hf.state_dict().items()}
    if shape.tied:
        del expected["lm_head.weight"]
    for key, size in expected.items():  # published checkpoints have [experts, in, out]
        if ".mlp.experts." in key:
            expected[key] = (size[0], size[2], size[1])

    sizes = Parallelism()
    with joined(make_args(checkpoint_path("text_student"), *DISTILL)):
        meta = torch.device("meta")
        ranks = Ranks(sizes, seed=0, on_cpu=True)
        with meta:
            settings = transformer_config(args, shape, sizes, dtype=torch.float32, device=meta)
            model = PolicyModel(settings, config, shape, ranks, meta, chunk_size=1)
        found = {
            source: size
            for named in named_parameters(model, ranks)
            for source, size in named.weight.sources.items()
        }
        ranks.close()
    assert found == expected


@pytest.mark.parametrize("name", MODELS)
def test_the_checkpoint_must_agree(name: str) -> None:
    args = model_args(name)
    assert args.num_layers is not None
    shape = replace(shape_of(hf_config(name, args)), layers=args.num_layers)
    if args.ffn_hidden_size is not None:
        shape = replace(shape, ffn=args.ffn_hidden_size)
    require_declared(args, shape)
    reason = f"--num-layers is {args.num_layers} and the checkpoint has 7; .*untie"
    with pytest.raises(ValueError, match=reason):
        require_declared(args, replace(shape, layers=7, tied=not shape.tied))
