"""Truncated importance weights: values, bounds, statistics, errors."""

from __future__ import annotations

import math

import pytest
import torch

from slime.losses.importance import truncated_weights


def test_ratios_within_the_bounds_stay_and_others_are_cut() -> None:
    log_ratio = torch.tensor([0.0, 0.5, -3.0, 200.0, -200.0])
    log_probs = torch.full((5,), -2.0, requires_grad=True)
    weights, clipped = truncated_weights(log_probs, log_probs.detach() - log_ratio, 2.0, 0.1)
    torch.testing.assert_close(weights, torch.tensor([1.0, math.exp(0.5), 0.1, 2.0, 0.1]))
    assert clipped.tolist() == [0, 0, 1, 1, 1]
    assert not weights.requires_grad


def test_without_a_lower_bound_small_weights_stay() -> None:
    weights, clipped = truncated_weights(torch.tensor([-5.0]), torch.tensor([-1.0]), 2.0)
    assert weights.item() == pytest.approx(math.exp(-4))
    assert clipped.item() == 0


def test_no_tokens_give_no_weights() -> None:
    assert truncated_weights(torch.zeros(0), torch.zeros(0), 2.0).weights.shape == (0,)


@pytest.mark.parametrize(("high", "low"), [(1.0, 1.0), (1.0, 2.0), (1.0, -0.1)])
def test_bounds_without_room_are_refused(high: float, low: float) -> None:
    with pytest.raises(ValueError, match="--tis-clip-low < --tis-clip is needed"):
        truncated_weights(torch.zeros(1), torch.zeros(1), high, low)


def test_other_positions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"trainer log-probs \(2,\) and engine log-probs \(3,\)"):
        truncated_weights(torch.zeros(2), torch.zeros(3), 2.0)
