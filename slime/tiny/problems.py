"""A generated set of problems: rows without end, its splits, its parquet files.

No row's key (the picture, or the question) occurs twice, so that train, validation and test share none; in
train, every pair of numbers occurs with every kind of question. The same seed gives the same bytes.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from slime.tiny.kinds import KINDS, NUMBERS, Kind, calculate, finish, solve

SEED: Final = 20260
SPLIT_SIZES: Final = {"train": 4096, "validation": 256, "test": 512}


@dataclass(frozen=True, slots=True)
class Problem:
    """One row: a question on two numbers, and its answer."""

    kind: Kind
    a: int
    """The first number that a solution names."""
    b: int
    text: str
    """The question; with a picture, `<image>` before it."""
    image: Image.Image | None
    """Where the numbers stand; None where they stand in the question."""
    key: str
    """What no other row has: the question, or the SHA-256 of the picture's pixels."""

    @property
    def answer(self) -> str:
        """Return the correct answer as a decimal number."""
        return finish(self.kind, calculate(self.kind, self.a, self.b))

    @property
    def solution(self) -> str:
        """Return the full text of a correct response."""
        return solve(self.kind, self.a, self.b)


@dataclass(frozen=True)
class ProblemSet:
    """How one set is made."""

    version: str
    """Changes whenever the same seed would give other rows; of every set another."""
    pose: Callable[[random.Random, Kind, int, int, set[str]], Problem]
    """Makes a problem of a kind on two numbers whose key is not among those given."""
    schema: pa.Schema
    columns: Callable[[Sequence[Problem]], dict[str, list[Any]]]
    """Returns what the files hold, by column."""
    pictured: bool
    """Whether a problem has a picture; of these there is no end, of questions in words there is."""

    def stream(self, rng: random.Random, taken: set[str]) -> Iterator[Problem]:
        """Yield problems without end, whose keys are not in `taken`; one with a picture never comes again.

        Kinds and pairs of numbers come in shuffled rounds: every combination once, before any comes again.
        """
        while True:
            combinations = [(kind, a, b) for kind in KINDS for a in NUMBERS for b in NUMBERS]
            rng.shuffle(combinations)
            for kind, a, b in combinations:
                problem = self.pose(rng, kind, a, b, taken)
                if self.pictured:
                    taken.add(problem.key)
                yield problem

    def make_splits(self, seed: int = SEED) -> dict[str, list[Problem]]:
        """Make the rows of all splits; no key occurs twice in them."""
        rng, taken = random.Random(seed), set[str]()
        splits: dict[str, list[Problem]] = {}
        for split, size in SPLIT_SIZES.items():
            splits[split] = []
            for problem, _ in zip(self.stream(rng, taken), range(size), strict=False):
                taken.add(problem.key)
                splits[split].append(problem)
        return splits

    def write_splits(self, directory: Path, seed: int = SEED) -> dict[str, Path]:
        """Write one parquet file a split."""
        directory.mkdir(parents=True, exist_ok=True)
        schema = self.schema.with_metadata({"slime.tiny": self.stamp(seed)})
        paths: dict[str, Path] = {}
        for split, rows in self.make_splits(seed).items():
            paths[split] = directory / f"{split}.parquet"
            pq.write_table(pa.table(self.columns(rows), schema=schema), paths[split])
        return paths

    def stamp(self, seed: int = SEED) -> str:
        """Return what the parquet files carry in their metadata: which generator and seed wrote them."""
        return f"{self.version}, seed {seed}"
