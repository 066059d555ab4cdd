"""What the trainer minimises: streams, each with its coefficient and denominator, a KL to the start, entropy.

An `Objective` is the `loss_fn` of one optimizer step. It joins pure losses and knows nothing of arguments,
models or ranks; every value it returns is this micro-batch's share of a sum over the global batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from slime.backends.base import ExpectingInputs, LossInputs
from slime.backends.batching import MicroBatch
from slime.losses.distillation import reverse_kl
from slime.losses.importance import truncated_weights
from slime.losses.kl import KlEstimator, reference_kl
from slime.losses.reduction import GlobalMean, token_mean_weights, weighted_sum
from slime.objective.anatomy import overlap_tokens, sampled_anatomy, top_k_anatomy
from slime.objective.ratios import ratio
from slime.objective.streams import (
    Distillation,
    Term,
    divergence_term,
    imitation_term,
    sampled_term,
    task_term,
    top_k_of,
)

LOG_2 = math.log(2)


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The streams and their weights in one global batch."""

    mean: GlobalMean
    """Over the loss tokens: of the task's stream and all that is not the teacher's."""
    eps_clip: float = 0.2
    eps_clip_high: float = 0.2
    loss_type: Literal["policy_loss", "sft_loss"] = "policy_loss"
    distillation: Distillation | None = None
    """None: no teacher's stream."""
    entropy_coef: float = 0.0
    kl_loss_coef: float = 0.0
    kl_loss_type: KlEstimator = "k3"
    tis_clip: tuple[float, float] | None = None
    """Bounds of the importance weights of sampled tokens; None: all weights are 1."""
    rollout_temperature: float = 1.0
    teacher_wrote: bool = False
    """Whether the tokens are the teacher's (`--sample-from teacher`)."""
    never_sampled: tuple[int, ...] = ()
    """Tokens outside the student's distribution."""

    def __call__(self, outputs: LossInputs, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and the metrics of one micro-batch, as shares of global sums (see `ratios`).

        `pg_loss`, `opd_kl_loss`, `sft_loss`, `kl_loss` and `entropy_loss` are the terms as they enter the
        loss, each in its own mean, and add up to it; the others are token means. With importance weights,
        all that is measured on sampled tokens estimates what on-policy sampling at temperature 1 would have
        shown, but the clipped shares, the `tis_` statistics, the gap to the engine and the signal's anatomy,
        which are about the tokens at hand.
        """
        per_token = token_mean_weights(batch.loss_mask, self.mean.num_tokens)
        self._announce(outputs, batch)
        log_probs = outputs.log_probs
        old_log_probs = log_probs.detach() if batch.old_log_probs is None else batch.old_log_probs
        metrics = {"entropy": weighted_sum(outputs.entropy.detach(), per_token)}
        metrics |= self._gap_to_engine(outputs, old_log_probs, batch, per_token)
        if self.loss_type == "sft_loss":
            terms = [self._imitated(log_probs, batch, per_token)]
        else:
            importance, about_it = self._importance(old_log_probs, batch, per_token)
            metrics |= about_it
            terms = self._reinforced(outputs, old_log_probs, batch, importance)
        for term in terms:
            metrics |= term.metrics
        return torch.stack([term.loss for term in terms]).sum(), metrics

    def _announce(self, outputs: LossInputs, batch: MicroBatch) -> None:
        """Say what `_distilled` will ask beside log-probs and entropy, where the backend can use that."""
        ids = batch.teacher_top_ids
        wanted = self.distillation is not None and self.loss_type == "policy_loss"
        if wanted and ids is not None and isinstance(outputs, ExpectingInputs):
            outputs.expect(ids, top=overlap_tokens(ids))

    def _reinforced(
        self, outputs: LossInputs, old_log_probs: Tensor, batch: MicroBatch, importance: Tensor
    ) -> list[Term]:
        """Return the task's stream, the teacher's, and the regularisers that have a weight."""
        clip = (self.eps_clip, self.eps_clip_high)
        weights = self.mean.weights(batch.loss_mask, batch.sample_rows)
        task = task_term(outputs.log_probs, old_log_probs, batch, weights * importance, clip)
        per_token = token_mean_weights(batch.loss_mask, self.mean.num_tokens) * importance
        task.metrics["policy_kl"] = weighted_sum(old_log_probs - outputs.log_probs.detach(), per_token)
        task.metrics["advantages"] = weighted_sum(batch.advantages, per_token)
        terms = [task]
        if self.distillation is not None:
            distilled = self._distilled(outputs, old_log_probs, batch, importance, self.distillation)
            if distilled.pull is not None and task.pull is not None:
                both = distilled.pull + task.pull
                distilled.metrics.update(ratio("adv/opd_share", distilled.pull, both))
            terms.append(distilled)
        if self.entropy_coef > 0:
            loss = -self.entropy_coef * weighted_sum(outputs.entropy, weights)
            terms.append(Term(loss, {"entropy_loss": loss.detach()}))
        if self.kl_loss_coef > 0:
            estimate = reference_kl(outputs.log_probs, _present(batch.reference_log_probs), self.kl_loss_type)
            loss = self.kl_loss_coef * weighted_sum(estimate, weights * importance)
            terms.append(Term(loss, {"kl_loss": loss.detach()}))
        return terms

    def _imitated(self, log_probs: Tensor, batch: MicroBatch, per_token: Tensor) -> Term:
        """Return the stream of text that the teacher wrote, and how far the student is behind on it."""
        term = imitation_term(log_probs, self.mean.weights(batch.loss_mask, batch.sample_rows))
        if batch.teacher_log_probs is not None:
            behind = batch.teacher_log_probs - log_probs.detach()
            term.metrics["sft_forward_kl"] = weighted_sum(behind, per_token)
        return term

    def _importance(
        self, old_log_probs: Tensor, batch: MicroBatch, per_token: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the importance weights of the sampled tokens [P], and what they are like."""
        if self.tis_clip is None:
            return torch.ones_like(old_log_probs), {}
        low, high = self.tis_clip
        tis = truncated_weights(old_log_probs, _present(batch.rollout_log_probs), high, low)
        return tis.weights, {
            "tis_weight_mean": weighted_sum(tis.weights, per_token),
            "tis_clipfrac": weighted_sum(tis.clipped, per_token),
        }

    def _distilled(
        self,
        outputs: LossInputs,
        old_log_probs: Tensor,
        batch: MicroBatch,
        importance: Tensor,
        distillation: Distillation,
    ) -> Term:
        """Return the teacher's stream, and what its signal looks like on all loss tokens."""
        gap = reverse_kl(old_log_probs, _present(batch.teacher_log_probs))
        with torch.set_grad_enabled(distillation.loss == "topk"):
            top = top_k_of(outputs, batch, self.never_sampled)
        mask = batch.loss_mask if batch.distill_mask is None else batch.distill_mask
        weights = distillation.mean.weights(mask, batch.sample_rows)
        if distillation.loss == "topk":
            term = divergence_term(top, weights, distillation)
        else:
            clip = (self.eps_clip, self.eps_clip_high)
            term = sampled_term(
                outputs.log_probs, old_log_probs, gap, batch, weights, importance, distillation, clip
            )
        per_token = token_mean_weights(batch.loss_mask, self.mean.num_tokens)
        term.metrics.update(ratio("opd_gate_share", mask.sum(), batch.loss_mask.sum()))
        if self.teacher_wrote:  # the mean over the teacher's tokens is that of the other direction
            term.metrics["opd_forward_kl"] = weighted_sum(-gap, per_token)
        else:
            term.metrics["opd_reverse_kl"] = weighted_sum(gap, per_token * importance)
            term.metrics.update(sampled_anatomy(gap, batch))
        if top is not None:
            term.metrics.update(top_k_anatomy(outputs, top, batch))
        return term

    def _gap_to_engine(
        self, outputs: LossInputs, old_log_probs: Tensor, batch: MicroBatch, per_token: Tensor
    ) -> dict[str, Tensor]:
        """Return how far trainer and engine are apart on the sampled tokens, at the engine's temperature.

        Beside another temperature than 1 it is known only where the policy has not moved since the tokens
        were drawn: with one optimizer step a rollout. Of a rollout that was made ahead it shows the step of
        the policy too.
        """
        if batch.rollout_log_probs is None:
            return {}
        ours = old_log_probs
        if self.rollout_temperature != 1.0:
            if batch.old_log_probs is not None:
                return {}
            ours = outputs.log_probs_at(self.rollout_temperature)
        gap = ours - batch.rollout_log_probs
        return {
            "train_rollout_logprob_abs_diff": weighted_sum(gap.abs(), per_token),
            "train_rollout_ratio_above_2": weighted_sum((gap > LOG_2).to(gap.dtype), per_token),
            "train_rollout_ratio_below_half": weighted_sum((gap < -LOG_2).to(gap.dtype), per_token),
        }


def _present(log_probs: Tensor | None) -> Tensor:
    """Return `log_probs`, which the trainer has put into every micro-batch of a step that needs them."""
    if log_probs is None:
        raise ValueError("a loss term needs log-probs that the micro-batch does not carry.")
    return log_probs
