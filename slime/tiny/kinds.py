"""The kinds of problems, and how they are solved in writing: what both sets share, pictures or words."""

from dataclasses import dataclass
from typing import Final

from slime.tiny.shapes import Shape

NUMBERS: Final = range(2, 13)


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


def solve(kind: Kind, a: int, b: int, *, forget_last_step: bool = False) -> str:
    """Write the response for the numbers `a` and `b`: thought, then boxed answer.

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
