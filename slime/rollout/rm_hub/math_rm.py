r"""Grade mathematical answers: the last `\boxed{}` of a response against its label.

Plain answers are compared on the spot; the others by `math-verify` in the worker processes of `grader.py`,
which a hung comparison cannot stop. Nothing of a response is ever executed.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from slime.rollout.rm_hub.answers import final_answer, quick_verdict
from slime.rollout.rm_hub.grader import shared_grader

if TYPE_CHECKING:  # the sample's module imports torch
    from slime.utils.types import Sample


def compute_math_reward(response: Sample | str, label: str | None = None) -> float:
    """Grade a `Sample`, or a response and its label: 1.0 where they agree, else 0.0. Blocks for 2 s at most,
    and rarely.

    Raises:
        ValueError: there is no label to compare with.
    """
    answer, label = _answer_and_label(response, label)
    verdict = _quick(answer, label)
    if verdict is None:
        verdict = shared_grader().submit(str(answer), label).result()
    return float(verdict)


async def math_rm(args: Any, sample: Sample, **kwargs: Any) -> float:
    """Grade a sample without blocking the event loop, in the form of `--custom-rm-path`."""
    answer, label = _answer_and_label(sample, None)
    verdict = _quick(answer, label)
    if verdict is None:
        verdict = await asyncio.wrap_future(shared_grader().submit(str(answer), label))
    return float(verdict)


def _answer_and_label(response: Sample | str, label: str | None) -> tuple[str | None, str]:
    if not isinstance(response, str):
        label = response.label if label is None else label
        response = response.response
    if label is None:
        raise ValueError(
            "there is no label to grade against; set --label-key to the column of the reference answer."
        )
    text = str(label)
    # a label may come boxed itself, as some data sets have it
    boxed = final_answer(text)
    return final_answer(response), text if boxed is None else boxed


def _quick(answer: str | None, label: str) -> bool | None:
    return False if answer is None else quick_verdict(answer, label)
