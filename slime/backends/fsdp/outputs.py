"""What a loss may ask of the model, computed on demand from hidden states and the LM head."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from slime.losses.log_probs import ChunkedLogProbs, chunked_log_probs, chunked_top_ids


class _Pass(NamedTuple):
    """What one pass over the LM head gave; what was not expected is empty."""

    sampled: Tensor
    """[P]"""
    entropy: Tensor
    """[P]"""
    expected: Tensor
    """[P, K]"""
    log_rest: Tensor
    """[P]"""
    top_ids: Tensor
    """[P, count]"""


class ResponseOutputs:
    """Implements `LossInputs` and `ExpectingInputs` for the P response tokens of one micro-batch."""

    def __init__(
        self, hidden: Tensor, head: Tensor, ids: Tensor, chunk_size: int, masked_ids: Tensor | None
    ) -> None:
        """Take the hidden states [P, H] that predict `ids` [P], the LM head's weight [V, H], and the ids [M]
        that are never sampled."""
        self._hidden = hidden
        self._head = head
        self._ids = ids
        self._chunk_size = chunk_size
        self._masked_ids = masked_ids
        self._expected: Tensor | None = None
        self._expected_top = 0
        self._made: _Pass | None = None
        self._differentiable = torch.is_grad_enabled()

    def expect(self, ids: Tensor, top: int) -> None:
        """Let the first pass over the head give what will be asked of `ids` [P, K] and the `top` likeliest
        tokens too.

        Raises:
            RuntimeError: the pass has been made.
        """
        if self._made is not None:
            raise RuntimeError("expect() was called after the first question; say first what will be asked.")
        self._expected, self._expected_top = ids, top

    @property
    def log_probs(self) -> Tensor:
        """[P], log-prob of each sampled token."""
        return self._pass().sampled

    @property
    def entropy(self) -> Tensor:
        """[P], entropy in nats."""
        return self._pass().entropy

    def gather(self, ids: Tensor) -> Tensor:
        """Return the log-probs [P, K] of `ids` [P, K]."""
        if ids is self._expected:
            return self._answer()[0]
        return self._compute(self._hidden, ids).log_probs

    def gather_with_rest(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log-probs [P, K] of `ids` [P, K], and the log of the mass of all other tokens [P]."""
        if ids is self._expected:
            return self._answer()
        made = self._compute(self._hidden, ids, with_rest=True)
        return made.log_probs, made.log_rest

    @torch.no_grad()
    def log_probs_at(self, temperature: float) -> Tensor:
        """Return the log-probs [P] of the sampled tokens at another temperature, without gradient."""
        cooled = self._hidden / temperature  # the LM head is linear: its logits are divided too
        return self._compute(cooled, self._ids[:, None]).log_probs[:, 0]

    def top_ids(self, count: int) -> Tensor:
        """Return the likeliest tokens of each position, [P, count], likeliest first, without gradient."""
        if count == self._expected_top:
            return self._pass().top_ids
        return chunked_top_ids(self._hidden, self._head, count, self._chunk_size, self._masked_ids)

    def _answer(self) -> tuple[Tensor, Tensor]:
        """Return what was expected; without gradient where the caller wants none."""
        made = self._pass()
        if torch.is_grad_enabled():
            return made.expected, made.log_rest
        return made.expected.detach(), made.log_rest.detach()

    def _pass(self) -> _Pass:
        """Run the LM head once for the sampled tokens, and for all that was expected beside them."""
        if self._made is None:
            ids = self._ids[:, None]
            if self._expected is not None:
                ids = torch.cat([ids, self._expected], dim=1)
            with torch.set_grad_enabled(self._differentiable):  # also where a metric asks first
                made = self._compute(
                    self._hidden,
                    ids,
                    with_rest=self._expected is not None,
                    rest_from=1,
                    top=self._expected_top,
                )
                self._made = _Pass(
                    made.log_probs[:, 0], made.entropy, made.log_probs[:, 1:], made.log_rest, made.top_ids
                )
        return self._made

    def _compute(
        self, hidden: Tensor, ids: Tensor, *, with_rest: bool = False, rest_from: int = 0, top: int = 0
    ) -> ChunkedLogProbs:
        return chunked_log_probs(
            *(hidden, self._head, ids, self._chunk_size, self._masked_ids),
            with_rest=with_rest,
            rest_from=rest_from,
            top=top,
        )
