"""Log-probs and entropy of chosen positions straight from hidden states, without ever holding all logits.

The LM head runs over chunks of positions, in the forward pass and once more in the backward pass. What is
saved in between is the hidden states, the head and one number a position: no tensor of shape [P, V] exists.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_MASKED_LOGIT = -1e5
"""Far below any logit, so that its probability is exactly 0; finite, so that 0 times it is."""


class ChunkedLogProbs(NamedTuple):
    """What chunks of logits are reduced to."""

    log_probs: Tensor
    """[P, K], of the tokens asked for."""
    entropy: Tensor
    """[P], in nats."""
    log_rest: Tensor
    """[P], log-mass of all other tokens, very low where there are none; empty unless asked for."""
    top_ids: Tensor
    """int64 [P, `top`], the likeliest tokens, likeliest first; without gradient."""


def chunked_log_probs(
    hidden: Tensor,
    head: Tensor,
    ids: Tensor,
    chunk_size: int = 1024,
    masked_ids: Tensor | None = None,
    *,
    with_rest: bool = False,
    rest_from: int = 0,
    top: int = 0,
) -> ChunkedLogProbs:
    """Return the log-probs [P, K] of `ids` and the entropy [P], with `with_rest` what is left [P], and the
    `top` likeliest tokens: all that is wanted of a position in one pass over the head.

    All but the likeliest tokens are differentiable (once).

    Args:
        hidden: [P, H], last hidden states at the positions that predict; P may be 0.
        head: [V, H], weight of the LM head.
        ids: int64 [P, K], the tokens asked for at each position.
        chunk_size: positions whose logits exist at the same time.
        masked_ids: int64 [M], tokens that are never sampled; the distribution is that over all others. Asked
            for itself, such a token has a very low log-prob, finite, without a gradient.
        with_rest: whether to return the log-mass of all tokens but `ids[:, rest_from:]`, which holds no id
            twice in a row.
        rest_from: the first column of `ids` that is no part of the rest.
        top: how many of the likeliest tokens to return.

    The products with the head run in the dtype of `hidden`; softmax and sums run in float32, or in float64
    where `hidden` is float64.

    Raises:
        ValueError: the shapes do not fit, or the chunk size is below 1.
    """
    if hidden.ndim != 2 or head.ndim != 2 or hidden.shape[1] != head.shape[1]:
        raise ValueError(
            f"hidden states {tuple(hidden.shape)} and LM head {tuple(head.shape)} given; [P, H] and [V, H] "
            "with the same H are needed."
        )
    if ids.ndim != 2 or ids.shape[0] != hidden.shape[0]:
        raise ValueError(
            f"ids of shape {tuple(ids.shape)} given for {hidden.shape[0]} positions; [P, K] is needed."
        )
    if chunk_size < 1:
        raise ValueError(f"--logprob-chunk-size {chunk_size} given; at least 1 position a chunk is needed.")
    apart = ids[:, rest_from:] if with_rest else None
    return ChunkedLogProbs(*_ChunkedLogProbs.apply(hidden, head, ids, apart, chunk_size, masked_ids, top))


@torch.no_grad()
def chunked_top_ids(
    hidden: Tensor, head: Tensor, count: int, chunk_size: int = 1024, masked_ids: Tensor | None = None
) -> Tensor:
    """Return the likeliest tokens, int64 [P, count], likeliest first, or all V where `count` is above that;
    arguments as `chunked_log_probs` has them."""
    count = min(count, head.shape[0])
    chunks = [_logits(rows, head, masked_ids).topk(count, dim=1).indices for rows in hidden.split(chunk_size)]
    return torch.cat(chunks)


def _logits(rows: Tensor, head: Tensor, masked_ids: Tensor | None) -> Tensor:
    """Return a chunk's logits [C, V] in at least float32, those of masked tokens at the floor."""
    logits = _wide(rows @ head.T)
    return logits if masked_ids is None else logits.index_fill_(1, masked_ids, _MASKED_LOGIT)


def _wide(tensor: Tensor) -> Tensor:
    """Cast half precision to float32, leave the rest."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


class _ChunkedLogProbs(torch.autograd.Function):
    """Forward and backward in chunks; the backward pass computes each chunk's logits anew."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        ids: Tensor,
        apart: Tensor | None,
        chunk_size: int,
        masked_ids: Tensor | None,
        top: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Run the head chunk by chunk and keep log-probs, entropy and normaliser.

        `apart` [P, M] are the tokens that the rest leaves out; None: no rest is wanted.
        """
        ctx.set_materialize_grads(False)
        log_probs, entropies, normalizers, rests, likeliest = [], [], [], [], []
        for start in range(0, max(1, hidden.shape[0]), chunk_size):
            part = slice(start, start + chunk_size)
            logits = _logits(hidden[part], head, masked_ids)
            normalizer = logits.logsumexp(dim=1)
            log_probs.append(logits.gather(1, ids[part]) - normalizer[:, None])
            if top > 0:
                likeliest.append(logits.topk(top, dim=1).indices)
            probs = logits.sub(normalizer[:, None]).exp_()
            entropies.append(normalizer - probs.mul_(logits).sum(dim=1))
            del probs
            normalizers.append(normalizer)
            if apart is not None:  # last, for it uses the logits up
                others = logits.scatter_(1, apart[part], -torch.inf).logsumexp(dim=1)
                rests.append((others - normalizer).clamp_(min=_MASKED_LOGIT))
        entropy = torch.cat(entropies)
        rest = torch.cat(rests) if rests else entropy.new_zeros(0)
        top_ids = torch.cat(likeliest) if likeliest else ids.new_zeros(ids.shape[0], 0)
        ctx.save_for_backward(hidden, head, ids, apart, torch.cat(normalizers), entropy, rest)
        ctx.mark_non_differentiable(top_ids)
        ctx.masked_ids = masked_ids
        ctx.chunk_size = chunk_size
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
        """Recompute each chunk's logits and push its gradient through the head."""
        hidden, head, ids, apart, normalizers, entropy, rest = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_head = _wide(torch.zeros_like(head)) if ctx.needs_input_grad[1] else None
        for start in range(0, hidden.shape[0], ctx.chunk_size):
            part = slice(start, start + ctx.chunk_size)
            rows = hidden[part]
            grad_logits = _logits_gradient(
                _logits(rows, head, ctx.masked_ids).sub_(normalizers[part, None]),
                ids[part],
                entropy[part],
                None if grad_log_probs is None else grad_log_probs[part],
                None if grad_entropy is None else grad_entropy[part],
                None if grad_rest is None else _Rest(apart[part], rest[part], grad_rest[part]),
            )
            if ctx.masked_ids is not None:
                grad_logits.index_fill_(1, ctx.masked_ids, 0.0)
            grad_logits = grad_logits.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = grad_logits @ head
            if grad_head is not None:
                add_product(grad_head, grad_logits.T, rows)
        grad_head = None if grad_head is None else grad_head.to(head.dtype)
        return grad_hidden, grad_head, None, None, None, None, None


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add `left @ right` to `total`, without a copy of the head's size where the precision is the same."""
    if total.dtype == right.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


class _Rest(NamedTuple):
    """A chunk's tokens [C, M] that are no part of the rest, and the rest's log-mass and its gradient [C]."""

    apart: Tensor
    log_mass: Tensor
    gradient: Tensor


def _logits_gradient(
    log_probs: Tensor,
    ids: Tensor,
    entropy: Tensor,
    grad_chosen: Tensor | None,
    grad_entropy: Tensor | None,
    rest: _Rest | None,
) -> Tensor:
    """Return the gradient [C, V] with respect to one chunk's logits.

    `log_probs` [C, V] is the whole distribution, and is used up; `grad_chosen` [C, K] belongs to the
    log-probs of `ids` and `grad_entropy` [C] to the entropy. With p = softmax(z): d log p_k / dz =
    onehot_k - p, dH / dz = -p (log p + H), and with r the distribution among the rest, d log rest / dz =
    r - p.
    """
    among = None
    if rest is not None:
        among = log_probs.sub(rest.log_mass[:, None]).scatter_(1, rest.apart, -torch.inf).exp_()
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
        gradient.scatter_add_(1, ids, grad_chosen.to(gradient.dtype))
    return gradient
