"""What leaves the backend for engines and folders: names, layout and precision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from slime.backends.fsdp.export import hf_named_parameters
from slime.tiny.paths import checkpoint_path
from tests.fakes.tiny_model import save_text_model, save_vision_model
from tests.fakes.training import DISTILL, joined, make_args

MIXTURE = {
    **{"vocab_size": 40, "hidden_size": 32, "intermediate_size": 16, "moe_intermediate_size": 24},
    **{"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
    **{"num_experts": 4, "num_experts_per_tok": 2},
}


@pytest.mark.parametrize("kind", ["tied", "untied", "text", "shipped"])
def test_the_untrained_student_is_its_own_folder(kind: str, tmp_path: Path) -> None:
    match kind:
        case "text":
            path = save_text_model(tmp_path)
        case "shipped":
            path = checkpoint_path("student")
        case _:
            path = save_vision_model(tmp_path, tied=kind == "tied")
    on_disk = load_file(path / "model.safetensors")
    with joined(make_args(path, *DISTILL)) as backend:
        exported = {name: tensor.clone() for name, tensor in backend.hf_named_parameters()}
        again = [name for name, _ in backend.hf_named_parameters()]
    assert exported.keys() == on_disk.keys()
    assert list(exported) == again
    for name, tensor in exported.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, on_disk[name].float()), name


def test_fused_experts_leave_in_the_published_layout(tmp_path: Path) -> None:
    """[experts, in, out], as SGLang reads them; transformers reads them back to the same model."""
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    model = Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(text_config=MIXTURE, vision_config=vision))
    exported = {name: tensor.clone() for name, tensor in hf_named_parameters(model, torch.float32)}
    experts = "model.language_model.layers.0.mlp.experts."
    assert exported[experts + "gate_up_proj"].shape == (4, 32, 2 * 24)
    assert exported[experts + "down_proj"].shape == (4, 24, 32)
    model.config.save_pretrained(tmp_path)
    save_file(exported, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again = Qwen3VLMoeForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name


def test_merged_experts_leave_one_by_one(tmp_path: Path) -> None:
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig.from_dict(MIXTURE))
    model.save_pretrained(tmp_path)
    on_disk = load_file(tmp_path / "model.safetensors")
    exported = {name: tensor.clone() for name, tensor in hf_named_parameters(model, torch.float32)}
    assert "model.layers.0.mlp.experts.3.up_proj.weight" in exported
    assert exported.keys() == on_disk.keys()
    assert all(torch.equal(tensor, on_disk[name]) for name, tensor in exported.items())
