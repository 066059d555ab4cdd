"""Megatron's own configuration of a model, from its shape and the flags."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional

from slime.backends.megatron.parallel import Parallelism
from slime.backends.megatron.shape import ModelShape
from slime.backends.megatron.spec import uses_transformer_engine

if TYPE_CHECKING:
    from slime.arguments import Args


def transformer_config(
    args: Args, shape: ModelShape, sizes: Parallelism, *, dtype: torch.dtype, device: torch.device
) -> TransformerConfig:
    """Return the configuration of a model of this shape."""
    on_gpu = device.type == "cuda"
    config = TransformerConfig(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        ffn_hidden_size=shape.ffn,
        num_attention_heads=shape.heads,
        num_query_groups=shape.kv_heads,
        kv_channels=shape.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_eps,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=functional.silu,
        qk_layernorm=True,
        # The log-probs of one forward pass must be those of the next.
        attention_dropout=0.0,
        hidden_dropout=0.0,
        # Weights are read right after: drawing them would cost time and, on a CPU, a copy of each whole one.
        perform_initialization=False,
        use_cpu_initialization=not on_gpu,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=sizes.tensor,
        pipeline_model_parallel_size=sizes.pipeline,
        context_parallel_size=sizes.context,
        sequence_parallel=sizes.sequence,
        # Losses are shares of a global mean: gradients add up over micro-batches and ranks, undivided.
        calculate_per_token_loss=True,
        batch_p2p_sync=on_gpu,
        # These need CUDA extensions (of Apex) that no installation of ours has.
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=on_gpu,
        bias_dropout_fusion=False,
        **_mixture(shape, sizes, dtype, device),
        **_recomputation(args),
    )
    # Micro-batches differ in length; without this every stage would expect the first one's. Set afterwards,
    # because Megatron refuses it beside the "allgather" way to the experts, whose ranks need rows of one
    # length: the backend fills them up.
    config.variable_seq_lengths = sizes.pipeline > 1
    return config


def _mixture(
    shape: ModelShape, sizes: Parallelism, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    if shape.experts == 0:
        return {}
    return {
        "expert_model_parallel_size": sizes.expert,
        "expert_tensor_parallel_size": sizes.expert_tensor,
        "num_moe_experts": shape.experts,
        "moe_router_topk": shape.experts_per_token,
        "moe_ffn_hidden_size": shape.expert_ffn,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_router_score_function": "softmax",
        # The softmax over the chosen experts is that over all, renormalised.
        "moe_router_pre_softmax": False,
        "moe_router_dtype": "fp32",
        # "alltoall" needs a CUDA stream.
        "moe_token_dispatcher_type": "alltoall" if device.type == "cuda" else "allgather",
        # All experts of a rank in one product; without TransformerEngine one after the other.
        "moe_grouped_gemm": uses_transformer_engine(device, dtype),
    }


def _recomputation(args: Args) -> dict[str, Any]:
    if args.recompute_granularity is not None:
        given = {
            "recompute_granularity": args.recompute_granularity,
            "recompute_method": args.recompute_method,
            "recompute_num_layers": args.recompute_num_layers,
        }
        return {name: value for name, value in given.items() if value is not None}
    if args.gradient_checkpointing:
        return {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    return {}
