"""When an optimizer step is not taken."""

from __future__ import annotations

import math

import pytest

from slime.skipping.verdict import refusal


@pytest.mark.parametrize(
    ("loss", "grad_norm", "skip_grad"), [(1.0, 2.0, 0.0), (-3.0, 0.0, 0.0), (1.0, 1e30, 0.0), (1.0, 9.0, 9.0)]
)
def test_a_sound_step_is_taken(loss: float, grad_norm: float, skip_grad: float) -> None:
    assert refusal(loss, grad_norm, skip_grad) is None


@pytest.mark.parametrize(
    ("loss", "grad_norm", "skip_grad", "reason"),
    [
        (math.nan, math.nan, 0.0, "the loss is nan"),
        (-math.inf, 1.0, 0.0, "the loss is -inf"),
        (0.5, math.nan, 0.0, "the gradient norm is nan though the loss is 0.5"),
        (0.5, math.inf, 100.0, "the gradient norm is inf though the loss is 0.5"),
        (0.5, 9.5, 9.0, "the gradient norm 9.5 is above --skip-grad 9"),
    ],
)
def test_an_unsound_step_is_refused(loss: float, grad_norm: float, skip_grad: float, reason: str) -> None:
    assert refusal(loss, grad_norm, skip_grad) == reason
