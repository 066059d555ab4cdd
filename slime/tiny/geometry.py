"""Generates the geometry set: problems with one picture each, in geo3k's schema.

The two numbers of a problem stand in its picture only, and half of the questions do not name the shape
either.
"""

import hashlib
import io
import random
from collections.abc import Sequence
from typing import Any, Final

import pyarrow as pa
from PIL import Image

from slime.tiny.kinds import Kind
from slime.tiny.problems import Problem, ProblemSet
from slime.tiny.shapes import random_figure, render

_PHRASINGS: Final = (
    "Find the {quantity} of the {shape}.",
    "What is the {quantity} of the {shape}?",
    "Find the {quantity} of the figure.",
    "What is the {quantity} of the figure?",
)


def _pose(rng: random.Random, kind: Kind, a: int, b: int, taken: set[str]) -> Problem:
    """Draw a new picture with `a` below the figure and `b` at its left, and ask about it."""
    while True:
        dashed = kind.shape == "parallelogram" and kind.quantity == "area"
        image = render(random_figure(rng, kind.shape, a, b, dashed=dashed))
        picture_hash = hashlib.sha256(image.tobytes()).hexdigest()
        if picture_hash not in taken:
            question = rng.choice(_PHRASINGS).format(quantity=kind.quantity, shape=kind.shape)
            return Problem(kind, a, b, f"<image>{question}", image, picture_hash)


def _columns(rows: Sequence[Problem]) -> dict[str, list[Any]]:
    return {
        "problem": [row.text for row in rows],
        "answer": [row.answer for row in rows],
        "images": [[{"bytes": _png(row.image), "path": None}] for row in rows if row.image is not None],
        "solution": [row.solution for row in rows],
    }


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


GEOMETRY: Final = ProblemSet(
    version="version 1",
    pose=_pose,
    schema=pa.schema(
        [
            ("problem", pa.string()),
            ("answer", pa.string()),
            ("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
            ("solution", pa.string()),
        ]
    ),
    columns=_columns,
    pictured=True,
)
