"""What a checkpoint's own tensors tell of its layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("megatron.core")

from slime.backends.megatron.loading import Checkpoint, publishes_experts
from tests.unit.backends.megatron.test_weights import DENSE, FUSED

HIDDEN, EXPERTS = FUSED.hidden, FUSED.experts
PREFIX = "model.language_model.layers.0.mlp.experts."


@pytest.mark.parametrize("ffn", [8, HIDDEN // 2, HIDDEN])
@pytest.mark.parametrize("published", [True, False])
def test_experts_are_read_as_they_lie(tmp_path: Path, ffn: int, published: bool) -> None:
    """Square matrices do not tell by themselves which way they lie."""
    sizes = {"gate_up_proj": (HIDDEN, 2 * ffn), "down_proj": (ffn, HIDDEN)}
    tensors = {
        PREFIX + name: torch.zeros(EXPERTS, *(size if published else size[::-1]))
        for name, size in sizes.items()
    }
    save_file(tensors, tmp_path / "model.safetensors")
    assert publishes_experts(Checkpoint(tmp_path), replace(FUSED, expert_ffn=ffn)) is published


def test_a_dense_checkpoint_has_none(tmp_path: Path) -> None:
    save_file({"model.norm.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    assert publishes_experts(Checkpoint(tmp_path), DENSE)
