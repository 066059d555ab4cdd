"""What leaves the backend for engines and folders: names, layout and precision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

from slime.backends.fsdp.export import hf_named_parameters
from slime.tiny.paths import checkpoint_path
from tests.fakes.tiny_model import save_text_model, save_vision_model
from tests.fakes.training import DISTILL, joined, make_args


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


def test_experts_leave_in_the_layout_of_the_folder(tmp_path: Path) -> None:
    """transformers transposes them in memory; an engine reads them as they lie on disk."""
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    text = {
        **{"vocab_size": 40, "hidden_size": 32, "intermediate_size": 16, "moe_intermediate_size": 24},
        **{"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
        **{"num_experts": 4, "num_experts_per_tok": 2},
    }
    config = Qwen3VLMoeConfig(
        text_config=text, vision_config={**vision, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    )
    model = Qwen3VLMoeForConditionalGeneration(config)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    exported = {name: tensor.clone() for name, tensor in hf_named_parameters(model, torch.float32)}
    assert {name: tuple(tensor.shape) for name, tensor in exported.items()} == shapes
    on_disk = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(tensor, on_disk[name]) for name, tensor in exported.items())
    assert any(exported[name].shape != tensor.shape for name, tensor in model.named_parameters())
