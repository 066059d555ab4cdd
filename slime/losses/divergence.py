"""Divergences between student and teacher from the teacher's K likeliest tokens, the rest in one bucket.

At each position both distributions are read as K + 1 buckets: the K tokens that the teacher finds likeliest,
and a tail bucket with all the mass of the others. A divergence between bucketed distributions is one between
distributions: never negative, 0 only where the buckets agree, and by the log-sum inequality never above the
divergence between the whole ones. With K at the vocabulary's size nothing is left for the tail, and the
divergence is the exact one. (Leaving the tail out instead gives a sum that may be negative, and whose
gradient pushes the student's mass out of the top-k.)

Shape letters: P response tokens, K teacher top-k.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Divergence = Literal["reverse_kl", "forward_kl", "jsd"]
NEVER = -1e5
"""Log-prob of what cannot happen: its probability is 0, and finite, so that 0 times it is."""


def bucketed_divergence(
    log_probs: Tensor,
    teacher_log_probs: Tensor,
    teacher_tail_mass: Tensor,
    divergence: Divergence,
    *,
    jsd_beta: float = 0.5,
) -> Tensor:
    """Return the divergence of each position in nats [P]; the gradient flows to `log_probs` alone.

    With student buckets p and teacher buckets q: reverse_kl is KL(p || q), forward_kl is KL(q || p), jsd is
    beta KL(q || m) + (1 - beta) KL(p || m) with m = beta q + (1 - beta) p (Agarwal et al., GKD,
    arXiv 2306.13649).

    Args:
        log_probs: [P, K], the student's, of the teacher's top-k tokens.
        teacher_log_probs: [P, K].
        teacher_tail_mass: [P], the teacher's probability of all other tokens. Both tails are told apart from
            0 down to the resolution of the arithmetic.
        divergence: which one.
        jsd_beta: the teacher's share in the mixture, between 0 and 1.

    Raises:
        ValueError: the shapes do not fit, or beta leaves no mixture.
    """
    if log_probs.shape != teacher_log_probs.shape or teacher_tail_mass.shape != log_probs.shape[:1]:
        raise ValueError(
            f"student log-probs {tuple(log_probs.shape)}, teacher log-probs {tuple(teacher_log_probs.shape)} "
            f"and tail mass {tuple(teacher_tail_mass.shape)} given; [P, K], [P, K] and [P] are needed."
        )
    student = _with_tail(log_probs, 1 - log_probs.exp().sum(dim=1))
    teacher = _with_tail(teacher_log_probs, teacher_tail_mass).detach()
    match divergence:
        case "reverse_kl":
            return _kl(student, teacher)
        case "forward_kl":
            return _kl(teacher, student)
        case "jsd":
            if not 0 < jsd_beta < 1:
                raise ValueError(f"--opd-jsd-beta {jsd_beta:g} given; it must lie between 0 and 1.")
            mixture = torch.logaddexp(student + math.log1p(-jsd_beta), teacher + math.log(jsd_beta))
            return jsd_beta * _kl(teacher, mixture) + (1 - jsd_beta) * _kl(student, mixture)
    raise ValueError(f"--opd-divergence {divergence} given; one of reverse_kl, forward_kl, jsd is needed.")


def without_never_sampled(
    log_probs: Tensor, tail_mass: Tensor, never_sampled: Tensor
) -> tuple[Tensor, Tensor]:
    """Return a teacher's top-k [P, K] and tail mass [P] given that no token of `never_sampled` is drawn.

    The student has no such token in its distribution; a teacher that gives one a little mass is asked what
    it prefers among the others. `never_sampled` bool [P, K] says which of the top-k they are.
    """
    left = (1 - log_probs.exp().where(never_sampled, 0).sum(dim=1)).clamp(min=_resolution(log_probs))
    return (log_probs - left.log()[:, None]).where(~never_sampled, NEVER), tail_mass / left


def bucketed_entropy(log_probs: Tensor, tail_mass: Tensor) -> Tensor:
    """Return the entropy of the K + 1 buckets in nats, [P, K], [P] -> [P]: at most that of all tokens."""
    buckets = _with_tail(log_probs, tail_mass)
    return -(buckets.exp() * buckets).sum(dim=1)


def _with_tail(log_probs: Tensor, tail_mass: Tensor) -> Tensor:
    """Return the log-probs of all buckets [P, K + 1]. Of a difference of numbers near 1 no more is known than
    that it is not above the arithmetic's resolution."""
    tail = tail_mass.to(log_probs.dtype).clamp(min=_resolution(log_probs)).log()
    return torch.cat([log_probs, tail[:, None]], dim=1)


def _resolution(log_probs: Tensor) -> float:
    return torch.finfo(log_probs.dtype).eps


def _kl(first: Tensor, second: Tensor) -> Tensor:
    return (first.exp() * (first - second)).sum(dim=1)
