"""From per-token values to this micro-batch's share of a mean over the global batch.

The denominators count over all ranks and micro-batches and come from outside, so shares add up to the exact
mean however the batch was split.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class GlobalMean:
    """The mean of one stream over the tokens of the global batch that it learns from."""

    num_tokens: float
    """Tokens of the global batch that count; with 0 there is nothing to learn, and every weight is 0."""
    num_samples: float
    """Samples of the global batch with a token that counts."""
    over_tokens: bool
    """True: all tokens weigh alike; False: mean over samples of each sample's own token mean."""

    def weights(self, mask: Tensor, sample_rows: Tensor) -> Tensor:
        """Return the weight of each token, [P], int64 [P] -> [P]."""
        if self.num_tokens == 0:
            return torch.zeros_like(mask)
        if self.over_tokens:
            return token_mean_weights(mask, self.num_tokens)
        return sample_mean_weights(mask, sample_rows, self.num_samples)


def token_mean_weights(loss_mask: Tensor, num_tokens: float) -> Tensor:
    """Return the weights [P] of a mean over all `num_tokens` loss tokens of the global batch.

    Raises:
        ValueError: the denominator is not positive.
    """
    _require_positive(num_tokens, "loss tokens")
    return loss_mask / num_tokens


def sample_mean_weights(loss_mask: Tensor, sample_rows: Tensor, num_samples: float) -> Tensor:
    """Return the weights [P] of a mean over samples of each sample's own token mean.

    `sample_rows` int64 [P] numbers the sample within the micro-batch that a token belongs to; a sample lies
    whole in one micro-batch. `num_samples` counts the samples of the global batch that have a loss token.

    Raises:
        ValueError: the denominator is not positive.
    """
    _require_positive(num_samples, "samples")
    if loss_mask.numel() == 0:
        return loss_mask
    counts = loss_mask.new_zeros(int(sample_rows.max()) + 1).index_add(0, sample_rows, loss_mask)
    return loss_mask / counts.clamp(min=1)[sample_rows] / num_samples


def weighted_sum(values: Tensor, weights: Tensor) -> Tensor:
    """Return the sum of `values * weights`, [P], [P] -> scalar; a value of weight 0 is ignored, NaN too."""
    return (torch.where(weights != 0, values, 0) * weights).sum()


def _require_positive(denominator: float, what: str) -> None:
    if not denominator > 0:
        raise ValueError(f"{denominator:g} {what} in the global batch; a mean needs at least one.")
