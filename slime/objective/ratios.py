"""Metrics that are a quotient of two sums: the mean over tokens of a kind, the share of one part in two.

A backend only adds up. So both sums travel under names of their own, and the quotient is taken at the end;
where the lower one is 0 there was nothing to average, and the metric is left out.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

_UPPER, _LOWER = ":upper", ":lower"


def ratio(name: str, upper: Tensor, lower: Tensor) -> dict[str, Tensor]:
    """Return this micro-batch's part of the metric `name`, two detached scalars."""
    return {name + _UPPER: upper.detach(), name + _LOWER: lower.detach()}


def mean_over(name: str, values: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Return this micro-batch's part of the mean of `values` [P] over the tokens with `mask` [P] not 0."""
    return ratio(name, (values.where(mask != 0, 0) * mask).sum(), mask.sum())


def finished(sums: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics of whole sums, quotients taken."""
    metrics = {name: value for name, value in sums.items() if not name.endswith((_UPPER, _LOWER))}
    for name in sums:
        if name.endswith(_UPPER):
            metric = name.removesuffix(_UPPER)
            if sums[metric + _LOWER] != 0:
                metrics[metric] = sums[name] / sums[metric + _LOWER]
    return metrics
