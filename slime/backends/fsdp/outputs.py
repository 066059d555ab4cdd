"""What a loss may ask of the model, computed on demand from hidden states and the LM head."""

from __future__ import annotations

import torch
from torch import Tensor

from slime.losses.log_probs import chunked_log_probs, chunked_top_ids


class ResponseOutputs:
    """Implements `LossInputs` for the P response tokens of one micro-batch."""

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
        self._sampled: tuple[Tensor, Tensor] | None = None

    @property
    def log_probs(self) -> Tensor:
        """[P], log-prob of each sampled token."""
        return self._pass()[0]

    @property
    def entropy(self) -> Tensor:
        """[P], entropy in nats."""
        return self._pass()[1]

    def gather(self, ids: Tensor) -> Tensor:
        """Return the log-probs [P, K] of `ids` [P, K]."""
        return chunked_log_probs(self._hidden, self._head, ids, self._chunk_size, self._masked_ids)[0]

    @torch.no_grad()
    def log_probs_at(self, temperature: float) -> Tensor:
        """Return the log-probs [P] of the sampled tokens at another temperature, without gradient."""
        cooled = self._hidden / temperature  # the LM head is linear: its logits are divided too
        return chunked_log_probs(cooled, self._head, self._ids[:, None], self._chunk_size, self._masked_ids)[
            0
        ][:, 0]

    def top_ids(self, count: int) -> Tensor:
        """Return the likeliest tokens of each position, [P, count], likeliest first, without gradient."""
        return chunked_top_ids(self._hidden, self._head, count, self._chunk_size, self._masked_ids)

    def _pass(self) -> tuple[Tensor, Tensor]:
        """Run the LM head once for both log-probs and entropy."""
        if self._sampled is None:
            log_probs, entropy = chunked_log_probs(
                self._hidden, self._head, self._ids[:, None], self._chunk_size, self._masked_ids
            )
            self._sampled = log_probs[:, 0], entropy
        return self._sampled
