"""Which part of a response is thought: what stands up to `</think>`, in ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class ThinkTags:
    """Ids of the tags of a tokenizer; None where it has none."""

    opening: int | None
    closing: int | None

    @classmethod
    def of(cls, tokenizer: Any) -> Self:
        """Look the tags up."""
        vocabulary = tokenizer.get_vocab()
        return cls(vocabulary.get("<think>"), vocabulary.get("</think>"))

    def thinking(self, tokens: Tensor, response_length: int) -> Tensor:
        """Return bool [R], True up to the first `</think>` of the response, tag included.

        `tokens` int64 [T] are prompt and response. Without that tag the whole response is thought where one
        is open, by a tag in the response or one that the prompt ends with (templates of thinking models write
        it); else nothing is.
        """
        prompt, response = tokens[: len(tokens) - response_length], tokens[len(tokens) - response_length :]
        ends = (response == self.closing).nonzero() if self.closing is not None else response[:0]
        if len(ends):
            return torch.arange(response_length) <= ends[0, 0]
        return torch.full((response_length,), self._is_open(prompt) or self._is_open(response))

    def _is_open(self, tokens: Tensor) -> bool:
        """Tell whether the last tag among `tokens` opens a thought."""
        tags = [token for token in tokens.tolist() if token in (self.opening, self.closing)]
        return bool(tags) and self.opening is not None and tags[-1] == self.opening
