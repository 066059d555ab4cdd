"""What a loss may ask of the model where the vocabulary lies in slices on tensor-parallel ranks.

As in `slime.losses.log_probs` the LM head runs over chunks of positions, forward and once more backward, and
no tensor [P, V] exists. Each rank has the logits of its slice; what a softmax needs of the others is a few
numbers a position, added up over the ranks. Shape letters: P response tokens of the micro-batch, Q of them on
this context-parallel rank, V tokens of this rank's slice, C positions of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from slime.backends.outputs import OnePassOutputs
from slime.losses.log_probs import ChunkedLogProbs, add_product

_FLOOR = -1e5
"""The logit of tokens that are never sampled: its probability is exactly 0, and 0 times it is 0."""


@dataclass(frozen=True)
class VocabularyShare:
    """This rank's slice of the vocabulary."""

    start: int
    width: int
    tokens: int
    """Of the whole vocabulary, without the filling that makes the slices equal."""
    closed: Tensor
    """int64, the tokens of the slice outside the distribution: never sampled, or filling."""
    group: dist.ProcessGroup

    @staticmethod
    def of(
        vocabulary: int, rows: int, masked_ids: Sequence[int], group: dist.ProcessGroup, device: torch.device
    ) -> VocabularyShare:
        """Return the slice of `rows` rows of which `vocabulary` are tokens."""
        width = rows // group.size()
        start = group.rank() * width
        outside = sorted({*masked_ids, *range(vocabulary, rows)})
        closed = [token - start for token in outside if start <= token < start + width]
        return VocabularyShare(
            start, width, vocabulary, torch.tensor(closed, dtype=torch.int64, device=device), group
        )

    def total(self, tensor: Tensor) -> Tensor:
        """Add up over the ranks, in place. Collective."""
        if self.group.size() > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def largest(self, tensor: Tensor) -> Tensor:
        """Return the largest over the ranks, in place. Collective."""
        if self.group.size() > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)
        return tensor

    def columns(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the column of each token in the slice, 0 for those of other ranks, and which are here."""
        here = (ids >= self.start) & (ids < self.start + self.width)
        return torch.where(here, ids - self.start, 0), here

    def logits(self, rows: Tensor, head: Tensor) -> Tensor:
        """Return a chunk's logits [C, V] in at least float32."""
        logits = rows @ head.T
        if logits.dtype in (torch.bfloat16, torch.float16):
            logits = logits.float()
        logits.index_fill_(1, self.closed, _FLOOR)
        # Below the tokens that are never sampled: the likeliest of a small vocabulary are its tokens alone.
        logits[:, max(0, self.tokens - self.start) :] = 2 * _FLOOR
        return logits

    def likeliest(self, logits: Tensor, count: int) -> Tensor:
        """Return the likeliest tokens [C, count], likeliest first, of a chunk's logits [C, V] in all slices;
        of a smaller vocabulary, all. Collective."""
        count = min(count, self.tokens)
        values, columns = logits.topk(min(count, self.width), dim=1)
        values, ids = _joined(values, self.group), _joined(columns + self.start, self.group)
        return ids.gather(1, values.topk(count, dim=1).indices)


class ResponseOutputs(OnePassOutputs):
    """Implements `LossInputs` and `ExpectingInputs`: each context-parallel rank computes its positions, and
    all see all [P]."""

    def __init__(
        self,
        hidden: Tensor,
        head: Tensor,
        ids: Tensor,
        rows: Tensor,
        chunk_size: int,
        vocabulary: VocabularyShare,
        context: dist.ProcessGroup,
    ) -> None:
        """Take the hidden states [Q, H] of this rank's positions, its slice of the LM head [V, H], the tokens
        [P] that were sampled, and which of them belong to this rank [Q]."""
        super().__init__(ids)
        self._hidden, self._head = hidden, head
        self._rows = rows
        self._chunk_size = chunk_size
        self._vocabulary = vocabulary
        self._context = context

    def compute(
        self,
        ids: Tensor,
        *,
        with_rest: bool = False,
        rest_from: int = 0,
        top: int = 0,
        temperature: float = 1.0,
    ) -> ChunkedLogProbs:
        """Run the LM head once; see `slime.losses.log_probs.chunked_log_probs`. Collective."""
        # The LM head is linear: its logits are divided too.
        hidden = self._hidden if temperature == 1 else self._hidden / temperature
        mine = ids.index_select(0, self._rows)
        apart = mine[:, rest_from:] if with_rest else None
        made = ChunkedLogProbs(
            *_SlicedLogProbs.apply(hidden, self._head, mine, apart, self._chunk_size, self._vocabulary, top)
        )
        return ChunkedLogProbs(
            self._whole(made.log_probs),
            self._whole(made.entropy),
            self._whole(made.log_rest) if with_rest else made.log_rest,
            self._whole(made.top_ids) if top > 0 else made.top_ids,
        )

    def likeliest(self, count: int) -> Tensor:
        """Return the likeliest tokens of each position, [P, count]. Collective."""
        share = self._vocabulary
        chunks = [
            share.likeliest(share.logits(rows, self._head), count)
            for rows in self._hidden.split(self._chunk_size)
        ]
        return self._whole(torch.cat(chunks))

    def _whole(self, values: Tensor) -> Tensor:
        """Return [P, ...] of all context-parallel ranks' [Q, ...]."""
        if self._context.size() == 1:
            return values
        return _FromAllRanks.apply(values, self._rows, len(self._ids), self._context)  # pyright: ignore[reportReturnType]


class _FromAllRanks(torch.autograd.Function):
    """Joins what context-parallel ranks computed. All go on with the same loss, so a rank's gradient is that
    of its own rows; parameters' gradients are added up over these ranks later."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, rows: Tensor, total: int, group: dist.ProcessGroup) -> Tensor:
        ctx.save_for_backward(rows)
        whole = values.new_zeros((total, *values.shape[1:]))
        whole[rows] = values
        dist.all_reduce(whole, group=group)
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient.index_select(0, ctx.saved_tensors[0]), None, None, None


class _SlicedLogProbs(torch.autograd.Function):
    """Forward and backward in chunks; the backward pass computes each chunk's logits anew."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        ids: Tensor,
        apart: Tensor | None,
        chunk_size: int,
        share: VocabularyShare,
        top: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Run the head chunk by chunk and keep log-probs, entropy and normaliser.

        `apart` [Q, M] are the tokens that the rest leaves out; None: no rest is wanted.
        """
        ctx.set_materialize_grads(False)
        log_probs, entropies, normalizers, rests, likeliest = [], [], [], [], []
        for start in range(0, max(1, hidden.shape[0]), chunk_size):
            part = slice(start, start + chunk_size)
            logits = share.logits(hidden[part], head)
            columns, here = share.columns(ids[part])
            peak = share.largest(logits.amax(dim=1))
            weights = logits.sub(peak[:, None]).exp_()
            sums = torch.stack([weights.sum(dim=1), weights.mul_(logits).sum(dim=1)], dim=1)
            del weights
            chosen = torch.where(here, logits.gather(1, columns), 0.0)
            added = share.total(torch.cat([sums, chosen], dim=1))
            normalizer = peak + added[:, 0].log()
            log_probs.append(added[:, 2:] - normalizer[:, None])
            entropies.append(normalizer - added[:, 1] / added[:, 0])
            normalizers.append(normalizer)
            if top > 0:
                likeliest.append(share.likeliest(logits, top))
            if apart is not None:
                others = _without(logits, *share.columns(apart[part]))
                rests.append(_log_sum(others, share) - normalizer)
        entropy = torch.cat(entropies)
        rest = torch.cat(rests).clamp_(min=_FLOOR) if rests else entropy.new_zeros(0)
        top_ids = torch.cat(likeliest) if likeliest else ids.new_zeros(ids.shape[0], 0)
        ctx.save_for_backward(hidden, head, ids, apart, torch.cat(normalizers), entropy, rest)
        ctx.mark_non_differentiable(top_ids)
        ctx.chunk_size, ctx.share = chunk_size, share
        return torch.cat(log_probs), entropy, rest, top_ids

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        grad_log_probs: Tensor | None,
        grad_entropy: Tensor | None,
        grad_rest: Tensor | None,
        _: None,
    ) -> tuple[Tensor | None, Tensor | None, None, None, None, None, None]:
        """Push each chunk's gradient through this rank's slice of the head.

        What comes back for the hidden states is this slice's part; Megatron adds the parts up.
        """
        hidden, head, ids, apart, normalizers, entropy, rest = ctx.saved_tensors
        share: VocabularyShare = ctx.share
        wide = normalizers.dtype
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_head = torch.zeros_like(head, dtype=wide) if ctx.needs_input_grad[1] else None
        for start in range(0, hidden.shape[0], ctx.chunk_size):
            part = slice(start, start + ctx.chunk_size)
            rows = hidden[part]
            logits = _logits_gradient(
                share.logits(rows, head).sub_(normalizers[part, None]),
                share.columns(ids[part]),
                entropy[part],
                None if grad_log_probs is None else grad_log_probs[part],
                None if grad_entropy is None else grad_entropy[part],
                None
                if grad_rest is None
                else _Rest(*share.columns(apart[part]), rest[part], grad_rest[part]),
            )
            logits = logits.index_fill_(1, share.closed, 0.0).to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = logits @ head
            if grad_head is not None:
                add_product(grad_head, logits.T, rows)
        grad_head = None if grad_head is None else grad_head.to(head.dtype)
        return grad_hidden, grad_head, None, None, None, None, None


class _Rest(NamedTuple):
    """A chunk's tokens [C, M] that are no part of the rest, as columns of the slice and which are in it, and
    the rest's log-mass and its gradient [C]."""

    columns: Tensor
    here: Tensor
    log_mass: Tensor
    gradient: Tensor


def _logits_gradient(
    log_probs: Tensor,
    chosen: tuple[Tensor, Tensor],
    entropy: Tensor,
    grad_chosen: Tensor | None,
    grad_entropy: Tensor | None,
    rest: _Rest | None,
) -> Tensor:
    """Return the gradient [C, V] with respect to one chunk's logits in this slice.

    `log_probs` [C, V] is used up. The formulas are those of `slime.losses.log_probs`: with p = softmax(z),
    d log p_k / dz = onehot_k - p, dH / dz = -p (log p + H), and with r the distribution among the others,
    d log rest / dz = r - p.
    """
    columns, here = chosen
    among = None
    if rest is not None:
        among = _without(log_probs - rest.log_mass[:, None], rest.columns, rest.here).exp_()
    probs = log_probs.exp_() if grad_entropy is None else log_probs.exp()
    factor = torch.zeros_like(entropy)[:, None]
    if grad_chosen is not None:
        factor = factor - grad_chosen.sum(dim=1, keepdim=True)
    if rest is not None:
        factor = factor - rest.gradient[:, None]
    if grad_entropy is not None:
        factor = factor - grad_entropy[:, None] * (log_probs + entropy[:, None])
    gradient = probs.mul_(factor)
    if among is not None and rest is not None:
        gradient.addcmul_(among, rest.gradient[:, None])
    if grad_chosen is not None:
        gradient.scatter_add_(1, columns, torch.where(here, grad_chosen, 0.0).to(gradient.dtype))
    return gradient


def _without(logits: Tensor, columns: Tensor, here: Tensor) -> Tensor:
    """Return the logits with those of the chosen tokens that are in the slice at minus infinity."""
    bounds = torch.where(here, -torch.inf, torch.inf).to(logits.dtype)
    return logits.scatter_reduce(1, columns, bounds, "amin")


def _log_sum(logits: Tensor, share: VocabularyShare) -> Tensor:
    """Return the logsumexp [C] over all slices, minus infinity where nothing is left. Collective."""
    peak = share.largest(logits.amax(dim=1)).clamp_(min=_FLOOR)
    return peak + share.total(logits.sub(peak[:, None]).exp_().sum(dim=1)).log()


def _joined(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the columns of all ranks side by side. Collective."""
    if group.size() == 1:
        return values
    parts = [torch.empty_like(values) for _ in range(group.size())]
    dist.all_gather(parts, values.contiguous(), group=group)
    return torch.cat(parts, dim=1)
