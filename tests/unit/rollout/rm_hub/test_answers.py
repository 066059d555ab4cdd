from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest

from slime.rollout.rm_hub import answers
from slime.rollout.rm_hub.answers import TAIL_CHARACTERS, as_number, final_answer, quick_verdict


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"so \boxed{18}.", "18"),
        (r"<think>\boxed{3}</think>Answer: \boxed{4}", "4"),
        (r"<think>\boxed{3}</think>I do not know.", None),
        (r"<think>thinking, \boxed{3} perhaps", "3"),
        (r"\boxed{1} or rather \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{2} and then \boxed{3", "2"),
        (r"\fboxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed {7}", "7"),
        (r"\boxed{}", ""),
        ("18", None),
        ("", None),
        (r"\boxed{" + "1" * 5000 + "}", None),
        (r"\boxed{5}" + " " * TAIL_CHARACTERS, None),
        ("x" * 10 * TAIL_CHARACTERS + r"\boxed{5}", "5"),
        ("}" * 1_000_000 + r"\boxed{5}", "5"),
        (r"\boxed{5}" + r"\boxed{" * 2_000, "5"),
        (r"\boxed{" * 2_000 + "6" + "}" * 2_000, "6"),
        ("{" * 8_000 + r"\boxed{7}" + "}" * 7_000, "7"),
        (r"\boxed{8\}}", r"8\}"),
        ("\0\\boxed{9}\0", "9"),
    ],
)
def test_the_last_box_behind_the_thinking_counts(response: str, answer: str | None) -> None:
    assert final_answer(response) == answer


@pytest.mark.parametrize(
    ("answer", "label", "verdict"),
    [
        ("18", "18", True),
        (" 18. ", "18", True),
        ("18.0", "18", True),
        ("1,200", "1200", True),
        ("40^\\circ", "40", True),
        ("40^{\\circ}", "40", True),
        ("40°", "40 degrees", True),
        ("\\frac{31}{2}", "15.5", True),
        ("\\dfrac{1}{3}", "\\frac{1}{3}", True),
        ("-\\frac{1}{2}", "-0.5", True),
        ("31/2", "15.5", True),
        ("$2 \\sqrt { 3 }$", "2\\sqrt{3}", True),
        ("\\text{B}", "B", True),
        (".5", "0.5", True),
        ("19", "18", False),
        ("18", "-18", False),
        ("", "18", False),
        ("\\sqrt{12}", "2\\sqrt{3}", None),
        ("x=5", "5", None),
        ("1/0", "5", None),
        ("1,20", "120", None),
        ("9" * 80, "5", None),
        ("6=5", "5", False),
        ("5=5", "5", None),
        ("x=6=5", "5", False),
        ("5", " " * 1_000_000 + "5", False),
        ("5", "(" * 1_000_000, False),
    ],
)
def test_plain_answers_are_compared_on_the_spot(answer: str, label: str, verdict: bool | None) -> None:
    assert quick_verdict(answer, label) is verdict


def test_a_response_of_open_boxes_costs_no_more_than_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once each of a thousand boxes looked for its end up to the end of the response, in the event loop."""
    looked_at: list[int] = []

    class Counted(str):
        __slots__ = ()

        def __getitem__(self, place: Any) -> str:
            looked_at.append(1)
            return str.__getitem__(self, place)

    assert answers._closing_braces(Counted(r"\boxed{" * 2_000)) == {}
    assert len(looked_at) == 2_000


def test_numbers_are_exact() -> None:
    assert as_number("0.1") == Fraction(1, 10)
    assert as_number("+3.") == 3
    assert as_number("1e3") is None
    assert as_number("½") is None
