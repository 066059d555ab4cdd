"""What the trainer minimises: the clipped policy loss with the distillation term, a KL to the start, entropy.

An `Objective` is the `loss_fn` of one optimizer step. It joins pure losses and knows nothing of arguments,
models or ranks; every value it returns is this micro-batch's share of a mean over the global batch.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from slime.backends.base import LossInputs
from slime.backends.batching import MicroBatch
from slime.losses.distillation import distillation_advantages, reverse_kl
from slime.losses.kl import KlEstimator, reference_kl
from slime.losses.policy import clipped_policy_loss
from slime.losses.reduction import sample_mean_weights, token_mean_weights, weighted_sum


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Weights of the loss components and the denominators of one global batch."""

    num_tokens: float
    """Loss tokens of the global batch."""
    num_samples: float
    """Samples of the global batch with a loss token."""
    mean_over_tokens: bool
    """True: token mean; False: mean over samples of each sample's mean."""
    eps_clip: float
    eps_clip_high: float
    opd_kl_coef: float | None = None
    """None: no teacher."""
    entropy_coef: float = 0.0
    kl_loss_coef: float = 0.0
    kl_loss_type: KlEstimator = "k3"

    def __call__(self, outputs: LossInputs, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and the metrics of one micro-batch, as shares of global means.

        `pg_loss`, `opd_kl_loss`, `kl_loss` and `entropy_loss` are the terms as they enter the loss, in the
        loss's own mean; the others are token means.
        """
        per_token = token_mean_weights(batch.loss_mask, self.num_tokens)
        weights = per_token
        if not self.mean_over_tokens:
            weights = sample_mean_weights(batch.loss_mask, batch.sample_rows, self.num_samples)
        log_probs = outputs.log_probs
        old_log_probs = log_probs.detach() if batch.old_log_probs is None else batch.old_log_probs
        loss, metrics = self._policy_term(log_probs, old_log_probs, batch, weights, per_token)
        metrics["entropy"] = weighted_sum(outputs.entropy.detach(), per_token)
        if self.entropy_coef > 0:
            entropy_loss = -self.entropy_coef * weighted_sum(outputs.entropy, weights)
            metrics["entropy_loss"] = entropy_loss.detach()
            loss = loss + entropy_loss
        if self.kl_loss_coef > 0:
            estimate = reference_kl(log_probs, _present(batch.reference_log_probs), self.kl_loss_type)
            kl_loss = self.kl_loss_coef * weighted_sum(estimate, weights)
            metrics["kl_loss"] = kl_loss.detach()
            loss = loss + kl_loss
        if batch.rollout_log_probs is not None:
            gap = (old_log_probs - batch.rollout_log_probs).abs()
            metrics["train_rollout_logprob_abs_diff"] = weighted_sum(gap, per_token)
        return loss, metrics

    def _policy_term(
        self, log_probs: Tensor, old_log_probs: Tensor, batch: MicroBatch, weights: Tensor, per_token: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the clipped policy loss, the distillation term inside it, with their metrics."""
        advantages, teacher_gap = batch.advantages, None
        if self.opd_kl_coef is not None:
            teacher_gap = reverse_kl(old_log_probs, _present(batch.teacher_log_probs))
            advantages = distillation_advantages(advantages, teacher_gap, self.opd_kl_coef)
        policy = clipped_policy_loss(log_probs, old_log_probs, advantages, self.eps_clip, self.eps_clip_high)
        loss = weighted_sum(policy.loss, weights)
        metrics = {
            "pg_loss": loss.detach(),
            "pg_clipfrac": weighted_sum(policy.clipped, per_token),
            "policy_kl": weighted_sum(old_log_probs - log_probs.detach(), per_token),
            "advantages": weighted_sum(advantages, per_token),
        }
        if teacher_gap is not None and self.opd_kl_coef is not None:
            entering = self.opd_kl_coef * policy.effective_ratio * teacher_gap
            metrics["opd_kl_loss"] = weighted_sum(entering, weights)
            metrics["opd_reverse_kl"] = weighted_sum(teacher_gap, per_token)
        return loss, metrics


def _present(log_probs: Tensor | None) -> Tensor:
    """Return `log_probs`, which the trainer has put into every micro-batch of a step that needs them."""
    if log_probs is None:
        raise ValueError("a loss term needs log-probs that the micro-batch does not carry.")
    return log_probs
