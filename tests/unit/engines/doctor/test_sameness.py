"""KL of teacher and student, and how large students are compared."""

import math

import pytest
import torch

from slime.engines.doctor.sameness import kl_estimate


def test_the_estimate_is_nothing_for_equal_models() -> None:
    assert kl_estimate([-1.0, -2.0], [-1.0, -2.0]) == 0.0


def test_rounding_stays_below_the_limit_and_other_models_above() -> None:
    teacher = [-1.0] * 50
    assert kl_estimate(teacher, [-1.0 + 0.03 * (-1) ** place for place in range(50)]) < 1e-3
    assert kl_estimate(teacher, [-1.0 + 0.3 * (-1) ** place for place in range(50)]) > 1e-3


def test_the_estimate_is_the_kl_in_expectation() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(20, generator=generator).log_softmax(-1)
    student = torch.randn(20, generator=generator).log_softmax(-1)
    exact = float((teacher.exp() * (teacher - student)).sum())
    drawn = torch.multinomial(teacher.exp(), 100_000, replacement=True, generator=generator)
    estimate = kl_estimate(teacher[drawn].tolist(), student[drawn].tolist())
    assert estimate == pytest.approx(exact, rel=0.03)


def test_a_token_that_the_teacher_thinks_impossible_does_not_overflow() -> None:
    assert math.isfinite(kl_estimate([-900.0], [0.0]))
