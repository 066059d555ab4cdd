"""Whatever a student answers, it gets a grade in bounded time, and one above nought only for the answer."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from slime.rollout.rm_hub.answers import final_answer
from slime.rollout.rm_hub.grader import Grader
from slime.rollout.rm_hub.math_rm import compute_math_reward

LABEL = "31415926535.25"
"""No expression of small numbers has this value by chance."""
SIZE = 2
ATOMS = st.sampled_from(
    [
        *(
            "0",
            "1",
            "7",
            "9",
            "x",
            "\\pi",
            "\\infty",
            "e",
            "i",
            "\\emptyset",
            "-",
            "0.1",
            "1/0",
            "٣",
            "½",
            "",
        ),
        *("import os; os.abort()", "__import__('os')._exit(1)", "lambda: 1", "exit()", "print(1)", "{{7*7}}"),
        *(
            "\\text{true}",
            "True",
            "nan",
            "\\mathrm{NaN}",
            "\0",
            "\u202e",
            "\\left(",
            "\\right]",
            "}",
            "{",
            "\\",
        ),
        *(
            "\\boxed{",
            "</think>",
            "$",
            "\\pm",
            "=",
            "<",
            "\\neq",
            ",",
            ";",
            "\\%",
            "!",
            "&",
            "\\\\",
            "\\in",
            "\\cup",
        ),
    ]
)


def _wrapped(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    two = st.tuples(inner, inner)
    return (
        two.map(lambda pair: f"\\frac{{{pair[0]}}}{{{pair[1]}}}")
        | two.map(lambda pair: f"{pair[0]}^{{{pair[1]}}}")
        | two.map(lambda pair: f"{pair[0]}+{pair[1]}")
        | two.map(lambda pair: f"{pair[0]}{pair[1]}")
        | inner.map(lambda text: f"\\sqrt{{{text}}}")
        | inner.map(lambda text: f"\\{{{text}\\}}")
        | inner.map(lambda text: f"({text})")
        | inner.map(lambda text: f"\\begin{{pmatrix}}{text}\\end{{pmatrix}}")
        | inner.map(lambda text: f"\\int_0^1 {text} dx")
    )


ANSWERS = st.recursive(ATOMS, _wrapped, max_leaves=8) | st.text(max_size=40)


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    grader = Grader(SIZE)
    yield grader
    grader.close()


@pytest.fixture(scope="module", autouse=True)
def _shared(grader: Grader) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        # by its name the package gives the function that is called like the module
        patched.setattr(sys.modules[compute_math_reward.__module__], "shared_grader", lambda: grader)
        yield


def _grade(answer: str) -> float:
    return compute_math_reward(f"<think>hm</think>It is \\boxed{{{answer}}}.", LABEL)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(answer=ANSWERS)
@example(answer="9^{9^{9^{9}}}")
@example(answer="6=31415926535.25")
def test_no_answer_but_the_right_one_is_right(answer: str) -> None:
    assert _grade(answer) == 0.0


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(
    max_examples=500,
    deadline=None,
    derandomize=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(answers=st.lists(ANSWERS, min_size=20, max_size=20))
def test_ten_thousand_wrong_answers_are_wrong(answers: list[str], grader: Grader) -> None:
    with ThreadPoolExecutor(SIZE) as pool:
        for answer, grade in zip(answers, pool.map(_grade, answers), strict=True):
            assert grade == 0.0, answer
    assert len(grader._workers) <= SIZE


@settings(max_examples=100, deadline=None, derandomize=True)
@given(parts=st.lists(ATOMS | st.just("\\boxed{") | st.text(max_size=5), max_size=30))
@example(parts=["\\boxed{"] * 30)
def test_what_is_found_in_a_box_stands_in_the_response_in_balance(parts: list[str]) -> None:
    response = "".join(parts)
    found = final_answer(response)
    if found is not None:
        assert f"{{{found}}}" in response
        bare = found.replace("\\{", "").replace("\\}", "")
        assert bare.count("{") == bare.count("}")
