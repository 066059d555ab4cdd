"""Advantages of the task-reward stream, over a whole rollout.

They see rewards alone: the teacher's stream has its own term in the loss, and is never normalised with them.
"""

from __future__ import annotations

import torch
from torch import Tensor

_EPSILON = 1e-6


def group_normalized(rewards: Tensor, groups: Tensor, *, divide_by_std: bool) -> Tensor:
    """Return each reward less its group's mean, over the group's deviation where asked: [N], [N] -> [N].

    The standard deviation is the unbiased one; a group of one or of equal rewards has advantage 0.

    Args:
        rewards: [N], one a sample.
        groups: int64 [N], equal numbers for the samples of one prompt.
        divide_by_std: False leaves the advantage in units of the reward (Dr. GRPO).

    Raises:
        ValueError: the lengths differ.
    """
    if rewards.shape != groups.shape:
        raise ValueError(
            f"{rewards.numel()} rewards and {groups.numel()} group numbers given; one each a sample."
        )
    _, rows, counts = groups.unique(return_inverse=True, return_counts=True)
    means = rewards.new_zeros(counts.numel()).index_add(0, rows, rewards) / counts
    centered = rewards - means[rows]
    if not divide_by_std:
        return centered
    squares = rewards.new_zeros(counts.numel()).index_add(0, rows, centered.square())
    deviations = (squares / (counts - 1).clamp(min=1)).sqrt()
    return centered / (deviations[rows] + _EPSILON)


def discounted_returns(reward: float, loss_mask: Tensor, gamma: float) -> Tensor:
    """Return what each token will still earn, [R] -> [R]: the reward falls on the last trained token.

    Tokens after it earn nothing. With `gamma` 1 every token before it has the whole reward.
    """
    returns = torch.zeros_like(loss_mask)
    trained = loss_mask.nonzero()
    if trained.numel() == 0:
        return returns
    last = int(trained[-1])
    distance = torch.arange(last, -1, -1, dtype=loss_mask.dtype)
    returns[: last + 1] = reward * gamma**distance
    return returns


def whitened(values: Tensor, mask: Tensor) -> Tensor:
    """Return `values` with mean 0 and variance 1 over the tokens with mask 1: [N], [N] -> [N].

    Values that are all equal become 0, so a rollout without task reward stays without.
    """
    count = mask.sum()
    if count == 0:
        return torch.zeros_like(values)
    mean = (values * mask).sum() / count
    centered = values - mean
    variance = (centered.square() * mask).sum() / (count - 1).clamp(min=1)
    return centered / (variance.sqrt() + _EPSILON)
