"""Which samples of a step look bad: noted as the losses are computed, read only where a step is skipped."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from slime.backends.base import LossFn, LossInputs
from slime.backends.batching import MicroBatch
from slime.skipping.account import Suspect, worst_first


@dataclass(frozen=True)
class _Seen:
    """What is kept of one micro-batch; tensors stay where they were computed until they are asked for."""

    samples: tuple[int, ...]
    loss: Tensor
    """Scalar."""
    gaps: Tensor
    """[samples]"""


class Watch:
    """One rank's loss function of one optimizer step; it notes what tells a bad sample from the others."""

    def __init__(self, loss_fn: LossFn, groups: Mapping[int, int | None]) -> None:
        """`groups` says which prompt's group each sample belongs to, by its index."""
        self._loss_fn = loss_fn
        self._groups = groups
        self._seen: list[_Seen] = []

    def __call__(self, outputs: LossInputs, batch: MicroBatch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return what the loss function returns."""
        loss, sums = self._loss_fn(outputs, batch)
        gaps = largest_gaps(outputs.log_probs.detach(), batch)
        self._seen.append(_Seen(batch.sample_indices, loss.detach(), gaps))
        return loss, sums

    def suspects(self) -> tuple[Suspect, ...]:
        """Return this rank's samples that stand out most, worst first.

        Where a micro-batch has a loss that is not finite, only samples of such count.
        """
        broken = [seen for seen in self._seen if not seen.loss.isfinite()]
        return worst_first(self._of(broken or self._seen))

    def _of(self, batches: Iterable[_Seen]) -> Iterable[Suspect]:
        for seen in batches:
            loss = seen.loss.item()
            for sample, gap in zip(seen.samples, seen.gaps.tolist(), strict=True):
                yield Suspect(
                    sample=sample,
                    group=self._groups.get(sample),
                    gap=gap,
                    batch_loss=loss if not math.isfinite(loss) else None,
                )


def largest_gaps(log_probs: Tensor, batch: MicroBatch) -> Tensor:
    """Return by how much the student's log-probs [P] differ from the engine's or the teacher's, at the worst
    loss token of each sample, [samples]; infinite where one is not finite.

    Without others to hold them against it is the least likely token's.
    """
    others = [other for other in (batch.rollout_log_probs, batch.teacher_log_probs) if other is not None]
    differences = [(log_probs - other).abs() for other in others] or [log_probs.abs()]
    gaps = torch.stack(differences).nan_to_num(nan=math.inf, posinf=math.inf).amax(dim=0)
    gaps = gaps.where(batch.loss_mask != 0, 0)
    worst = gaps.new_zeros(len(batch.sample_indices))
    return worst.scatter_reduce(0, batch.sample_rows, gaps, "amax")
