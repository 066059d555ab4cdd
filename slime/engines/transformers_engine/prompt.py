"""A request's prompt as the model takes it: pads expanded, mRoPE positions, and the ids as reported."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slime.engines.transformers_engine.errors import InternalFault, InvalidValue
from slime.engines.transformers_engine.images import Pixels

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class VisionTokens:
    """The ids and the merge size that prompts are expanded with."""

    image_pad: int
    video_pad: int
    merge: int
    vocab_size: int
    image_text: str
    """The text form of one picture: vision start, one pad, vision end."""
    image_pattern: re.Pattern[str]
    """Matches one picture in text: its pads, expanded or not, between start and end, or `<image>`."""

    @classmethod
    def of_text_model(cls, vocab_size: int) -> "VisionTokens":
        """Return those of a model without vision: no id is a pad, and no text stands for a picture."""
        return cls(
            image_pad=-1,
            video_pad=-1,
            merge=1,
            vocab_size=vocab_size,
            image_text="",
            image_pattern=re.compile("(?!)"),
        )


@dataclass(frozen=True, eq=False)
class Prompt:
    """T expanded tokens and their pictures."""

    ids: Ints
    """`[T]`, every picture as `merged_tokens` pads."""
    positions: Ints
    """`[3, T]`: time, height, width."""
    next_position: int
    """Position of the first generated token, on all three axes."""
    image_mask: NDArray[np.bool_]
    """`[T]`: where the pictures' features go."""
    images: tuple[Pixels, ...]
    target_ids: Ints
    """`[T]`: the id whose log-prob is reported at each place (the last of the vocabulary at image places)."""

    @property
    def length(self) -> int:
        """T, pictures included."""
        return len(self.ids)

    @cached_property
    def image_tokens(self) -> int:
        """How many of the T tokens belong to pictures."""
        return int(self.image_mask.sum())

    @cached_property
    def key(self) -> bytes:
        """Equal for prompts whose forward is the same."""
        return (
            self.ids.tobytes() + self.image_mask.tobytes() + b"".join(image.digest for image in self.images)
        )


def reported_ids(ids: Ints, vocab_size: int) -> list[int]:
    """Return ids as answers carry them: the vocabulary's last (so image places, too) is shown as 0."""
    return np.where(ids < vocab_size - 1, ids, 0).tolist()


def tokenize(text: str, image_count: int, tokenizer: Any, vision: VisionTokens) -> list[int]:
    """Return the ids of a text prompt; with pictures, each of its placeholders becomes one pad."""
    if image_count:
        text, placeholders = vision.image_pattern.subn(lambda _: vision.image_text, text)
        if placeholders > image_count:
            raise InvalidValue(
                f"Prompt has {placeholders} image placeholders but {image_count} image inputs were provided"
            )
    return tokenizer.encode(text)


def build_prompt(ids: Sequence[int], images: Sequence[Pixels], vision: VisionTokens) -> Prompt:
    """Expand the pads and lay out positions; raise where the ids and the pictures cannot be served.

    One pad stands for one picture. Without pictures a pad is an ordinary token; so is a pad at the very
    start. More pads than pictures crash the real server's handler (500); surplus pictures are dropped, as
    there.
    """
    if ids and not (min(ids) >= 0 and max(ids) < vision.vocab_size):
        outside = next(id_ for id_ in ids if not 0 <= id_ < vision.vocab_size)
        raise InvalidValue(
            f"input_ids holds {outside}, outside the model's vocabulary [0, {vision.vocab_size}); "
            "send ids of the served checkpoint's own tokenizer."
        )
    wire = np.asarray(ids, dtype=np.int64)
    pads = [int(place) for place in np.flatnonzero(wire == vision.image_pad) if place > 0] if images else []
    if len(pads) > len(images):
        raise InternalFault(
            f"{len(pads)} image pads for {len(images)} pictures: input_ids must hold one <|image_pad|> per "
            "picture, not expanded ones, and none in a response."
        )
    if images and vision.video_pad in wire:
        raise InternalFault("input_ids holds a <|video_pad|>, and videos are not served.")
    return _lay_out(wire, pads, tuple(images[: len(pads)]), vision)


def _lay_out(wire: Ints, pads: list[int], images: tuple[Pixels, ...], vision: VisionTokens) -> Prompt:
    pieces: list[Ints] = []
    positions: list[Ints] = []
    masks: list[NDArray[np.bool_]] = []
    position, done = 0, 0

    def add_text(end: int) -> None:
        nonlocal position, done
        text = wire[done:end]
        pieces.append(text)
        positions.append(np.tile(np.arange(position, position + len(text)), (3, 1)))
        masks.append(np.zeros(len(text), dtype=bool))
        position += len(text)

    for pad, image in zip(pads, images, strict=True):
        add_text(pad)
        time, height, width = image.grid[0], image.grid[1] // vision.merge, image.grid[2] // vision.merge
        count = time * height * width
        pieces.append(np.full(count, vision.image_pad))
        positions.append(np.indices((time, height, width)).reshape(3, count) + position)
        masks.append(np.ones(count, dtype=bool))
        position += max(height, width)
        done = pad + 1
    add_text(len(wire))
    expanded, mask = np.concatenate(pieces), np.concatenate(masks)
    return Prompt(
        ids=expanded,
        positions=np.concatenate(positions, axis=1),
        next_position=position,
        image_mask=mask,
        images=images,
        target_ids=np.where(mask, vision.vocab_size - 1, expanded),
    )
