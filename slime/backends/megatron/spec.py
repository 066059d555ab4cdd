"""Which modules make a layer: TransformerEngine's in half precision where a GPU has it, else plain torch."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE, TENorm
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn
from torch.nn import functional

from slime.backends.megatron.attention import PackedCoreAttention, RotatedSelfAttention


class RootMeanSquareNorm(nn.Module):
    """RMSNorm that may be told of sequence parallelism, which Megatron's own without TransformerEngine may
    not."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self._shape, self._eps = (hidden_size,), eps
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype, device=device))
        # Megatron adds up the gradients of such weights over the ranks that share a sequence.
        self.weight.sequence_parallel = config.sequence_parallel  # pyright: ignore[reportAttributeAccessIssue]

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the normalised hidden states, of the same shape."""
        return functional.rms_norm(hidden, self._shape, self.weight, self._eps)


class PlainRouter(TopKRouter):
    """Megatron's router, whose gate in 0.16.1 calls TransformerEngine even where there is none."""

    def gating(self, input: Tensor) -> Tensor:
        """Return the logits of the experts, float32."""
        return functional.linear(input.float(), self.weight.float())


class DeepstackLayer(TransformerLayer):
    """A layer behind which features of pictures are added: level i of them after text layer i.

    They travel as the `context` [levels, L, 1, H] of the block, which nothing else here uses and which full
    recomputation hands on with its gradient.
    """

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Return the hidden states, and the features for the layers that follow."""
        made: Any = super().forward(*args, **kwargs)
        hidden, features = made
        level = self.layer_number - 1
        if features is not None and level < features.shape[0]:
            hidden = hidden + features[level]
        return hidden, features


def block_spec(config: TransformerConfig, device: torch.device) -> TransformerBlockSubmodules:
    """Return what this rank's part of the decoder is made of."""
    with_engine = uses_transformer_engine(device, config.params_dtype)
    layer = _engine_layer(config) if with_engine else _plain_layer(config)
    layer.module = DeepstackLayer
    parts: Any = layer.submodules
    parts.self_attention.module = RotatedSelfAttention
    norm: Any = TENorm if with_engine else RootMeanSquareNorm
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=norm)


def uses_transformer_engine(device: torch.device, dtype: torch.dtype) -> bool:
    """Tell whether layers are TransformerEngine's, whose attention of packed rows knows no float32."""
    return bool(HAVE_TE) and device.type == "cuda" and dtype != torch.float32


def _engine_layer(config: TransformerConfig) -> ModuleSpec:
    return get_gpt_layer_with_transformer_engine_spec(
        num_experts=config.num_moe_experts, moe_grouped_gemm=config.moe_grouped_gemm, qk_layernorm=True
    )


def _plain_layer(config: TransformerConfig) -> ModuleSpec:
    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, qk_layernorm=True, normalization="RMSNorm"
    )
    parts: Any = layer.submodules
    attention = parts.self_attention.submodules
    attention.core_attention = PackedCoreAttention
    attention.q_layernorm = attention.k_layernorm = RootMeanSquareNorm
    parts.input_layernorm = parts.pre_mlp_layernorm = RootMeanSquareNorm
    if config.num_moe_experts is not None:
        parts.mlp.submodules.router = PlainRouter
    return layer
