"""Generates the geometry set: problems with one picture each, in geo3k's schema.

The two numbers of a problem stand in its picture only, and half of the questions do not name the shape
either. No picture (by the hash of its pixels) occurs twice, so that train, validation and test share none;
in train, every pair of numbers occurs with every kind of question. The same seed gives the same bytes.
"""

import hashlib
import io
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from slime.tiny.shapes import Figure, Shape, random_figure, render

VERSION: Final = 1
"""Changes whenever the same seed would give other rows."""
SEED: Final = 20260
SPLIT_SIZES: Final = {"train": 4096, "validation": 256, "test": 512}
NUMBERS: Final = range(2, 13)
_PHRASINGS: Final = (
    "Find the {quantity} of the {shape}.",
    "What is the {quantity} of the {shape}?",
    "Find the {quantity} of the figure.",
    "What is the {quantity} of the figure?",
)


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of question: a quantity of a shape, and how it follows from the two numbers."""

    shape: Shape
    quantity: str
    names: str
    """How a solution calls the two numbers."""
    first: str
    """The operation on both numbers: `*` or `+`."""
    last: str
    """The last step, on that result: `/2`, `*2` or nothing."""


KINDS: Final = (
    Kind("rectangle", "area", "width {}, height {}", "*", ""),
    Kind("rectangle", "perimeter", "width {}, height {}", "+", "*2"),
    Kind("parallelogram", "area", "base {}, height {}", "*", ""),
    Kind("parallelogram", "perimeter", "base {}, side {}", "+", "*2"),
    Kind("right triangle", "area", "legs {}, {}", "*", "/2"),
    Kind("rhombus", "area", "diagonals {}, {}", "*", "/2"),
)


@dataclass(frozen=True, slots=True)
class Problem:
    """One row: a question, its picture and its answer."""

    kind: Kind
    figure: Figure
    question: str
    image: Image.Image
    picture_hash: str
    """SHA-256 of the pixels."""

    @property
    def text(self) -> str:
        """Return the question with the picture's placeholder."""
        return f"<image>{self.question}"

    @property
    def answer(self) -> str:
        """Return the correct answer as a decimal number."""
        return finish(self.kind, calculate(self.kind, self.figure.across, self.figure.up))

    @property
    def solution(self) -> str:
        """Return the full text of a correct response."""
        return solve(self.kind, self.figure.across, self.figure.up)


def solve(kind: Kind, a: int, b: int, *, forget_last_step: bool = False) -> str:
    """Write the response for the numbers `a` (below) and `b` (at the left): thought, then boxed answer.

    With `forget_last_step` the result of the first operation is the answer: the habit of the default student.
    """
    between = calculate(kind, a, b)
    return f"<think>{kind.names.format(a, b)}. {a}{kind.first}{b}={between}" + conclude(
        kind, between, forget_last_step=forget_last_step
    )


def conclude(kind: Kind, between: str, *, forget_last_step: bool = False) -> str:
    """Write what follows the result of the first operation: the last step, if any, and the answer."""
    last = "" if forget_last_step else kind.last
    result = finish(kind, between) if last else between
    step = f", {between}{last}={result}" if last else ""
    return f"{step}</think>Answer: \\boxed{{{result}}}"


def calculate(kind: Kind, a: int, b: int) -> str:
    """Return the result of the first operation."""
    return str(a * b if kind.first == "*" else a + b)


def finish(kind: Kind, between: str) -> str:
    """Return the result of the last step on a whole number: 18, 22.5."""
    halves = int(between) * {"": 2, "*2": 4, "/2": 1}[kind.last]
    return str(halves // 2) if halves % 2 == 0 else f"{halves // 2}.5"


def problems(rng: random.Random, taken: set[str]) -> Iterator[Problem]:
    """Yield problems without end, whose pictures are not in `taken`; each picture is added to it.

    Kinds and pairs of numbers come in shuffled rounds: every combination once, before any comes again.
    """
    while True:
        combinations = [(kind, a, b) for kind in KINDS for a in NUMBERS for b in NUMBERS]
        rng.shuffle(combinations)
        for kind, a, b in combinations:
            yield _fresh_problem(rng, kind, a, b, taken)


def make_splits(seed: int = SEED) -> dict[str, list[Problem]]:
    """Make the rows of all splits; no picture occurs twice in them."""
    rng, taken = random.Random(seed), set[str]()
    return {
        split: [problem for problem, _ in zip(problems(rng, taken), range(size), strict=False)]
        for split, size in SPLIT_SIZES.items()
    }


def write_splits(directory: Path, seed: int = SEED) -> dict[str, Path]:
    """Write one parquet file a split; columns problem, answer, images, solution."""
    directory.mkdir(parents=True, exist_ok=True)
    paths: dict[str, Path] = {}
    for split, rows in make_splits(seed).items():
        paths[split] = directory / f"{split}.parquet"
        pq.write_table(_table(rows, seed), paths[split])
    return paths


def stamp(seed: int = SEED) -> str:
    """Return what the parquet files carry in their metadata: which generator and seed wrote them."""
    return f"version {VERSION}, seed {seed}"


def _fresh_problem(rng: random.Random, kind: Kind, a: int, b: int, taken: set[str]) -> Problem:
    while True:
        dashed = kind.shape == "parallelogram" and kind.quantity == "area"
        figure = random_figure(rng, kind.shape, a, b, dashed=dashed)
        image = render(figure)
        picture_hash = hashlib.sha256(image.tobytes()).hexdigest()
        if picture_hash not in taken:
            taken.add(picture_hash)
            question = rng.choice(_PHRASINGS).format(quantity=kind.quantity, shape=kind.shape)
            return Problem(kind, figure, question, image, picture_hash)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


_SCHEMA = pa.schema(
    [
        ("problem", pa.string()),
        ("answer", pa.string()),
        ("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
        ("solution", pa.string()),
    ]
)


def _table(rows: list[Problem], seed: int) -> pa.Table:
    columns = {
        "problem": [row.text for row in rows],
        "answer": [row.answer for row in rows],
        "images": [[{"bytes": _png(row.image), "path": None}] for row in rows],
        "solution": [row.solution for row in rows],
    }
    return pa.table(columns, schema=_SCHEMA.with_metadata({"slime.tiny": stamp(seed)}))
