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
from slime.losses.importance import truncated_weights
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
    tis_clip: tuple[float, float] | None = None
    """Bounds of the importance weights of sampled tokens; None: all weights are 1."""
    rollout_temperature: float = 1.0

    def __call__(self, outputs: LossInputs, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and the metrics of one micro-batch, as shares of global means.

        `pg_loss`, `opd_kl_loss`, `kl_loss` and `entropy_loss` are the terms as they enter the loss, in the
        loss's own mean; the others are token means. With importance weights, all that is measured on sampled
        tokens estimates what on-policy sampling at temperature 1 would have shown, but `pg_clipfrac`, the
        `tis_` statistics and the gap to the engine, which are about the tokens at hand.
        """
        per_token = token_mean_weights(batch.loss_mask, self.num_tokens)
        weights = per_token
        if not self.mean_over_tokens:
            weights = sample_mean_weights(batch.loss_mask, batch.sample_rows, self.num_samples)
        log_probs = outputs.log_probs
        old_log_probs = log_probs.detach() if batch.old_log_probs is None else batch.old_log_probs
        metrics = self._gap_to_engine(outputs, old_log_probs, batch, per_token)
        sampled, sampled_per_token = weights, per_token
        if self.tis_clip is not None:
            low, high = self.tis_clip
            tis = truncated_weights(old_log_probs, _present(batch.rollout_log_probs), high, low)
            sampled, sampled_per_token = weights * tis.weights, per_token * tis.weights
            metrics["tis_weight_mean"] = weighted_sum(tis.weights, per_token)
            metrics["tis_clipfrac"] = weighted_sum(tis.clipped, per_token)
        advantages, teacher_gap = self._advantages(old_log_probs, batch)
        policy = clipped_policy_loss(log_probs, old_log_probs, advantages, self.eps_clip, self.eps_clip_high)
        loss = weighted_sum(policy.loss, sampled)
        metrics |= {
            "pg_loss": loss.detach(),
            "pg_clipfrac": weighted_sum(policy.clipped, per_token),
            "policy_kl": weighted_sum(old_log_probs - log_probs.detach(), sampled_per_token),
            "advantages": weighted_sum(advantages, sampled_per_token),
            "entropy": weighted_sum(outputs.entropy.detach(), per_token),
        }
        if teacher_gap is not None and self.opd_kl_coef is not None:
            entering = self.opd_kl_coef * policy.effective_ratio * teacher_gap
            metrics["opd_kl_loss"] = weighted_sum(entering, sampled)
            metrics["opd_reverse_kl"] = weighted_sum(teacher_gap, sampled_per_token)
        if self.entropy_coef > 0:
            entropy_loss = -self.entropy_coef * weighted_sum(outputs.entropy, weights)
            metrics["entropy_loss"] = entropy_loss.detach()
            loss = loss + entropy_loss
        if self.kl_loss_coef > 0:
            estimate = reference_kl(log_probs, _present(batch.reference_log_probs), self.kl_loss_type)
            kl_loss = self.kl_loss_coef * weighted_sum(estimate, sampled)
            metrics["kl_loss"] = kl_loss.detach()
            loss = loss + kl_loss
        return loss, metrics

    def _advantages(self, old_log_probs: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor | None]:
        """Return the advantages of all streams, and the gap to the teacher where there is one; both [P]."""
        if self.opd_kl_coef is None:
            return batch.advantages, None
        gap = reverse_kl(old_log_probs, _present(batch.teacher_log_probs))
        return distillation_advantages(batch.advantages, gap, self.opd_kl_coef), gap

    def _gap_to_engine(
        self, outputs: LossInputs, old_log_probs: Tensor, batch: MicroBatch, per_token: Tensor
    ) -> dict[str, Tensor]:
        """Return how far trainer and engine are apart on the sampled tokens, at the engine's temperature.

        Beside another temperature than 1 it is known only where the policy has not moved since the tokens
        were drawn: with one optimizer step a rollout.
        """
        if batch.rollout_log_probs is None:
            return {}
        ours = old_log_probs
        if self.rollout_temperature != 1.0:
            if batch.old_log_probs is not None:
                return {}
            ours = outputs.log_probs_at(self.rollout_temperature)
        gap = (ours - batch.rollout_log_probs).abs()
        return {"train_rollout_logprob_abs_diff": weighted_sum(gap, per_token)}


def _present(log_probs: Tensor | None) -> Tensor:
    """Return `log_probs`, which the trainer has put into every micro-batch of a step that needs them."""
    if log_probs is None:
        raise ValueError("a loss term needs log-probs that the micro-batch does not carry.")
    return log_probs
