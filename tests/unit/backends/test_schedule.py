"""The learning rate over the steps."""

from __future__ import annotations

from typing import Literal

import pytest

from slime.backends.schedule import LearningRate


def test_warm_up_is_linear_and_never_zero() -> None:
    schedule = LearningRate(lr=1.0, warmup_steps=4, total_steps=10)
    assert [schedule.at(step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(("style", "middle"), [("constant", 1.0), ("linear", 0.6), ("cosine", 0.6)])
def test_decay_runs_from_the_peak_to_the_floor(
    style: Literal["constant", "linear", "cosine"], middle: float
) -> None:
    schedule = LearningRate(lr=1.0, min_lr=0.2, style=style, warmup_steps=2, total_steps=12)
    assert schedule.at(2) == pytest.approx(1.0)
    assert schedule.at(7) == pytest.approx(middle)
    end = 1.0 if style == "constant" else 0.2
    assert schedule.at(12) == pytest.approx(end)
    assert schedule.at(1000) == pytest.approx(end)


def test_a_run_shorter_than_its_warm_up_still_has_a_schedule() -> None:
    assert LearningRate(lr=1.0, style="cosine", warmup_steps=9, total_steps=3).at(20) == pytest.approx(0.0)
