"""What a loss may ask of the model, computed on demand from hidden states and the whole LM head."""

from __future__ import annotations

from torch import Tensor

from slime.backends.outputs import OnePassOutputs
from slime.losses.log_probs import ChunkedLogProbs, chunked_log_probs, chunked_top_ids


class ResponseOutputs(OnePassOutputs):
    """Implements `LossInputs` and `ExpectingInputs` for the P response tokens of one micro-batch."""

    def __init__(
        self, hidden: Tensor, head: Tensor, ids: Tensor, chunk_size: int, masked_ids: Tensor | None
    ) -> None:
        """Take the hidden states [P, H] that predict `ids` [P], the LM head's weight [V, H], and the ids [M]
        that are never sampled."""
        super().__init__(ids)
        self._hidden = hidden
        self._head = head
        self._chunk_size = chunk_size
        self._masked_ids = masked_ids

    def compute(
        self,
        ids: Tensor,
        *,
        with_rest: bool = False,
        rest_from: int = 0,
        top: int = 0,
        temperature: float = 1.0,
    ) -> ChunkedLogProbs:
        """Run the LM head once; see `chunked_log_probs`."""
        # The LM head is linear: its logits are divided too.
        hidden = self._hidden if temperature == 1 else self._hidden / temperature
        return chunked_log_probs(
            *(hidden, self._head, ids, self._chunk_size, self._masked_ids),
            with_rest=with_rest,
            rest_from=rest_from,
            top=top,
        )

    def likeliest(self, count: int) -> Tensor:
        """Return the likeliest tokens of each position, [P, count]."""
        return chunked_top_ids(self._hidden, self._head, count, self._chunk_size, self._masked_ids)
