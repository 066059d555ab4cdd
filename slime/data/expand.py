"""From the wire form of a sequence (one pad a picture) to the trainer's (one pad a merged patch)."""

from __future__ import annotations

from collections.abc import Sequence

from slime.utils.processing_utils import image_tokens


def expand_image_pads(
    tokens: Sequence[int], grids: Sequence[Sequence[int]], image_token_id: int, merge_size: int
) -> list[int]:
    """Repeat the i-th image pad of `tokens` as often as the i-th grid has merged patches.

    Raises:
        ValueError: there are more or fewer pads than grids.
    """
    expanded: list[int] = []
    picture = 0
    for token in tokens:
        if token != image_token_id:
            expanded.append(token)
            continue
        if picture == len(grids):
            break
        expanded.extend([token] * image_tokens(grids[picture], merge_size))
        picture += 1
    pads = sum(token == image_token_id for token in tokens)
    if pads != len(grids):
        raise ValueError(
            f"the sequence has {pads} image pads (id {image_token_id}) and {len(grids)} pictures; one pad "
            "each is needed. Has the student sampled a pad, or were the tokens expanded before?"
        )
    return expanded


def expanded_length(tokens: Sequence[int], grids: Sequence[Sequence[int]], merge_size: int) -> int:
    """Return the length of the expanded sequence without building it."""
    return len(tokens) + sum(image_tokens(grid, merge_size) - 1 for grid in grids)
