"""Responses with a slip: wrong once, unlearned there, and consistent after it."""

import random
import re

import pytest

from slime.tiny.geometry import GEOMETRY
from slime.tiny.kinds import calculate, finish
from slime.tiny.problems import Problem
from slime.tiny.slips import Segment, response_with_slip


@pytest.fixture(scope="module")
def responses() -> list[tuple[Problem, list[Segment]]]:
    rng = random.Random(0)
    return [(row, response_with_slip(rng, row)) for row in GEOMETRY.make_splits()["test"]]


def test_what_is_not_learned_is_the_only_difference_from_the_solution(
    responses: list[tuple[Problem, list[Segment]]],
) -> None:
    for row, segments in responses:
        text = "".join(segment.text for segment in segments)
        if all(segment.learned for segment in segments):
            assert text == row.solution
        else:
            assert text != row.solution
            first_wrong = next(at for at, segment in enumerate(segments) if not segment.learned)
            before = "".join(segment.text for segment in segments[:first_wrong])
            assert row.solution.startswith(before)


def test_what_follows_a_slip_follows_from_it(responses: list[tuple[Problem, list[Segment]]]) -> None:
    kinds_of_slip = set()
    for row, segments in responses:
        wrong = "".join(segment.text for segment in segments if not segment.learned)
        text = "".join(segment.text for segment in segments)
        [(a, b, between)] = re.findall(r"\. (\d+)[*+](\d+)=(\d+)", text)
        [boxed] = re.findall(r"boxed\{(.*)\}$", text)
        if wrong == "</think>":
            kinds_of_slip.add("forgotten")
            assert boxed == between == calculate(row.kind, int(a), int(b))
        else:
            kinds_of_slip.add(
                "misread" if between == calculate(row.kind, int(a), int(b)) else "miscalculated"
            )
            assert boxed == finish(row.kind, between)
    assert kinds_of_slip == {"forgotten", "misread", "miscalculated"}
