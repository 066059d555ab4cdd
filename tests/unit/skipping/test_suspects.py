"""What is noted of the samples of a step while their losses are computed."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from slime.backends.batching import MicroBatch
from slime.skipping.suspects import Watch, largest_gaps


def batch(*samples: int, teacher: list[float] | None = None, mask: list[float] | None = None) -> MicroBatch:
    """Two response tokens a sample; the engine says 0 of all of them."""
    rows = torch.arange(len(samples)).repeat_interleave(2)
    fields: dict[str, Any] = {
        "sample_indices": samples,
        "sample_rows": rows,
        "loss_mask": torch.ones(len(rows)) if mask is None else torch.tensor(mask),
        "rollout_log_probs": torch.zeros(len(rows)),
        "teacher_log_probs": None if teacher is None else torch.tensor(teacher),
    }
    return cast(MicroBatch, SimpleNamespace(**fields))


def test_the_worst_token_of_each_sample_counts_against_engine_and_teacher() -> None:
    log_probs = torch.tensor([-0.5, -1.0, -2.0, -0.25])
    assert largest_gaps(log_probs, batch(4, 5)).tolist() == [1.0, 2.0]
    against_both = largest_gaps(log_probs, batch(4, 5, teacher=[-9.5, -1.0, -2.0, -0.25]))
    assert against_both.tolist() == [9.0, 2.0]
    assert largest_gaps(log_probs, batch(4, 5, mask=[1, 1, 0, 1])).tolist() == [1.0, 0.25]
    assert largest_gaps(torch.zeros(0), batch()).tolist() == []


def test_a_log_prob_that_is_not_finite_is_the_worst_gap() -> None:
    log_probs = torch.tensor([-0.5, math.nan, -math.inf, -0.25, -7.0, -1.0])
    assert largest_gaps(log_probs, batch(1, 2, 3)).tolist() == [math.inf, math.inf, 7.0]


def test_alone_the_least_likely_token_counts() -> None:
    alone = cast(Any, batch(1, 2))
    alone.rollout_log_probs = None
    assert largest_gaps(torch.tensor([-0.5, -3.0, -1.0, 0.0]), alone).tolist() == [3.0, 1.0]


def watched(losses: dict[int, float], gaps: dict[int, float]) -> Watch:
    """Watch a step of one micro-batch a sample."""

    def loss_fn(outputs: Any, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        return torch.tensor(losses[batch.sample_indices[0]]), {"sum": torch.ones(())}

    watch = Watch(loss_fn, {sample: sample // 2 for sample in losses})
    for sample, loss in losses.items():
        outputs = cast(Any, SimpleNamespace(log_probs=torch.tensor([-gaps[sample], 0.0])))
        kept, sums = watch(outputs, batch(sample))
        torch.testing.assert_close(kept, torch.tensor(loss), equal_nan=True)
        assert sums == {"sum": torch.ones(())}
    return watch


def test_samples_of_a_broken_micro_batch_come_alone_and_others_by_their_gaps() -> None:
    gaps = {3: 1.0, 4: 8.0, 5: 2.0}
    found = watched({3: 1.0, 4: 2.0, 5: 0.5}, gaps).suspects()
    assert [(each.sample, each.group, each.gap) for each in found] == [(4, 2, 8.0), (5, 2, 2.0), (3, 1, 1.0)]
    (found,) = watched({3: math.nan, 4: 2.0, 5: 0.5}, gaps).suspects()
    assert (found.sample, found.group, found.gap) == (3, 1, 1.0)
    assert found.batch_loss is not None
    assert math.isnan(found.batch_loss)
