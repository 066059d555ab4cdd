"""What a server with a prefix cache computes for the requests that it was sent.

The rules are SGLang's: a request reuses the longest prefix that an *answered* request left in the cache, but
never beyond `logprob_start_len`, and at least one position is computed. The vision tower runs for each
picture whose tokens are not all cached: no cache of embeddings, which is SGLang's setting for large GPUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

HASHED_FROM = 1_000_000
"""Image positions hold a hash of the picture's bytes from here on; ids of text lie below."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One request as it came, and when."""

    arrived: float
    answered: float
    tokens: list[int]
    """One pad a picture."""
    start: int
    picture_tokens: list[int]
    """Of each picture."""
    picture_hashes: list[int]
    pad: int

    def expanded(self) -> tuple[NDArray[np.int64], list[int]]:
        """Return the cache's keys, [T], and where each picture ends."""
        keys: list[int] = []
        ends: list[int] = []
        pictures = iter(zip(self.picture_tokens, self.picture_hashes, strict=True))
        for token in self.tokens:
            if token != self.pad:
                keys.append(token)
                continue
            tokens, identity = next(pictures)
            keys += [HASHED_FROM + identity % 2**60] * tokens
            ends.append(len(keys))
        return np.array(keys, dtype=np.int64), ends


def count(asked: Sequence[Asked]) -> dict[str, int]:
    """Return requests, tokens prefilled, tokens reused, entries sent and vision passes."""
    totals = {"requests": 0, "prefilled_tokens": 0, "cached_tokens": 0, "entries": 0, "vision_passes": 0}
    seen: list[tuple[float, NDArray[np.int64]]] = []
    for request in sorted(asked, key=lambda one: one.arrived):
        keys, ends = request.expanded()
        earlier = (other for answered, other in seen if answered <= request.arrived)
        limit = min(len(keys) - 1, request.start)
        cached = min(limit, max((shared_prefix(keys, other) for other in earlier), default=0)) if limit else 0
        totals["requests"] += 1
        totals["cached_tokens"] += cached
        totals["prefilled_tokens"] += len(keys) - cached
        totals["entries"] += len(keys) - request.start
        totals["vision_passes"] += sum(end > cached for end in ends)
        seen.append((request.answered, keys))
    return totals


def shared_prefix(one: NDArray[np.int64], other: NDArray[np.int64]) -> int:
    """Return how many leading keys agree."""
    length = min(len(one), len(other))
    different = np.flatnonzero(one[:length] != other[:length])
    return int(different[0]) if len(different) else length
