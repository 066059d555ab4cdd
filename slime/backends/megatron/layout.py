"""A micro-batch as one row that parallel ranks can share: where its tokens lie, and who holds which.

Samples lie end to end, each filled up so that context-parallel ranks get equal shares; what a micro-batch of
padded rows has to the right of a sample becomes its filling. Under a causal mask no token sees the filling
behind it, and no response position is there. Shape letters: T tokens of the row, filling counted, L of them
on this rank, P response tokens, B samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from slime.backends.batching import MicroBatch
from slime.backends.megatron.rotary import mrope_positions


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """How ranks share a row."""

    context: int = 1
    """Context-parallel ranks; each sample is cut into twice as many chunks, and a rank has one from the front
    and one from the back, so that causal attention is equal work."""
    context_rank: int = 0
    sequence: int = 1
    """Tensor-parallel ranks that cut a rank's tokens between them (--sequence-parallel); else 1."""

    @property
    def sample_unit(self) -> int:
        """Every sample's tokens are a multiple of this."""
        return 2 * self.context if self.context > 1 else 1

    @property
    def row_unit(self) -> int:
        """All tokens together are a multiple of this."""
        return self.sample_unit * self.sequence


@dataclass(frozen=True, kw_only=True)
class Row:
    """The tokens of a micro-batch, the same on all ranks that share it but for `local` and `response_*`."""

    input_ids: Tensor
    """int64 [T]."""
    image_tokens: Tensor
    """bool [T], the pads of pictures."""
    positions: Tensor
    """int64 [3, T], of time, height and width; all three the same count in text."""
    lengths: tuple[int, ...]
    """Tokens of each sample, filling counted, T together."""
    borders: Tensor
    """int32 [B + 1], where samples begin and the row ends."""
    local: Tensor
    """int64 [L], which tokens of the row this rank computes, in its order."""
    response_local: Tensor
    """int64, where in `local` the response positions of this rank are."""
    response_rows: Tensor
    """int64, which of the P they are."""

    def to(self, device: torch.device) -> Row:
        """Return the same row with all tensors on `device`."""
        moved = {
            field.name: value.to(device, non_blocking=True)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **moved)


def lengths_of(batch: MicroBatch) -> tuple[int, ...]:
    """Return how many tokens each sample has in the micro-batch, padding counted."""
    rows, width = batch.input_ids.shape
    return (width,) * rows if batch.lengths is None else batch.lengths


def row_tokens(lengths: Sequence[int], sharing: Sharing) -> int:
    """Return how many tokens the row of such samples has."""
    return _up_to(sum(_up_to(length, sharing.sample_unit) for length in lengths), sharing.row_unit)


def lay_out(batch: MicroBatch, sharing: Sharing, *, merge_size: int = 1, tokens: int = 0) -> Row:
    """Return the row of a micro-batch; it has at least `tokens` tokens, a multiple of the row's unit."""
    lengths = lengths_of(batch)
    filled = [_up_to(length, sharing.sample_unit) for length in lengths]
    rest = max(tokens, row_tokens(lengths, sharing)) - sum(filled)
    starts = torch.tensor([0, *filled]).cumsum(0)[:-1]
    sources = torch.tensor([0, *lengths]).cumsum(0)[:-1]
    # Where each token of the micro-batch goes.
    places = torch.cat(
        [torch.arange(length) + start for length, start in zip(lengths, starts.tolist(), strict=True)]
    )
    total = sum(filled) + rest
    input_ids = torch.zeros(total, dtype=torch.int64)
    image_tokens = torch.zeros(total, dtype=torch.bool)
    input_ids[places] = batch.input_ids.flatten().cpu()
    image_tokens[places] = batch.image_token_mask.flatten().cpu().bool()
    samples = (*filled, rest) if rest else tuple(filled)
    grids = [] if batch.picture_grids is None else batch.picture_grids[list(batch.picture_rows)].tolist()
    local = tokens_of_rank(samples, sharing, sharing.context_rank)
    local_place = torch.full((total,), -1)
    local_place[local] = torch.arange(len(local))
    old = batch.response_positions.cpu()
    sample = torch.searchsorted(sources, old, right=True) - 1
    response = local_place[old - sources[sample] + starts[sample]]
    here = (response >= 0).nonzero()[:, 0]
    return Row(
        input_ids=input_ids,
        image_tokens=image_tokens,
        positions=mrope_positions(image_tokens, samples, grids, merge_size),
        lengths=samples,
        borders=torch.tensor([0, *samples], dtype=torch.int32).cumsum(0, dtype=torch.int32),
        local=local,
        response_local=response[here],
        response_rows=here,
    )


def tokens_of_rank(lengths: Sequence[int], sharing: Sharing, rank: int) -> Tensor:
    """Return which tokens of the row a context-parallel rank computes: of each sample a chunk from the front
    and its mirror image from the back."""
    ranks = sharing.context
    total = sum(lengths)
    if ranks == 1:
        return torch.arange(total)
    found, start = [], 0
    for length in lengths:
        chunk = length // (2 * ranks)
        for number in (rank, 2 * ranks - 1 - rank):
            found.append(torch.arange(start + number * chunk, start + (number + 1) * chunk))
        start += length
    return torch.cat(found)


def _up_to(count: int, unit: int) -> int:
    return -(-count // unit) * unit
