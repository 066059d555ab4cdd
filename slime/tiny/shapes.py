"""Draws one labelled figure on a 96x96 picture.

The outline has a random size, and each number stands in a random place along its side; but every digit
fills exactly one 16-pixel patch of the vision tower, since a model of 0.3 M parameters learns aligned
digits in minutes and shifted ones in hours. Knows nothing of questions or answers.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from PIL import Image, ImageDraw

Shape = Literal["rectangle", "parallelogram", "right triangle", "rhombus"]
Point = tuple[int, int]

SIDE = 96
CELL = 16
CELLS = SIDE // CELL
LEFT, BOTTOM = 34, 76
WIDTHS = range(36, 59)
HEIGHTS = range(36, 71)
SLANTS = range(6, 15)

_GLYPHS = {
    "0": ("01110", "10001", "10011", "10101", "11001", "10001", "01110"),
    "1": ("00100", "01100", "00100", "00100", "00100", "00100", "01110"),
    "2": ("01110", "10001", "00001", "00110", "01000", "10000", "11111"),
    "3": ("11110", "00001", "00001", "01110", "00001", "00001", "11110"),
    "4": ("00010", "00110", "01010", "10010", "11111", "00010", "00010"),
    "5": ("11111", "10000", "11110", "00001", "00001", "10001", "01110"),
    "6": ("00110", "01000", "10000", "11110", "10001", "10001", "01110"),
    "7": ("11111", "00001", "00010", "00100", "01000", "01000", "01000"),
    "8": ("01110", "10001", "10001", "01110", "10001", "10001", "01110"),
    "9": ("01110", "10001", "10001", "01111", "00001", "00010", "01100"),
}


@dataclass(frozen=True, slots=True)
class Figure:
    """Everything that decides the pixels of one picture."""

    shape: Shape
    across: int
    """The number below the figure."""
    up: int
    """The number at its left."""
    width: int
    """Pixels."""
    height: int
    """Pixels."""
    slant: int
    """Pixels by which the top of a parallelogram is shifted; 0 for the other shapes."""
    dashed: bool
    """Draw the height of a parallelogram: `up` measures it, and not the slanted side."""
    column: int
    """The patch column where `across` begins, in the bottom row."""
    row: int
    """The patch row of `up`, which ends in the second column."""


def random_figure(rng: random.Random, shape: Shape, across: int, up: int, *, dashed: bool) -> Figure:
    """Draw a random outline for the given shape and numbers."""
    width, height = rng.choice(WIDTHS), rng.choice(HEIGHTS)
    slant = rng.choice(SLANTS) if shape == "parallelogram" else 0
    digits = len(str(across))
    columns = [
        column
        for column in range(CELLS - digits + 1)
        if LEFT + 4 <= column * CELL + digits * CELL // 2 <= LEFT + width - slant - 4
    ]
    rows = [row for row in range(CELLS) if BOTTOM - height + 4 <= row * CELL + CELL // 2 <= BOTTOM - 4]
    return Figure(shape, across, up, width, height, slant, dashed, rng.choice(columns), rng.choice(rows))


def render(figure: Figure) -> Image.Image:
    """Render a figure in black on white, RGB, `SIDE` pixels square."""
    image = Image.new("L", (SIDE, SIDE), 255)
    draw = ImageDraw.Draw(image)
    _OUTLINES[figure.shape](draw, figure)
    _number(draw, figure.up, 2 - len(str(figure.up)), figure.row)
    _number(draw, figure.across, figure.column, CELLS - 1)
    return image.convert("RGB")


def _number(draw: ImageDraw.ImageDraw, number: int, column: int, row: int) -> None:
    """Write a number, one digit a cell, from the given cell to the right."""
    for offset, digit in enumerate(str(number)):
        for y, line in enumerate(_GLYPHS[digit]):
            for x, ink in enumerate(line):
                if ink == "1":
                    left, top = (column + offset) * CELL + 3 + 2 * x, row * CELL + 1 + 2 * y
                    draw.rectangle((left, top, left + 1, top + 1), fill=0)


def _polygon(draw: ImageDraw.ImageDraw, *corners: Point) -> None:
    draw.line([*corners, corners[0]], fill=0, width=2)


def _dashes(draw: ImageDraw.ImageDraw, start: Point, end: Point) -> None:
    """Draw a dashed horizontal or vertical line."""
    steps = max(abs(end[0] - start[0]), abs(end[1] - start[1]))
    for step in range(0, steps, 6):
        stop = min(step + 2, steps)
        a, b = ((start[i] + (end[i] - start[i]) * at // steps for i in (0, 1)) for at in (step, stop))
        draw.line([tuple(a), tuple(b)], fill=0, width=1)


def _rectangle(draw: ImageDraw.ImageDraw, figure: Figure) -> None:
    right, top = LEFT + figure.width, BOTTOM - figure.height
    _polygon(draw, (LEFT, BOTTOM), (right, BOTTOM), (right, top), (LEFT, top))


def _parallelogram(draw: ImageDraw.ImageDraw, figure: Figure) -> None:
    right, top = LEFT + figure.width - figure.slant, BOTTOM - figure.height
    _polygon(draw, (LEFT, BOTTOM), (right, BOTTOM), (right + figure.slant, top), (LEFT + figure.slant, top))
    if figure.dashed:
        _dashes(draw, (LEFT + figure.slant, top), (LEFT + figure.slant, BOTTOM))


def _right_triangle(draw: ImageDraw.ImageDraw, figure: Figure) -> None:
    right, top = LEFT + figure.width, BOTTOM - figure.height
    _polygon(draw, (LEFT, BOTTOM), (right, BOTTOM), (LEFT, top))
    draw.rectangle((LEFT, BOTTOM - 6, LEFT + 6, BOTTOM), outline=0)


def _rhombus(draw: ImageDraw.ImageDraw, figure: Figure) -> None:
    right, top = LEFT + figure.width, BOTTOM - figure.height
    middle, waist = LEFT + figure.width // 2, BOTTOM - figure.height // 2
    _polygon(draw, (LEFT, waist), (middle, BOTTOM), (right, waist), (middle, top))
    _dashes(draw, (LEFT, waist), (right, waist))
    _dashes(draw, (middle, top), (middle, BOTTOM))


_OUTLINES: dict[Shape, Callable[[ImageDraw.ImageDraw, Figure], None]] = {
    "rectangle": _rectangle,
    "parallelogram": _parallelogram,
    "right triangle": _right_triangle,
    "rhombus": _rhombus,
}
