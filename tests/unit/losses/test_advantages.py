"""Advantages of the task-reward stream."""

from __future__ import annotations

import pytest
import torch

from slime.losses.advantages import discounted_returns, group_normalized, whitened


def test_groups_are_normalised_apart_whatever_their_order() -> None:
    rewards = torch.tensor([1.0, 10.0, 0.0, 30.0])
    groups = torch.tensor([7, 3, 7, 3])
    centered = group_normalized(rewards, groups, divide_by_std=False)
    assert centered.tolist() == [0.5, -10.0, -0.5, 10.0]
    scaled = group_normalized(rewards, groups, divide_by_std=True)
    deviations = torch.tensor([0.5**0.5, 200**0.5]).repeat(2)
    torch.testing.assert_close(scaled, centered / deviations, rtol=1e-5, atol=0)


def test_groups_that_cannot_be_compared_have_no_advantage() -> None:
    rewards = torch.tensor([1.0, 1.0, 5.0])
    advantages = group_normalized(rewards, torch.tensor([0, 0, 1]), divide_by_std=True)
    assert advantages.tolist() == [0, 0, 0]


def test_rewards_without_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="2 rewards and 3 group numbers"):
        group_normalized(torch.zeros(2), torch.zeros(3), divide_by_std=True)


def test_the_reward_falls_on_the_last_trained_token() -> None:
    mask = torch.tensor([1.0, 0.0, 1.0, 0.0])
    assert discounted_returns(2.0, mask, 0.5).tolist() == [0.5, 1.0, 2.0, 0.0]
    assert discounted_returns(2.0, mask, 1.0).tolist() == [2.0, 2.0, 2.0, 0.0]
    assert discounted_returns(2.0, torch.zeros(3), 0.5).tolist() == [0, 0, 0]


def test_whitening_looks_at_trained_tokens_alone() -> None:
    values = torch.tensor([1.0, 2.0, 3.0, 1000.0])
    mask = torch.tensor([1.0, 1.0, 1.0, 0.0])
    torch.testing.assert_close(whitened(values, mask)[:3], torch.tensor([-1.0, 0.0, 1.0]), rtol=0, atol=1e-5)


def test_equal_values_whiten_to_zero() -> None:
    assert whitened(torch.full((3,), 0.7), torch.ones(3)).abs().max() < 1e-6
    assert whitened(torch.ones(3), torch.zeros(3)).tolist() == [0, 0, 0]
