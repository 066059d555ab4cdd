"""Attention of a packed row without TransformerEngine, over context-parallel ranks too.

Shape letters: T tokens of the row, L of them on this rank, H heads, K heads of keys, D values of a head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from slime.backends.attention import packed_attention
from slime.backends.megatron.layout import Row, Sharing, tokens_of_rank
from slime.backends.megatron.rotary import rotate


class RowParams(PackedSeqParams):
    """Megatron's description of a packed row, with the row itself beside it."""

    def __init__(self, row: Row, sharing: Sharing) -> None:
        """Describe `row`; filling counts as part of its sample."""
        longest = max(row.lengths)
        super().__init__(
            qkv_format="thd",
            cu_seqlens_q=row.borders,
            cu_seqlens_kv=row.borders,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )
        self.row = row
        self.sharing = sharing
        self.order = _gathered_order(row, sharing) if sharing.context > 1 else None


class RotatedSelfAttention(SelfAttention):
    """Megatron's self-attention, but queries and keys are turned by what this rank's tokens need as it is.

    Megatron would cut the angles of a packed row sample by sample, and in each layer ask the device for every
    border.
    """

    _rotation: Tensor | None = None

    def forward(self, *args: Any, rotary_pos_emb: Tensor | None = None, **kwargs: Any) -> Any:
        """Return what Megatron's does; `rotary_pos_emb` [2, L, 1, 1, D] are cosines and sines."""
        self._rotation = rotary_pos_emb
        return super().forward(*args, **kwargs)

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> Any:
        """Return query [L, 1, H, D] and key [L, 1, K, D], turned, and value."""
        made: Any = super().get_query_key_value_tensors(*args, **kwargs)
        query, key, value = made
        rotation, self._rotation = self._rotation, None
        assert rotation is not None
        return rotate(query, rotation), rotate(key, rotation), value


class PackedCoreAttention(MegatronModule):
    """A `core_attention` for Megatron's self-attention: causal, each sample sees itself alone."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
    ) -> None:
        """Take what Megatron hands to every core attention."""
        super().__init__(config=config)
        self.num_key_value_groups = config.num_attention_heads // (config.num_query_groups or 1)
        self._scale = softmax_scale
        self._context: dist.ProcessGroup = pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        /,
        *,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: RowParams | None = None,
    ) -> Tensor:
        """Return [L, H * D] of query [L, H, D] and key and value [L, K, D].

        Raises:
            ValueError: the row's description did not get here.
        """
        if not isinstance(packed_seq_params, RowParams):
            raise ValueError("attention was called without the row's borders; samples would see each other.")
        if self._context.size() > 1:
            return self._over_ranks(query, key, value, packed_seq_params)
        row = packed_seq_params.row
        query, key, value = (states.transpose(0, 1)[None] for states in (query, key, value))  # [1, H, T, D]
        attended, _ = packed_attention(
            self,
            query,
            key,
            value,
            None,
            scaling=self._scale,
            lengths=row.lengths,
            cu_seq_lens_q=row.borders,
            max_length_q=max(row.lengths),
        )
        return attended[0].flatten(1)

    def _over_ranks(self, query: Tensor, key: Tensor, value: Tensor, params: RowParams) -> Tensor:
        """Gather keys and values of the whole row; a rank's queries are at both ends of each sample."""
        row, ranks, order = params.row, params.sharing.context, params.order
        assert order is not None
        key, value = (
            tensor_parallel.gather_from_sequence_parallel_region(
                states.contiguous(), tensor_parallel_output_grad=True, group=self._context
            )
            .index_select(0, order)
            # On a GPU the only kernel that takes a mask and fewer heads of keys holds all scores at once.
            .repeat_interleave(self.num_key_value_groups, dim=1)
            for states in (key, value)
        )
        attended, start = [], 0
        for length in row.lengths:
            mine = slice(start // ranks, (start + length) // ranks)
            whole = slice(start, start + length)
            mask = row.local[mine, None] >= torch.arange(start, start + length, device=query.device)
            parts = (query[mine], key[whole], value[whole])
            output = scaled_dot_product_attention(
                *(part.transpose(0, 1)[None] for part in parts),
                attn_mask=mask,
                scale=self._scale,
            )
            attended.append(output[0].transpose(0, 1).flatten(1))
            start += length
        return torch.cat(attended)


def _gathered_order(row: Row, sharing: Sharing) -> Tensor:
    """Return where each token of the row [T] is among the tokens of all ranks, rank by rank."""
    everywhere = torch.cat([tokens_of_rank(row.lengths, sharing, rank) for rank in range(sharing.context)])
    return torch.argsort(everywhere).to(row.local.device)
