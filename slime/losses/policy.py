"""The clipped policy-gradient loss per token."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class PolicyLoss(NamedTuple):
    """Per-token parts of the clipped loss, all [P]."""

    loss: Tensor
    """Differentiable; `-effective_ratio * advantage` in value."""
    effective_ratio: Tensor
    """Detached: the ratio that entered the loss, clipped where clipping won."""
    clipped: Tensor
    """Detached, 1.0 where clipping won, and with it no gradient flows."""


def clipped_policy_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, eps_low: float, eps_high: float
) -> PolicyLoss:
    """Return `max(-r A, -clip(r, 1 - eps_low, 1 + eps_high) A)` with `r = pi / pi_old`; inputs are [P].

    With `old_log_probs = log_probs.detach()` the ratio is 1 and its gradient is the plain policy gradient. No
    gradient flows to `old_log_probs` or `advantages`.
    """
    advantages = advantages.detach()
    ratio = (log_probs - old_log_probs.detach()).exp()
    bounded = ratio.clamp(1 - eps_low, 1 + eps_high)
    free_loss, bounded_loss = -ratio * advantages, -bounded * advantages
    clipped = bounded_loss.detach() > free_loss.detach()
    return PolicyLoss(
        loss=torch.maximum(free_loss, bounded_loss),
        effective_ratio=torch.where(clipped, bounded, ratio).detach(),
        clipped=clipped.to(log_probs.dtype),
    )
