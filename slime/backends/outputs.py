"""What a loss may ask of the model, answered by as few passes over the LM head as can be.

A backend says how a pass is made (`compute`); what was asked before, or was expected to be, is not computed
again. Shape letters: P response tokens of one micro-batch, K tokens asked for at each.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from slime.losses.log_probs import ChunkedLogProbs


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


class OnePassOutputs(ABC):
    """Implements `LossInputs` and `ExpectingInputs` for the P response tokens of one micro-batch."""

    def __init__(self, ids: Tensor) -> None:
        """Take the sampled tokens `ids` [P]."""
        self._ids = ids
        self._expected: Tensor | None = None
        self._expected_top = 0
        self._made: _Pass | None = None
        self._differentiable = torch.is_grad_enabled()

    @abstractmethod
    def compute(
        self,
        ids: Tensor,
        *,
        with_rest: bool = False,
        rest_from: int = 0,
        top: int = 0,
        temperature: float = 1.0,
    ) -> ChunkedLogProbs:
        """Run the LM head once; see `slime.losses.log_probs.chunked_log_probs`."""

    @abstractmethod
    def likeliest(self, count: int) -> Tensor:
        """Return the likeliest tokens of each position, [P, count] as `LossInputs.top_ids` has them."""

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
        return self.compute(ids).log_probs

    def gather_with_rest(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log-probs [P, K] of `ids` [P, K], and the log of the mass of all other tokens [P]."""
        if ids is self._expected:
            return self._answer()
        made = self.compute(ids, with_rest=True)
        return made.log_probs, made.log_rest

    @torch.no_grad()
    def log_probs_at(self, temperature: float) -> Tensor:
        """Return the log-probs [P] of the sampled tokens at another temperature, without gradient."""
        return self.compute(self._ids[:, None], temperature=temperature).log_probs[:, 0]

    @torch.no_grad()
    def top_ids(self, count: int) -> Tensor:
        """Return the likeliest tokens of each position, [P, count], likeliest first, without gradient."""
        if count == self._expected_top:
            return self._pass().top_ids
        return self.likeliest(count)

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
                made = self.compute(
                    ids, with_rest=self._expected is not None, rest_from=1, top=self._expected_top
                )
                self._made = _Pass(
                    made.log_probs[:, 0], made.entropy, made.log_probs[:, 1:], made.log_rest, made.top_ids
                )
        return self._made
