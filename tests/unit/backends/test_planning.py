"""Which sample goes to which rank and micro-batch."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slime.backends.planning import _split_up_to, plan_micro_batches

LENGTHS = st.lists(st.integers(1, 50), max_size=40)


@given(
    lengths=LENGTHS,
    ranks=st.integers(1, 5),
    limit=st.integers(1, 120),
    by_tokens=st.booleans(),
    packed=st.booleans(),
)
def test_every_sample_once_equal_counts_within_the_limit(
    lengths: list[int], ranks: int, limit: int, by_tokens: bool, packed: bool
) -> None:
    if by_tokens:
        plan = plan_micro_batches(lengths, ranks, max_tokens=limit, packed=packed)
    else:
        plan = plan_micro_batches(lengths, ranks, micro_batch_size=limit, packed=packed)
    assert len(plan) == ranks
    assert len({len(batches) for batches in plan}) == 1
    assert len(plan[0]) >= 1
    assert sorted(index for batches in plan for batch in batches for index in batch) == list(
        range(len(lengths))
    )
    for batch in (batch for batches in plan for batch in batches if batch):
        if by_tokens and packed:
            assert len(batch) == 1 or sum(lengths[index] for index in batch) <= limit
        elif by_tokens:
            assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= limit
        else:
            assert len(batch) <= limit


@given(lengths=LENGTHS, ranks=st.integers(1, 5))
def test_ranks_differ_by_one_sample_at_most(lengths: list[int], ranks: int) -> None:
    plan = plan_micro_batches(lengths, ranks, micro_batch_size=1)
    loads = [sum(lengths[index] for batch in batches for index in batch) for batches in plan]
    assert max(loads) - min(loads) <= max(lengths, default=0)


def test_like_lengths_share_a_padded_micro_batch() -> None:
    assert plan_micro_batches([10, 2, 9, 2], 1, max_tokens=20, packed=False) == [[[0, 2], [1, 3]]]


def test_short_samples_fill_what_long_ones_leave() -> None:
    assert plan_micro_batches([10, 2, 9, 2, 8], 1, max_tokens=12) == [[[0, 1], [2, 3], [4]]]
    assert plan_micro_batches([6, 5, 4, 3, 2, 20], 2, max_tokens=20) == [[[5]], [[0, 1, 2, 3, 4]]]


def test_a_packed_micro_batch_splits_into_halves_of_as_many_tokens() -> None:
    assert _split_up_to([[0, 1, 2, 3]], 2, [9, 8, 2, 1], packed=True) == [[0, 2], [1, 3]]
    assert _split_up_to([[0, 1, 2, 3]], 2, [9, 8, 2, 1], packed=False) == [[0, 1], [2, 3]]


def test_a_rank_with_few_batches_splits_before_it_idles() -> None:
    plan = plan_micro_batches([30, 10, 10, 10], 2, max_tokens=30)
    assert plan == [[[0]], [[1, 2, 3]]]
    plan = plan_micro_batches([30, 29, 10, 10, 10, 9], 2, max_tokens=30)
    assert all(batch for batches in plan for batch in batches)


def test_ranks_beyond_the_samples_get_dummies() -> None:
    assert plan_micro_batches([5], 3, micro_batch_size=4) == [[[0]], [[]], [[]]]
    assert plan_micro_batches([], 2, micro_batch_size=4) == [[[]], [[]]]


def test_a_sample_over_the_budget_goes_alone() -> None:
    assert plan_micro_batches([100, 3, 3], 1, max_tokens=10) == [[[0], [1, 2]]]


@pytest.mark.parametrize("limits", [{}, {"max_tokens": 5, "micro_batch_size": 2}])
def test_exactly_one_limit_is_needed(limits: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="exactly one is needed"):
        plan_micro_batches([1], 1, **limits)


def test_limits_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="limit of 0"):
        plan_micro_batches([1], 1, max_tokens=0)
    with pytest.raises(ValueError, match="0 ranks"):
        plan_micro_batches([1], 0, max_tokens=5)
