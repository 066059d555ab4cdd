"""Builds a sharded model from a Hugging Face checkpoint.

Every rank builds it without memory and shards it; rank 0 alone reads the files and hands each rank its part,
so a node never holds more than one full copy beside the shards.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from slime.backends.attention import PACKED, require_packable
from slime.backends.fsdp.model import PolicyModel


def load_policy(
    path: str | Path,
    mesh: DeviceMesh,
    *,
    compute_dtype: torch.dtype,
    chunk_size: int,
    masked_ids: Sequence[int] = (),
    trainable: bool = True,
    freeze_vision_tower: bool = False,
    gradient_checkpointing: bool = False,
    packed: bool = True,
) -> PolicyModel:
    """Return the model at `path` sharded over `mesh`.

    Its weights are float32 where it is trained and gathered in `compute_dtype`.
    Its distribution is over all tokens but `masked_ids`. It reads packed micro-batches, or padded ones.
    A model that is not trained (`trainable=False`) is stored in `compute_dtype`. Collective: every rank calls
    it.

    Raises:
        ValueError: the model cannot read packed micro-batches.
    """
    config = AutoConfig.from_pretrained(path)
    config.get_text_config().attention_dropout = (
        0.0  # the log-probs of one forward pass must be those of the next
    )
    auto_class = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    storage_dtype = torch.float32 if trainable else compute_dtype
    with torch.device("meta"):
        hf = auto_class.from_config(
            config, dtype=storage_dtype, attn_implementation=_attention(config, packed)
        )
    policy = PolicyModel(hf, chunk_size, masked_ids, packed=packed)
    policy.requires_grad_(trainable)
    if freeze_vision_tower and policy.vision_tower is not None:
        policy.vision_tower.requires_grad_(False)
    if gradient_checkpointing:
        hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy.train(gradient_checkpointing)
    _shard(policy, mesh, compute_dtype)
    policy.to_empty(device=mesh.device_type)
    hf.tie_weights()
    _distribute(hf, _read_on_rank_zero(auto_class, path, config))
    return policy


def _attention(config: PreTrainedConfig, packed: bool) -> str | dict[str, str]:
    """Return which attention runs; a vision tower separates its pictures by itself."""
    if not packed:
        return "sdpa"
    require_packable(config)
    if not hasattr(config, "vision_config"):
        return PACKED
    return {"": "sdpa", "text_config": PACKED, "vision_config": "sdpa"}


def _shard(policy: PolicyModel, mesh: DeviceMesh, compute_dtype: torch.dtype) -> None:
    """Make each transformer block, of text and of vision, a unit of its own, and the rest the root's."""
    precision = MixedPrecisionPolicy()
    if compute_dtype != torch.float32:
        precision = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    blocks = [module for module in policy.modules() if isinstance(module, GradientCheckpointingLayer)]
    for unit in [*blocks, policy]:
        sharded = fully_shard(unit, mesh=mesh, mp_policy=precision, reshard_after_forward=True)
        # Losses are shares of a global mean: gradients add up over ranks, they are not averaged.
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)


def _read_on_rank_zero(
    auto_class: type, path: str | Path, config: PreTrainedConfig
) -> tuple[dict[str, Tensor], list[Tensor]] | None:
    """Return the whole state dict and the buffers that no checkpoint holds, on rank 0; None on the others."""
    if dist.get_rank() != 0:
        return None
    full = auto_class.from_pretrained(path, config=config, dtype="auto")
    return full.state_dict(), [buffer for _, buffer in _unsaved_buffers(full)]


def _distribute(hf: nn.Module, source: tuple[dict[str, Tensor], list[Tensor]] | None) -> None:
    """Copy rank 0's weights and buffers into the shards of every rank."""
    state: dict[str, Any] = {}
    buffers: list[Tensor] = []
    if source is not None:
        state, buffers = dict(source[0]), source[1]
    set_model_state_dict(
        hf, state, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=True)
    )
    for number, (_, buffer) in enumerate(_unsaved_buffers(hf)):
        if buffers:
            buffer.copy_(buffers[number])
        dist.broadcast(buffer, src=0)


def _unsaved_buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the buffers outside the state dict (rotary frequencies), in a fixed order."""
    saved = set(module.state_dict())
    return [(name, buffer) for name, buffer in module.named_buffers() if name not in saved]
