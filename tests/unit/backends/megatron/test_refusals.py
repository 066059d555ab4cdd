"""What would train wrongly, or fail late, is refused at the start with its reason."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, Qwen3_5Config, Qwen3Config, Qwen3VLMoeConfig

pytest.importorskip("megatron.core")

from megatron.core import parallel_state

from slime.backends.megatron.parallel import Parallelism
from slime.backends.megatron.shape import ModelShape, read_config, shape_of
from slime.tiny.paths import checkpoint_path
from tests.fakes.tiny_model import save_text_model
from tests.fakes.training import DISTILL, joined_backend, make_args

DENSE = ModelShape(
    layers=4,
    hidden=8,
    ffn=8,
    heads=8,
    kv_heads=4,
    head_dim=8,
    vocabulary=8,
    tied=False,
    norm_eps=1e-6,
    rope_theta=1e4,
    mrope_section=(2, 1, 1),
    deepstack_levels=2,
)
MIXTURE = replace(DENSE, experts=4, experts_per_token=2, expert_ffn=8)
MEGATRON = (*DISTILL, "--train-backend", "megatron")


@pytest.mark.parametrize(
    ("shape", "sizes", "reason"),
    [
        (DENSE, {"tensor": 8}, "does not divide the model's 4 heads of keys"),
        (replace(DENSE, deepstack_levels=1), {"pipeline": 3}, "does not divide the model's 4 layers"),
        (DENSE, {"pipeline": 4}, "leaves 1 layers to the first stage, .* first 2 .deepstack."),
        (DENSE, {"expert": 2}, "and the model is dense"),
        (DENSE, {"tensor": 2, "expert_tensor": 1}, "and the model is dense"),
        (replace(DENSE, ffn=9), {"tensor": 2}, "does not divide the 9 columns of the model's MLP"),
        (
            replace(MIXTURE, expert_ffn=9),
            {"tensor": 2, "sequence": True},
            "does not divide the 9 columns of an expert",
        ),
        (MIXTURE, {"expert": 3}, "does not divide the model's 4 experts"),
        (MIXTURE, {"tensor": 2, "sequence": True, "expert_tensor": 1}, "copies, which drift apart"),
        (MIXTURE, {"tensor": 2, "expert_tensor": 2}, "needs --sequence-parallel"),
    ],
)
def test_a_combination_is_refused(shape: ModelShape, sizes: dict[str, Any], reason: str) -> None:
    (refusal,) = Parallelism(**{"expert_tensor": sizes.get("tensor", 1), **sizes}).refusals(shape)
    with pytest.raises(ValueError, match=reason):
        raise ValueError(refusal)


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        (DENSE, Parallelism(tensor=4, expert_tensor=4, pipeline=2, context=2)),
        (MIXTURE, Parallelism(tensor=2, sequence=True, expert_tensor=2)),
        (MIXTURE, Parallelism(tensor=2, sequence=True, expert=4)),
    ],
)
def test_what_trains_rightly_is_not(shape: ModelShape, sizes: Parallelism) -> None:
    assert list(sizes.refusals(shape)) == []


def test_the_shape_is_that_of_the_config() -> None:
    shape = shape_of(read_config(checkpoint_path("student")))
    assert (shape.layers, shape.hidden, shape.vocabulary, shape.tied) == (2, 48, 130, True)
    assert (shape.mrope_section, shape.deepstack_levels, shape.merge_size) == ((4, 2, 2), 1, 2)
    text = shape_of(read_config(checkpoint_path("text_student")))
    assert (text.sees, text.text_prefix, text.experts) == (False, "model.", 0)
    mixture = shape_of(Qwen3VLMoeConfig())
    assert mixture.fused_experts
    assert (mixture.experts, mixture.experts_per_token, mixture.expert_ffn) == (60, 4, 1408)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (Qwen3_5Config(), "the checkpoint is a qwen3_5; use --train-backend fsdp"),
        (Qwen3Config(attention_bias=True), "attention_bias True"),
        (Qwen3Config(hidden_act="gelu"), "hidden_act gelu"),
        (Qwen3VLMoeConfig(text_config={"mlp_only_layers": [1]}), r"mlp_only_layers \[1\]"),
    ],
)
def test_a_model_that_would_be_built_otherwise_is_refused(config: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        shape_of(config)


def test_a_teacher_that_reads_other_tokens_is_refused() -> None:
    args = make_args(checkpoint_path("student"), *DISTILL, "--train-backend", "megatron")
    object.__setattr__(args, "opd_teacher_load", str(checkpoint_path("text_teacher")))
    with (
        pytest.raises(ValueError, match=r"text_teacher has image_token_id None and .*student has 6"),
        joined_backend(args),
    ):
        pass
    dist.destroy_process_group()


@contextmanager
def refused(reason: str) -> Iterator[None]:
    """Expect a refusal while a backend is made, and end the groups that it leaves."""
    with pytest.raises(ValueError, match=reason):
        yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def test_a_model_of_other_sizes_is_refused(tmp_path: Path) -> None:
    folder = save_text_model(tmp_path)
    config = AutoConfig.from_pretrained(folder)
    config.num_key_value_heads = 4
    config.save_pretrained(folder)
    args = make_args(folder, *MEGATRON)
    with refused(r"k_proj\.weight is \(16, 32\) and should be \(32, 32\)"), joined_backend(args):
        pass


def test_a_checkpoint_with_more_or_less_than_the_model_is_refused(tmp_path: Path) -> None:
    folder = save_text_model(tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"] = weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    reason = r"1 tensors belong to no parameter \(model\.layers\.2.*layers\.1.* is missing"
    with refused(reason), joined_backend(make_args(folder, *MEGATRON)):
        pass
