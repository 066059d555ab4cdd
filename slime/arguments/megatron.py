"""Megatron's own flags, under Megatron's names: parallelism, and the model that a run expects."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from slime.arguments.flags import flag


@dataclass(frozen=True, kw_only=True)
class MegatronArgs:
    """Megatron"""

    tensor_model_parallel_size: int = flag(1, help="Tensor parallelism.", at_least=1)
    sequence_parallel: bool = flag(False, help="Sequence parallelism beside tensor parallelism.")
    pipeline_model_parallel_size: int = flag(1, help="Pipeline parallelism.", at_least=1)
    context_parallel_size: int = flag(1, help="Context parallelism.", at_least=1)
    expert_model_parallel_size: int = flag(1, help="Expert parallelism.", at_least=1)
    expert_tensor_parallel_size: int | None = flag(
        None, help="Tensor parallelism of the experts.", at_least=1
    )
    use_distributed_optimizer: bool = flag(
        False, help="Shard the optimizer state over the data-parallel ranks."
    )
    recompute_granularity: Literal["full", "selective"] | None = flag(
        None, help="What the backward pass recomputes."
    )
    recompute_method: Literal["uniform", "block"] | None = flag(
        None, help="How layers are grouped for recomputation."
    )
    recompute_num_layers: int | None = flag(None, help="Layers in a recomputed group.", at_least=1)
    num_layers: int | None = flag(
        None,
        help="Text layers of the model. Like the flags that follow (MODEL_ARGS of scripts/models) it builds "
        "nothing: the checkpoint's config does, and must agree.",
        at_least=1,
    )
    hidden_size: int | None = flag(None, help="Values of a hidden state.", at_least=1)
    ffn_hidden_size: int | None = flag(None, help="Inner width of a dense MLP.", at_least=1)
    num_attention_heads: int | None = flag(None, help="Heads of queries.", at_least=1)
    num_query_groups: int | None = flag(None, help="Heads of keys and values.", at_least=1)
    kv_channels: int | None = flag(None, help="Values of a head.", at_least=1)
    vocab_size: int | None = flag(None, help="Tokens of the vocabulary.", at_least=1)
    rotary_base: float | None = flag(None, help="Base of the rotary frequencies.", above=0)
    norm_epsilon: float | None = flag(None, help="Epsilon of the norms.", above=0)
    num_experts: int | None = flag(None, help="Experts of a layer.", at_least=1)
    moe_router_topk: int | None = flag(None, help="Experts that see a token.", at_least=1)
    moe_ffn_hidden_size: int | None = flag(None, help="Inner width of an expert.", at_least=1)
    untie_embeddings_and_output_weights: bool = flag(
        False, help="The LM head is not the embedding; looked at with --num-layers alone."
    )

    @property
    def ranks_per_model(self) -> int:
        """Training ranks that share one copy of the model."""
        return (
            self.tensor_model_parallel_size * self.context_parallel_size * self.pipeline_model_parallel_size
        )

    def validate(self) -> Iterator[str]:
        """Yield what is wrong inside this group."""
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            yield (
                "--sequence-parallel cuts sequences between tensor-parallel ranks, and "
                "--tensor-model-parallel-size is 1. Drop it, or raise that."
            )
        if self.recompute_granularity == "full" and None in (
            self.recompute_method,
            self.recompute_num_layers,
        ):
            yield (
                "--recompute-granularity full needs to know which layers; add --recompute-method uniform "
                "--recompute-num-layers 1."
            )
        if self.recompute_granularity != "full" and (
            self.recompute_method is not None or self.recompute_num_layers is not None
        ):
            yield (
                "--recompute-method and --recompute-num-layers are about --recompute-granularity full. Add "
                "that, or drop them."
            )
