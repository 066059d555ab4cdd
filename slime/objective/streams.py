"""The streams that a student learns from: the task's reward, the teacher's signal, the teacher's own text.

Each is a function of one micro-batch that returns its part of the loss, coefficient and denominator included;
none knows of the others. Shape letters: P response tokens, K teacher top-k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from slime.backends.base import LossInputs
from slime.backends.batching import MicroBatch
from slime.losses.distillation import distillation_advantages
from slime.losses.divergence import Divergence, bucketed_divergence, without_never_sampled
from slime.losses.influence import logit_pull
from slime.losses.policy import PolicyLoss, clipped_policy_loss
from slime.losses.reduction import GlobalMean, weighted_sum


class Term(NamedTuple):
    """One stream's part in one micro-batch."""

    loss: Tensor
    """Scalar, a share of a mean over the global batch."""
    metrics: dict[str, Tensor]
    pull: Tensor = torch.zeros(())
    """Scalar, detached: the 1-norm of a stream's gradient on the logits, summed over positions."""


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """How the teacher's stream is made."""

    coef: float
    mean: GlobalMean
    """Over the tokens that are distilled: those of the gate."""
    loss: Literal["sampled", "topk"] = "sampled"
    divergence: Divergence = "reverse_kl"
    jsd_beta: float = 0.5
    kl_clip: float | None = None
    kl_discount: float = 0.0


class TopK(NamedTuple):
    """Both models' log-probs of the teacher's likeliest tokens."""

    log_probs: Tensor
    """[P, K], the student's; differentiable."""
    teacher_log_probs: Tensor
    """[P, K], given that no token is drawn that is never sampled."""
    teacher_tail_mass: Tensor
    """[P], of all other tokens."""


def top_k_of(outputs: LossInputs, batch: MicroBatch, never_sampled: Sequence[int]) -> TopK | None:
    """Return what both models say of the teacher's top-k; None where the rollout did not ask for it."""
    ids, teacher, tail = batch.teacher_top_ids, batch.teacher_top_log_probs, batch.teacher_tail_mass
    if ids is None or teacher is None or tail is None:
        return None
    never = torch.isin(ids, torch.tensor(never_sampled, dtype=ids.dtype, device=ids.device))
    return TopK(outputs.gather(ids), *without_never_sampled(teacher, tail, never))


def task_term(
    log_probs: Tensor, old_log_probs: Tensor, batch: MicroBatch, weights: Tensor, clip: tuple[float, float]
) -> Term:
    """Return the task's stream: its advantages in the clipped policy loss."""
    policy = clipped_policy_loss(log_probs, old_log_probs, batch.advantages, *clip)
    return _policy_term(policy, log_probs, weights, "pg_loss", "pg_clipfrac")


def sampled_term(
    log_probs: Tensor,
    old_log_probs: Tensor,
    reverse_kl: Tensor,
    batch: MicroBatch,
    weights: Tensor,
    distillation: Distillation,
    clip: tuple[float, float],
) -> Term:
    """Return the teacher's stream as advantages of the sampled tokens."""
    advantages = distillation_advantages(
        reverse_kl,
        distillation.coef,
        loss_mask=batch.loss_mask,
        sample_rows=batch.sample_rows,
        clip=distillation.kl_clip,
        discount=distillation.kl_discount,
    )
    policy = clipped_policy_loss(log_probs, old_log_probs, advantages, *clip)
    return _policy_term(policy, log_probs, weights, "opd_kl_loss", "opd_clipfrac")


def divergence_term(top: TopK | None, weights: Tensor, distillation: Distillation) -> Term:
    """Return the teacher's stream as a divergence over the buckets of its top-k.

    It is a full expectation at every prefix: no importance weight, no ratio and no clipping enters.
    """
    if top is None:
        raise ValueError("--opd-loss topk needs the teacher's top-k, and the micro-batch carries none.")
    values = bucketed_divergence(
        top.log_probs,
        top.teacher_log_probs,
        top.teacher_tail_mass,
        distillation.divergence,
        jsd_beta=distillation.jsd_beta,
    )
    loss = distillation.coef * weighted_sum(values, weights)
    (gradient,) = torch.autograd.grad(loss, top.log_probs, retain_graph=True)
    return Term(loss, {"opd_kl_loss": loss.detach()}, logit_pull(gradient, top.log_probs).sum())


def imitation_term(log_probs: Tensor, weights: Tensor) -> Term:
    """Return supervised fine-tuning on the sampled tokens: their negative log-likelihood."""
    loss = -weighted_sum(log_probs, weights)
    return Term(loss, {"sft_loss": loss.detach()})


def _policy_term(
    policy: PolicyLoss, log_probs: Tensor, weights: Tensor, loss_name: str, clipped_name: str
) -> Term:
    loss = weighted_sum(policy.loss, weights)
    (gradient,) = torch.autograd.grad(loss, log_probs, retain_graph=True)
    metrics = {loss_name: loss.detach(), clipped_name: weighted_sum(policy.clipped, weights)}
    return Term(loss, metrics, logit_pull(gradient[:, None], log_probs[:, None]).sum())
