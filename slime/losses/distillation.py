"""On-policy distillation as a per-token advantage.

A token sampled from the student and scored under the teacher gives `log pi_S - log pi_T`, a one-sample
estimate of the reverse KL of its position. With its negative as an advantage, the policy gradient is the
gradient of that KL, the prefixes held fixed. With the sum of all that follows as well (discount 1) it is the
gradient of the reverse KL between whole responses: then a token also answers for the prefixes that it leads
to (Lu et al., On-Policy Distillation, Thinking Machines 2025, who find 0 as good and simpler).
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


def distillation_advantages(
    reverse_kl: Tensor,
    coef: float,
    *,
    loss_mask: Tensor,
    sample_rows: Tensor,
    clip: float | None = None,
    discount: float = 0.0,
) -> Tensor:
    """Return the teacher's advantages, `-coef * (log pi_S - log pi_T)` and what follows: [P] -> [P].

    Args:
        reverse_kl: [P], of each sampled token.
        coef: weight of the teacher's stream.
        loss_mask: [P]; what follows counts only where it is not 0.
        sample_rows: int64 [P], the sample that a token belongs to; a sample's tokens lie together, in order.
        clip: each token's own term is cut to [-clip, clip] first; None leaves it. A cut signal is biased.
        discount: weight of the next token's term, its square that of the one after, and so on; 0: no future.
    """
    own = reverse_kl.detach()
    if clip is not None:
        own = own.clamp(-clip, clip)
    if discount > 0:
        own = discounted_sums(own.where(loss_mask != 0, 0), sample_rows, discount)
    return -coef * own


def discounted_sums(values: Tensor, sample_rows: Tensor, discount: float) -> Tensor:
    """Return `sum over k >= t of discount^(k - t) values_k` within each sample: [P], int64 [P] -> [P].

    In log2(P) passes over all samples at once: after pass j every sum reaches 2^j tokens ahead.
    """
    sums, reach = values, 1
    while reach < values.numel():
        ahead = sums.new_zeros(sums.shape)
        same_sample = sample_rows[reach:] == sample_rows[:-reach]
        ahead[:-reach] = sums[reach:].where(same_sample, 0)
        sums, reach = sums + discount**reach * ahead, 2 * reach
    return sums
