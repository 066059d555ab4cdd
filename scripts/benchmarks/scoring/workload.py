"""What is scored: groups of samples about line drawings, of the sizes that geo3k brings.

The same shape and seed give the same ids and the same drawing; a turn's number is stamped on the drawing, so
that no cache of pictures helps whoever comes second. Ids are arbitrary: no tokenizer, no model.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Self

from PIL import Image, ImageDraw

MERGED_PATCH = 32
"""Side in pixels of what becomes one token: patches of 16, merged two by two, as in Qwen3-VL."""
SMALLEST_SIDE = 256
"""Smaller pictures are enlarged by Qwen3-VL's processor."""
PICTURE_FRAME = 3
"""Vision start, image pad, vision end."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The ids that a workload draws from, and those that frame a picture."""

    size: int
    text: tuple[int, int]
    """Ids from the first up to the second stand for text."""
    vision_start: int
    image_pad: int
    vision_end: int


QWEN3_VL = Vocabulary(
    size=151_936, text=(0, 151_643), vision_start=151_652, image_pad=151_655, vision_end=151_653
)


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of one row of the benchmark."""

    side: int
    """Of the square drawing, in pixels."""
    prompt: int
    """P, tokens of the prompt with its picture expanded."""
    response: int
    """R."""
    groups: int
    samples: int
    """n, samples of one group."""

    @classmethod
    def parse(cls, text: str, groups: int, samples: int) -> Self:
        """Read SIDE:P:R.

        Raises:
            ValueError: not three numbers, or the picture does not fit into P.
        """
        try:
            side, prompt, response = (int(part) for part in text.split(":"))
        except ValueError as error:
            raise ValueError(
                f"{text!r} is no shape; give SIDE:P:R, as 512:332:1024 (pixels and tokens)."
            ) from error
        shape = cls(side=side, prompt=prompt, response=response, groups=groups, samples=samples)
        least = shape.image_tokens + PICTURE_FRAME
        if side < SMALLEST_SIDE or prompt < least or response < 1 or groups < 1 or samples < 1:
            raise ValueError(
                f"{text!r} cannot be: a side has {SMALLEST_SIDE} pixels or more, the picture takes {least} "
                "tokens of P, and R, groups and samples are 1 or more."
            )
        return shape

    @property
    def image_tokens(self) -> int:
        return picture_tokens(self.side, self.side)

    @property
    def total(self) -> int:
        return self.groups * self.samples

    @property
    def label(self) -> str:
        return f"{self.side}x{self.side}, P {self.prompt:,}, R {self.response:,}"


@dataclass(frozen=True, slots=True)
class Group:
    """The samples of one prompt before anybody has touched the picture."""

    number: int
    prompt: list[int]
    """Wire form: one image pad."""
    responses: list[list[int]]
    """[n][R]"""
    picture: Image.Image


def picture_tokens(width: int, height: int) -> int:
    """Return what a picture between the processor's limits of area expands to."""
    return round(width / MERGED_PATCH) * round(height / MERGED_PATCH)


def make_groups(shape: Shape, vocabulary: Vocabulary, turn: int) -> list[Group]:
    """Make a turn's samples; only the stamp on the pictures depends on the turn."""
    return [_group(shape, vocabulary, number, turn) for number in range(shape.groups)]


def _group(shape: Shape, vocabulary: Vocabulary, number: int, turn: int) -> Group:
    source = random.Random(f"{shape.side} {shape.prompt} {shape.response} {number}")
    words = shape.prompt - shape.image_tokens - PICTURE_FRAME + 1
    text = source.choices(range(*vocabulary.text), k=words)
    before = min(14, words)
    frame = [vocabulary.vision_start, vocabulary.image_pad, vocabulary.vision_end]
    prompt = [*text[:before], *frame, *text[before:]]
    responses = [source.choices(range(*vocabulary.text), k=shape.response) for _ in range(shape.samples)]
    return Group(number, prompt, responses, drawing(shape.side, source, turn * shape.groups + number))


def drawing(side: int, source: random.Random, stamp: int) -> Image.Image:
    """Draw a triangle, a circle and labels in black on white with soft edges, and `stamp` in a corner."""
    fine = 2 * side  # drawn twice as large and reduced: the grey edges of a scanned textbook figure
    canvas = Image.new("L", (fine, fine), 255)
    pen = ImageDraw.Draw(canvas)
    corners = [
        (source.uniform(0.05, 0.95) * fine, low * fine + source.uniform(0, 0.2) * fine)
        for low in (0.05, 0.4, 0.75)
    ]
    width = max(2, fine // 200)
    pen.polygon(corners, outline=0, width=width)
    centre, radius = source.uniform(0.4, 0.6) * fine, source.uniform(0.15, 0.35) * fine
    box = (centre - radius, centre - radius, centre + radius, centre + radius)
    pen.ellipse(box, outline=0, width=width)
    for place, (x, y) in enumerate(corners):
        pen.text((x, y), f"{'ABC'[place]} {source.randint(2, 99)}", fill=0, font_size=fine / 25)
    picture = canvas.resize((side, side), Image.Resampling.LANCZOS).convert("RGB")
    for bit in range(24):
        picture.putpixel((bit, 0), (0, 0, 0) if stamp >> bit & 1 else (255, 255, 255))
    return picture
