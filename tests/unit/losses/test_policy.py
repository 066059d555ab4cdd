"""The clipped policy loss and the KL estimators."""

from __future__ import annotations

import math

import pytest
import torch

from slime.losses.distillation import distillation_advantages, reverse_kl
from slime.losses.kl import KlEstimator, reference_kl
from slime.losses.policy import clipped_policy_loss


def test_on_policy_the_gradient_is_minus_the_advantage() -> None:
    log_probs = torch.tensor([-1.0, -2.0], requires_grad=True)
    advantages = torch.tensor([3.0, -4.0], requires_grad=True)
    policy = clipped_policy_loss(log_probs, log_probs.detach(), advantages, 0.2, 0.3)
    policy.loss.sum().backward()
    assert log_probs.grad is not None
    assert log_probs.grad.tolist() == [-3.0, 4.0]
    assert advantages.grad is None
    assert policy.clipped.tolist() == [0, 0]
    assert policy.effective_ratio.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("ratio", "advantage", "effective", "clipped"),
    [
        (1.5, 2.0, 1.4, True),  # a good token has become likely enough
        (1.5, -2.0, 1.5, False),  # a bad one has become likelier: it must come back
        (0.5, 2.0, 0.5, False),
        (0.5, -2.0, 0.8, True),
        (1.3, 2.0, 1.3, False),  # inside the higher clip
        (1.5, 0.0, 1.5, False),
    ],
)
def test_clipping_only_stops_what_has_gone_far_enough(
    ratio: float, advantage: float, effective: float, clipped: bool
) -> None:
    log_probs = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    policy = clipped_policy_loss(log_probs, torch.zeros(1), torch.tensor([advantage]), 0.2, 0.4)
    assert policy.loss.item() == pytest.approx(-effective * advantage)
    assert policy.effective_ratio.item() == pytest.approx(effective)
    assert policy.clipped.item() == clipped
    policy.loss.sum().backward()
    assert log_probs.grad is not None
    assert log_probs.grad.item() == pytest.approx(0 if clipped else -ratio * advantage)


def test_distillation_sends_no_gradient_through_the_advantage() -> None:
    log_probs = torch.tensor([-1.0], requires_grad=True)
    gap = reverse_kl(log_probs, torch.tensor([-3.0]))
    assert gap.tolist() == [2.0]
    assert not gap.requires_grad
    mask, rows = torch.ones(1), torch.zeros(1, dtype=torch.int64)
    assert distillation_advantages(gap, 0.5, loss_mask=mask, sample_rows=rows).tolist() == [-1.0]


def test_distillation_names_both_lengths() -> None:
    with pytest.raises(ValueError, match=r"\(3,\) and teacher log-probs \(2,\)"):
        reverse_kl(torch.zeros(3), torch.zeros(2))


@pytest.mark.parametrize(
    ("estimator", "value", "gradient"),
    [
        ("k1", 0.5, 1.0),
        ("k2", 0.125, 0.5),
        ("k3", math.exp(-0.5) - 0.5, 1 - math.exp(-0.5)),
        ("low_var_kl", math.exp(-0.5) - 0.5, 1 - math.exp(-0.5)),
    ],
)
def test_kl_estimators(estimator: KlEstimator, value: float, gradient: float) -> None:
    log_probs = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-1.5], dtype=torch.float64, requires_grad=True)
    estimate = reference_kl(log_probs, reference, estimator)
    assert estimate.item() == pytest.approx(value)
    estimate.sum().backward()
    assert log_probs.grad is not None
    assert log_probs.grad.item() == pytest.approx(gradient)
    assert reference.grad is None


def test_k1_and_k3_are_unbiased_and_k2_has_the_right_gradient() -> None:
    """Over a whole vocabulary, weighted by the student's probabilities."""
    logits = torch.randn(9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    reference = torch.randn(9, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).log_softmax(0)
    log_probs = logits.log_softmax(0)
    probs = log_probs.detach().exp()
    exact = (log_probs.exp() * (log_probs - reference)).sum()
    for estimator in ("k1", "k3"):
        torch.testing.assert_close((probs * reference_kl(log_probs, reference, estimator)).sum(), exact)
    (expected,) = torch.autograd.grad(exact, logits, retain_graph=True)
    (ours,) = torch.autograd.grad((probs * reference_kl(log_probs, reference, "k2")).sum(), logits)
    torch.testing.assert_close(ours, expected)


def test_an_unknown_estimator_is_named() -> None:
    with pytest.raises(ValueError, match="--kl-loss-type k4"):
        reference_kl(torch.zeros(1), torch.zeros(1), "k4")  # type: ignore[arg-type]
