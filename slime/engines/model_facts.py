"""What the wire must know of a checkpoint besides its tokens: the image pad, its expansion, the size of the
vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

from transformers import AutoConfig


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Read once per checkpoint, from its `config.json`."""

    vocab_size: int
    image_token_id: int | None
    """None for a model without vision."""
    merge_size: int
    """Side of the square of patches that becomes one token."""

    def image_tokens(self, grids: Sequence[Sequence[int]]) -> int:
        """Return how many tokens pictures of these (t, h, w) grids, in patches, expand to."""
        return sum(prod(int(side) for side in grid) // self.merge_size**2 for grid in grids)


@lru_cache(maxsize=8)
def model_facts(checkpoint: str) -> ModelFacts:
    """Read the facts of a checkpoint folder or hub name.

    Raises:
        OSError: there is no such checkpoint.
    """
    config = AutoConfig.from_pretrained(checkpoint)
    values = config.to_dict()
    vision = values.get("vision_config") or {}
    return ModelFacts(
        vocab_size=config.get_text_config().vocab_size,
        image_token_id=values.get("image_token_id"),
        merge_size=vision.get("spatial_merge_size", 1),
    )
