"""Shares of global means."""

from __future__ import annotations

import pytest
import torch

from slime.losses.reduction import sample_mean_weights, token_mean_weights, weighted_sum

MASK = torch.tensor([1.0, 1.0, 0.0, 1.0])
ROWS = torch.tensor([0, 0, 1, 1])
VALUES = torch.tensor([1.0, 3.0, 100.0, 5.0])


def test_the_token_mean_weighs_tokens_alike() -> None:
    assert weighted_sum(VALUES, token_mean_weights(MASK, 3)).item() == pytest.approx(3.0)


def test_the_sample_mean_weighs_samples_alike() -> None:
    assert weighted_sum(VALUES, sample_mean_weights(MASK, ROWS, 2)).item() == pytest.approx((2 + 5) / 2)


@pytest.mark.parametrize("name", ["token", "sample"])
def test_shares_of_micro_batches_add_up(name: str) -> None:
    def share(part: slice) -> float:
        mask, rows = MASK[part], ROWS[part] - ROWS[part][0]
        weights = token_mean_weights(mask, 3) if name == "token" else sample_mean_weights(mask, rows, 2)
        return weighted_sum(VALUES[part], weights).item()

    assert share(slice(0, 2)) + share(slice(2, 4)) == pytest.approx(share(slice(0, 4)))


def test_what_is_masked_cannot_spoil_the_mean_or_its_gradient() -> None:
    values = torch.tensor([1.0, float("nan"), float("inf")], requires_grad=True)
    total = weighted_sum(values, torch.tensor([0.5, 0.0, 0.0]))
    total.backward()
    assert total.item() == 0.5
    assert values.grad is not None
    assert values.grad.tolist() == [0.5, 0, 0]


def test_no_tokens_here_is_a_share_of_zero() -> None:
    empty = torch.zeros(0)
    assert weighted_sum(empty, token_mean_weights(empty, 3)).item() == 0
    assert weighted_sum(empty, sample_mean_weights(empty, torch.zeros(0, dtype=torch.int64), 3)).item() == 0


def test_a_sample_without_loss_tokens_weighs_nothing() -> None:
    weights = sample_mean_weights(torch.tensor([0.0, 1.0]), torch.tensor([0, 1]), 1)
    assert weights.tolist() == [0.0, 1.0]


def test_an_empty_global_batch_has_no_mean() -> None:
    with pytest.raises(ValueError, match="0 loss tokens in the global batch"):
        token_mean_weights(MASK, 0)
    with pytest.raises(ValueError, match="0 samples in the global batch"):
        sample_mean_weights(MASK, ROWS, 0)
