"""Find the final answer in a response and compare plain ones. Pure string work, never evaluates anything.

What needs mathematics (roots, fractions within fractions, intervals) is left to the worker processes of
`grader.py`.
"""

from __future__ import annotations

import re
from fractions import Fraction

TAIL_CHARACTERS = 16_384
"""The answer stands at the end; a longer response is trimmed to this much."""
LONGEST_ANSWER = 1_024
"""A box that holds more is no answer to a question with a short one, and could keep a worker busy."""

_BRACE = re.compile(r"(?<!\\)[{}]")
_BOX = re.compile(r"\\f?boxed\s*\{")
_DEGREES = re.compile(r"(\^\s*\{?\s*\\circ\s*\}?|\\degree|°|\s*\bdegrees?\b)")
_SPACING = re.compile(r"\\[,;:! ]|\\left|\\right|\\quad|[\s$~]+")
_WRAPPED = re.compile(r"^\\(?:text|mathrm|mathbf|textbf)\{([^{}]*)\}$")
_NUMBER = re.compile(r"^[+-]?(\d+(\.\d*)?|\.\d+)$")
_GROUPED = re.compile(r"^[+-]?\d{1,3}(,\d{3})+(\.\d*)?$")
_RATIO = re.compile(r"^([+-]?)(?:\\[dt]?frac\{([+-]?\d+)\}\{(\d+)\}|([+-]?\d+)/(\d+))$")
_LONGEST_NUMBER = 60


def final_answer(response: str) -> str | None:
    r"""Return what the last `\boxed{}` holds, looking behind the last `</think>` where there is one; else
    None."""
    tail = response[-TAIL_CHARACTERS:].rpartition("</think>")[2]
    ends = [box.end() for box in _BOX.finditer(tail)]
    if not ends:
        return None
    closing = _closing_braces(tail)
    for start in reversed(ends):
        if start - 1 in closing:
            content = tail[start : closing[start - 1]]
            return content if len(content) <= LONGEST_ANSWER else None
    return None


def _closing_braces(text: str) -> dict[int, int]:
    """Return the place of the brace that closes each opening one, by that one's place, in a single pass."""
    closing: dict[int, int] = {}
    pending: list[int] = []
    for brace in _BRACE.finditer(text):
        place = brace.start()
        if text[place] == "{":
            pending.append(place)
        elif pending:
            closing[pending.pop()] = place
    return closing


def normalise(answer: str) -> str:
    """Drop what changes no answer: spacing, dollar signs, degree marks, a text wrapper, a final dot."""
    text = _SPACING.sub("", _DEGREES.sub("", answer))
    wrapped = _WRAPPED.match(text)
    text = wrapped.group(1) if wrapped else text
    return text.rstrip(".").replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")


def as_number(normalised: str) -> Fraction | None:
    """Read an integer, a decimal or a ratio of integers exactly; None for anything else."""
    if len(normalised) > _LONGEST_NUMBER:
        return None
    if _GROUPED.match(normalised):
        normalised = normalised.replace(",", "")
    if _NUMBER.match(normalised):
        return Fraction(normalised)
    ratio = _RATIO.match(normalised)
    if ratio is None:
        return None
    sign, over, under, plain_over, plain_under = ratio.groups()
    denominator = int(under or plain_under)
    if denominator == 0:
        return None
    return (-1 if sign == "-" else 1) * Fraction(int(over or plain_over), denominator)


def quick_verdict(answer: str, label: str) -> bool | None:
    """Compare two answers where that is plain; None where it takes mathematics."""
    if len(label) > LONGEST_ANSWER:  # no answer is as long
        return False
    ours, theirs = normalise(answer), normalise(label)
    if not ours:
        return False
    if ours == theirs:
        return True
    our_number, their_number = as_number(ours), as_number(theirs)
    if our_number is not None and their_number is not None:
        return our_number == their_number
    return False if _contradicts_itself(ours) else None


def _contradicts_itself(normalised: str) -> bool:
    """Tell whether an answer equates different numbers, as 6=5: its last part alone is no answer."""
    numbers = [number for part in normalised.split("=") if (number := as_number(part)) is not None]
    return len(set(numbers)) > 1
