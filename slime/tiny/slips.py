"""Writes responses that go wrong once and go on sensibly: what a teacher has to have seen.

A teacher scores the tokens of a student that slips. One that has only read correct text is lost after the
first slip, and what it says of the rest is noise; so a share of its pre-training text contains a slip,
whose own tokens carry no loss: the teacher never prefers it, and knows how to go on.
"""

import random
from dataclasses import dataclass

from slime.tiny.kinds import NUMBERS, calculate, conclude
from slime.tiny.problems import Problem


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a response."""

    text: str
    learned: bool
    """Whether its tokens carry loss."""


def response_with_slip(rng: random.Random, problem: Problem) -> list[Segment]:
    """Write a response in which one number is misread or miscalculated, or the last step is forgotten."""
    return rng.choice((_misread, _miscalculated, _forgotten))(rng, problem)


def _misread(rng: random.Random, problem: Problem) -> list[Segment]:
    """Take wrong numbers from the problem, and compute with them."""
    kind, a, b = problem.kind, rng.choice(NUMBERS), rng.choice(NUMBERS)
    before, between, after = kind.names.split("{}")
    value = calculate(kind, a, b)
    return [
        Segment(f"<think>{before}", True),
        Segment(str(a), a == problem.a),
        Segment(between, True),
        Segment(str(b), b == problem.b),
        Segment(f"{after}. {a}{kind.first}{b}={value}{conclude(kind, value)}", True),
    ]


def _miscalculated(rng: random.Random, problem: Problem) -> list[Segment]:
    """Write a wrong result of the first operation, and go on with it."""
    kind, a, b = problem.kind, problem.a, problem.b
    value = calculate(kind, rng.choice(NUMBERS), rng.choice(NUMBERS))
    return [
        Segment(f"<think>{kind.names.format(a, b)}. {a}{kind.first}{b}=", True),
        Segment(value, value == calculate(kind, a, b)),
        Segment(conclude(kind, value), True),
    ]


def _forgotten(rng: random.Random, problem: Problem) -> list[Segment]:
    """End the thought before the last step; the answer is what the thought came to."""
    kind, a, b = problem.kind, problem.a, problem.b
    value = calculate(kind, a, b)
    thought, answer = conclude(kind, value, forget_last_step=True).split("Answer")
    return [
        Segment(f"<think>{kind.names.format(a, b)}. {a}{kind.first}{b}={value}", True),
        Segment(thought, not kind.last),
        Segment(f"Answer{answer}", True),
    ]
