"""Attention over samples that lie end to end in one row: each sees itself alone.

No mask is built, so nothing here grows with the square of the row: on a GPU in half precision torch's own
flash attention takes the borders; everywhere else causal attention runs over one sample at a time, or over
several short ones at once. Shape letters: T tokens of the row, H heads, D values a head, B samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

PACKED = "slime_packed"
"""The name by which transformers finds `packed_attention`. It builds no mask for a name that it does not
know."""
BUNDLE_TOKENS = 512
"""Short samples attend side by side, padded, while they have no more tokens together: calls cost more there
than padding does."""


def borders(lengths: Sequence[int], device: torch.device) -> dict[str, Any]:
    """Return what tells the attention where each sample of a row begins, under transformers' own names."""
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
    longest = max(lengths)
    return {
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": longest,
        "max_length_k": longest,
        "lengths": tuple(lengths),
    }


def require_packable(config: PreTrainedConfig) -> None:
    """Raise ValueError for a language model with layers that do not attend to the whole sample alone."""
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise ValueError(
            f"{type(text).__name__} has layers of {', '.join(sorted(kinds))}; packed samples need "
            "full_attention in all of them. Set --train-layout padded."
        )


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    lengths: tuple[int, ...] | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Return causal attention within each sample, [1, T, H, D], in transformers' form of an attention.

    Args:
        module: the attention layer.
        query: [1, H, T, D].
        key: [1, heads of keys, T, D], and `value` alike.
        attention_mask: none is allowed.
        scaling: of the scores; None: one over the root of D.
        lengths: tokens of each sample, T together; with `cu_seq_lens_q` from `borders`.

    Raises:
        ValueError: the borders did not get here, or do not belong to this row: samples would see each other.
    """
    if lengths is None or cu_seq_lens_q is None or attention_mask is not None:
        raise ValueError(
            f"attention of {type(module).__name__} over packed samples was called without their borders or "
            "with a mask; samples would see each other. Set --train-layout padded for this model."
        )
    if query.shape[0] != 1 or sum(lengths) != query.shape[2]:
        raise ValueError(
            f"samples of {lengths} tokens do not fill a row of shape {tuple(query.shape[::2])}; the layout "
            "of the micro-batch is wrong."
        )
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))  # [T, H, D]
        longest = max(lengths)
        attended = varlen_attn(
            query,
            key,
            value,
            cu_seq_lens_q,
            cu_seq_lens_q,
            longest,
            longest,
            scale=scaling,
            window_size=(-1, 0),  # causal
            enable_gqa=query.shape[1] != key.shape[1],
        )
        assert isinstance(attended, Tensor)
        return attended[None], None
    return _by_bundles(module, (query, key, value), scaling, lengths), None


def _by_bundles(
    module: nn.Module, states: tuple[Tensor, Tensor, Tensor], scaling: float | None, lengths: tuple[int, ...]
) -> Tensor:
    """Attend bundle by bundle.

    A bundle is padded to the right: under a causal mask no token sees what comes after it.
    """
    parts = [state[0].transpose(0, 1).split(lengths) for state in states]  # each [tokens of a sample, H, D]
    attended: list[Tensor] = []
    for start, stop in _bundles(lengths):
        query, key, value = (
            pad_sequence(list(part[start:stop]), batch_first=True).transpose(1, 2) for part in parts
        )
        outputs, _ = sdpa_attention_forward(module, query, key, value, None, scaling=scaling, is_causal=True)
        attended.extend(row[:length] for row, length in zip(outputs, lengths[start:stop], strict=True))
    return torch.cat(attended)[None]


def _bundles(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Cut the samples, in their order, into runs that attend together."""
    cuts, longest = [0], 0
    for place, length in enumerate(lengths):
        longest = max(longest, length)
        if place > cuts[-1] and longest * (place + 1 - cuts[-1]) > BUNDLE_TOKENS:
            cuts.append(place)
            longest = length
    return list(zip(cuts, [*cuts[1:], len(lengths)], strict=True))


AttentionInterface.register(PACKED, packed_attention)
