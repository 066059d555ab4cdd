"""Estimators of the KL from the student to a frozen reference, on the sampled tokens."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

KlEstimator = Literal["k1", "k2", "k3", "low_var_kl"]


def reference_kl(log_probs: Tensor, reference_log_probs: Tensor, estimator: KlEstimator) -> Tensor:
    """Return the per-token estimate [P]; the gradient flows to `log_probs` alone.

    With d = log pi - log pi_ref: k1 is d (unbiased in value; as a loss its expected gradient is zero), k2 is
    d²/2 (its expected gradient is that of the KL), k3 or low_var_kl is exp(-d) - 1 + d (unbiased in value,
    never negative).

    Raises:
        ValueError: the estimator is unknown.
    """
    difference = log_probs - reference_log_probs.detach()
    match estimator:
        case "k1":
            return difference
        case "k2":
            return difference.square() / 2
        case "k3" | "low_var_kl":
            return (-difference).exp() - 1 + difference
    raise ValueError(f"--kl-loss-type {estimator} given; one of k1, k2, k3, low_var_kl is needed.")
