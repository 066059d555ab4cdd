"""Which sample goes to which rank and micro-batch: pure arithmetic on lengths.

What a budget bounds is what a micro-batch computes: the tokens of its samples where they are packed, the rows
times the longest row where they are padded.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

Plan = list[list[list[int]]]
"""ranks x micro-batches x indices of samples."""


def plan_micro_batches(
    lengths: Sequence[int],
    num_ranks: int,
    *,
    max_tokens: int | None = None,
    micro_batch_size: int | None = None,
    packed: bool = True,
) -> Plan:
    """Spread samples over ranks by tokens, then cut each rank's share into micro-batches.

    Every rank gets the same number of micro-batches; a rank that runs out of samples gets empty ones.
    Micro-batches run from long to short on every rank, so ranks that work side by side have work of like
    size.

    Args:
        lengths: tokens of each sample, pictures expanded.
        num_ranks: data-parallel ranks.
        max_tokens: tokens that a micro-batch may have, padding counted; a single longer sample gets one of
            its own.
        micro_batch_size: samples that a micro-batch may have. Exactly one of the two is given.
        packed: whether samples lie end to end, without padding.

    Raises:
        ValueError: both limits or none, or a limit below 1.
    """
    if (max_tokens is None) == (micro_batch_size is None):
        raise ValueError(
            f"max_tokens {max_tokens} and micro_batch_size {micro_batch_size} given; exactly one is needed: "
            "--use-dynamic-batch-size with --max-tokens-per-gpu, or --micro-batch-size."
        )
    limit = max_tokens if max_tokens is not None else micro_batch_size
    if limit is None or limit < 1 or num_ranks < 1:
        raise ValueError(f"a limit of {limit} and {num_ranks} ranks given; both must be at least 1.")
    shares = _spread(lengths, num_ranks)
    if max_tokens is not None:
        fill = _pack_by_tokens if packed else _fill_by_tokens
        plan = [fill(share, lengths, max_tokens) for share in shares]
    else:
        plan = [[share[i : i + limit] for i in range(0, len(share), limit)] for share in shares]
    count = max(1, max(len(batches) for batches in plan))
    return [_split_up_to(batches, count, lengths, packed) for batches in plan]


def _spread(lengths: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Give each sample, longest first, to the rank with the fewest tokens; shares run from long to short."""
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [(0, rank) for rank in range(num_ranks)]
    for index in _long_to_short(range(len(lengths)), lengths):
        load, rank = heapq.heappop(loads)
        shares[rank].append(index)
        heapq.heappush(loads, (load + lengths[index], rank))
    return shares


def _long_to_short(indices: Sequence[int], lengths: Sequence[int]) -> list[int]:
    return sorted(indices, key=lambda index: (-lengths[index], index))


def _fill_by_tokens(share: Sequence[int], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Cut a share that runs from long to short wherever one more row would pass the budget."""
    batches: list[list[int]] = []
    for index in share:
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= max_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def _pack_by_tokens(share: Sequence[int], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Put each sample of a share that runs from long to short into the first micro-batch with room for it."""
    batches: list[list[int]] = []
    room: list[int] = []
    for index in share:
        place = next((place for place, left in enumerate(room) if left >= lengths[index]), len(batches))
        if place == len(batches):
            batches.append([])
            room.append(max_tokens)
        batches[place].append(index)
        room[place] -= lengths[index]
    return batches


def _split_up_to(
    batches: list[list[int]], count: int, lengths: Sequence[int], packed: bool
) -> list[list[int]]:
    """Halve the largest micro-batch until there are `count` or none has two samples; then add empty ones."""

    def size(batch: list[int]) -> int:
        return sum(lengths[index] for index in batch) if packed else len(batch) * lengths[batch[0]]

    while len(batches) < count:
        largest = max(
            (batch for batch in batches if len(batch) > 1),
            key=size,
            default=None,
        )
        if largest is None:
            break
        at, middle = batches.index(largest), (len(largest) + 1) // 2
        # of packed samples every other one, so that both halves have as many tokens
        halves = (largest[::2], largest[1::2]) if packed else (largest[:middle], largest[middle:])
        batches = [*batches[:at], *halves, *batches[at + 1 :]]
    return batches + [[] for _ in range(count - len(batches))]
