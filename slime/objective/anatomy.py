"""What the teacher's signal looks like: where it is, and how sure both models are. Metrics only.

All are means over loss tokens, under `signal/`; a kind of token that a batch does not have gives no metric.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slime.backends.base import LossInputs
from slime.backends.batching import MicroBatch
from slime.losses.divergence import bucketed_entropy
from slime.objective.ratios import mean_over
from slime.objective.streams import TopK

OVERLAP_TOKENS = 16
"""The two top-k sets are compared up to this size."""


def sampled_anatomy(reverse_kl: Tensor, batch: MicroBatch) -> dict[str, Tensor]:
    """Return log pi_S - log pi_T of the sampled tokens [P], by the kind of token.

    `last_token_kl` is that of the token that ends a finished response: its end-of-sequence, as a rule.
    """
    mask, rows = batch.loss_mask, batch.sample_rows
    changes = rows[1:] != rows[:-1]
    edge = torch.ones(min(1, len(rows)), dtype=torch.bool, device=rows.device)
    first, last = torch.cat([edge, changes]), torch.cat([changes, edge])
    kinds = {
        "first_token": first,
        "last_token": last & batch.finished,
        "thinking": batch.thinking,
        "answer": ~batch.thinking,
        "finished": batch.finished,
        "truncated": ~batch.finished,
    }
    metrics = mean_over("signal/teacher_prefers_share", (reverse_kl < 0).to(mask.dtype), mask)
    for name, kind in kinds.items():
        metrics |= mean_over(f"signal/{name}_kl", reverse_kl, mask * kind)
    return metrics


def overlap_tokens(ids: Tensor) -> int:
    """Return how many likeliest tokens of the student are compared with a teacher's `ids` [P, K]."""
    return min(OVERLAP_TOKENS, ids.shape[1])


@torch.no_grad()
def top_k_anatomy(outputs: LossInputs, top: TopK, batch: MicroBatch) -> dict[str, Tensor]:
    """Return what the teacher's K likeliest tokens show of both models.

    Mass of the K under each, the teacher's tail, its entropy (of K + 1 buckets), and the share of the
    teacher's likeliest that are among as many likeliest of the student.
    """
    ids, mask = batch.teacher_top_ids, batch.loss_mask
    if ids is None:
        return {}
    count = overlap_tokens(ids)
    common = (ids[:, :count, None] == outputs.top_ids(count)[:, None, :]).any(dim=2)
    values = {
        "student_top_k_mass": top.log_probs.exp().sum(dim=1),
        "teacher_top_k_mass": top.teacher_log_probs.exp().sum(dim=1),
        "teacher_tail_mass": top.teacher_tail_mass,
        "teacher_entropy": bucketed_entropy(top.teacher_log_probs, top.teacher_tail_mass),
        "top_k_overlap": common.to(mask.dtype).mean(dim=1),
    }
    metrics: dict[str, Tensor] = {}
    for name, value in values.items():
        metrics |= mean_over(f"signal/{name}", value.to(mask.dtype), mask)
    return metrics
