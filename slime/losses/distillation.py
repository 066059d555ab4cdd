"""On-policy distillation as a per-token advantage.

A token sampled from the student and scored under the teacher gives `log pi_S - log pi_T`, a one-sample
estimate of the reverse KL of its position. With its negative as an advantage, the policy gradient is the
gradient of that KL.
"""

from __future__ import annotations

from torch import Tensor


def reverse_kl(log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
    """Return `log pi_S - log pi_T` of the sampled tokens: [P], [P] -> [P], detached.

    Raises:
        ValueError: student and teacher do not cover the same positions.
    """
    if log_probs.shape != teacher_log_probs.shape:
        raise ValueError(
            f"student log-probs {tuple(log_probs.shape)} and teacher log-probs "
            f"{tuple(teacher_log_probs.shape)} given; both must cover exactly the response tokens."
        )
    return log_probs.detach() - teacher_log_probs.detach()


def distillation_advantages(advantages: Tensor, reverse_kl: Tensor, coef: float) -> Tensor:
    """Return `A_t - coef * (log pi_S - log pi_T)`: [P], [P] -> [P], detached."""
    return advantages.detach() - coef * reverse_kl.detach()
