"""Generates the set in words: the same problems, their numbers in the question, in dapo-math-17k's schema.

A prompt is a list of messages and has no picture.
"""

import random
from collections.abc import Sequence
from typing import Any, Final

import pyarrow as pa

from slime.tiny.kinds import Kind
from slime.tiny.problems import Problem, ProblemSet

_ONE_SENTENCE: Final = (
    "Find the {quantity} of a {shape} with {measures}.",
    "What is the {quantity} of a {shape} with {measures}?",
    "Given a {shape} with {measures}, find its {quantity}.",
    "If a {shape} has {measures}, what is its {quantity}?",
)
_FACTS: Final = ("A {shape} has {measures}.", "The {parts}.", "There is a {shape} with {measures}.")
_ASKS: Final = ("Find its {quantity}.", "What is its {quantity}?")
_PHRASINGS: Final = (*_ONE_SENTENCE, *(f"{fact} {ask}" for fact in _FACTS for ask in _ASKS))


def _pose(rng: random.Random, kind: Kind, a: int, b: int, taken: set[str]) -> Problem:
    """Ask a new question."""
    while True:
        question = _question(rng, kind, a, b)
        if question not in taken:
            return Problem(kind, a, b, question, image=None, key=question)


def _question(rng: random.Random, kind: Kind, a: int, b: int) -> str:
    """Word a question; two measures that have names come in either order."""
    named = kind.names.format(a, b).split(", ")
    nouns = [measure.rstrip(" 0123456789") for measure in named]
    if nouns[1]:
        order = rng.sample((0, 1), 2)
        measures = " and ".join(named[place] for place in order)
        first, second = (f"{nouns[place]} of {{}} is {(a, b)[place]}" for place in order)
        parts = f"{first.format(f'a {kind.shape}')} and the {second.format('it')}"
    else:
        measures = f"{nouns[0]} {a} and {b}"
        parts = f"{nouns[0]} of a {kind.shape} are {a} and {b}"
    return rng.choice(_PHRASINGS).format(
        quantity=kind.quantity, shape=kind.shape, measures=measures, parts=parts
    )


def _columns(rows: Sequence[Problem]) -> dict[str, list[Any]]:
    return {
        "prompt": [[{"role": "user", "content": row.text}] for row in rows],
        "label": [row.answer for row in rows],
        "solution": [row.solution for row in rows],
    }


WORDS: Final = ProblemSet(
    version="words, version 1",
    pose=_pose,
    schema=pa.schema(
        [
            ("prompt", pa.list_(pa.struct([("content", pa.string()), ("role", pa.string())]))),
            ("label", pa.string()),
            ("solution", pa.string()),
        ]
    ),
    columns=_columns,
    pictured=False,
)
