"""Expansion of the wire form."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slime.data.expand import expand_image_pads, expanded_length

PAD = 9


def test_each_pad_becomes_its_own_grids_merged_patches() -> None:
    grids = [(1, 4, 6), (1, 2, 2)]
    assert expand_image_pads([1, PAD, 2, PAD, 3], grids, PAD, 2) == [1, *[PAD] * 6, 2, PAD, 3]
    assert expand_image_pads([1, 2], [], PAD, 2) == [1, 2]


@pytest.mark.parametrize(("tokens", "grids"), [([PAD, PAD], [(1, 2, 2)]), ([1], [(1, 2, 2)]), ([PAD], [])])
def test_another_number_of_pads_than_grids_is_an_error(
    tokens: list[int], grids: list[tuple[int, ...]]
) -> None:
    with pytest.raises(ValueError, match="one pad each is needed"):
        expand_image_pads(tokens, grids, PAD, 2)


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(1, 5), st.integers(1, 5)), max_size=5))
def test_length_and_other_tokens_are_kept(parts: list[tuple[int, int, int]]) -> None:
    tokens = [token for text, _, _ in parts for token in (text, PAD)]
    grids = [(1, 2 * height, 2 * width) for _, height, width in parts]
    expanded = expand_image_pads(tokens, grids, PAD, 2)
    assert len(expanded) == expanded_length(tokens, grids, 2)
    assert [token for token in expanded if token != PAD] == [token for token in tokens if token != PAD]
