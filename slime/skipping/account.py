"""The account of skipped steps: what is known of each, how many came in a row, and what is said when they
were too many. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

MOST_SUSPECTS = 5
"""Samples that are named of one step."""


class TrainingStuckError(RuntimeError):
    """So many optimizer steps in a row were skipped that going on makes no sense."""


@dataclass(frozen=True, kw_only=True)
class Suspect:
    """A sample that may be to blame."""

    sample: int
    """Its number in the run."""
    group: int | None
    """That of its prompt's group."""
    gap: float
    """Largest distance, in nats, of the student's log-probs from the engine's or the teacher's; infinite
    where one is not finite."""
    batch_loss: float | None = None
    """The loss of its micro-batch, where that is not finite."""

    def __str__(self) -> str:
        group = "" if self.group is None else f" (group {self.group})"
        gap = f"{self.gap:.3g} nats apart" if math.isfinite(self.gap) else "a log-prob is not finite"
        return f"{self.sample}{group}: {gap}"


def worst_first(suspects: Iterable[Suspect]) -> tuple[Suspect, ...]:
    """Return the samples that stand out most, each once."""
    distinct = {suspect.sample: suspect for suspect in suspects}.values()
    ordered = sorted(distinct, key=lambda suspect: (suspect.batch_loss is None, -suspect.gap, suspect.sample))
    return tuple(ordered[:MOST_SUSPECTS])


@dataclass(frozen=True, kw_only=True)
class SkippedStep:
    """One optimizer step that was not taken. Weights, moments, schedule and weight version stayed as they
    were."""

    rollout_id: int
    number: int
    """Which of the rollout's optimizer steps."""
    version: int
    """The weight version, before and after."""
    loss: float
    grad_norm: float
    reason: str
    suspects: tuple[Suspect, ...] = ()

    def __str__(self) -> str:
        text = (
            f"rollout {self.rollout_id}, optimizer step {self.number} (weight version {self.version}): "
            f"{self.reason}; loss {self.loss:.4g}, grad_norm {self.grad_norm:.4g}"
        )
        if not self.suspects:
            return text
        where = "" if self.suspects[0].batch_loss is None else " of micro-batches whose loss is not finite"
        return f"{text}; samples{where}, worst first: {', '.join(map(str, self.suspects))}"


def joined(ranks: Sequence[Sequence[SkippedStep]]) -> list[SkippedStep]:
    """Return the skipped steps of a rollout, which are the same on every rank, with the suspects of all."""
    return [
        replace(steps[0], suspects=_worst_of_all([step.suspects for step in steps]))
        for steps in zip(*ranks, strict=True)
    ]


def _worst_of_all(ranks: Sequence[tuple[Suspect, ...]]) -> tuple[Suspect, ...]:
    """Return the worst of all ranks; where some have broken micro-batches, theirs alone."""
    everywhere = [suspect for suspects in ranks for suspect in suspects]
    broken = [suspect for suspect in everywhere if suspect.batch_loss is not None]
    return worst_first(broken or everywhere)


@dataclass
class SkipAccount:
    """Counts skipped steps in a row, over rollouts. A run that goes on from a checkpoint begins at 0."""

    limit: int
    """`--max-skipped-steps`."""
    latest: list[SkippedStep] = field(default_factory=list)
    """Those of the last rollout."""
    in_a_row: list[SkippedStep] = field(default_factory=list)
    """The skipped steps since the last one that was taken, or, if there are too many, those that were."""

    @property
    def too_many(self) -> bool:
        """Whether the run has to end."""
        return len(self.in_a_row) >= self.limit

    def enter(self, num_steps: int, skipped: Sequence[SkippedStep]) -> None:
        """Enter a rollout of `num_steps` optimizer steps, of which these were skipped."""
        self.latest = list(skipped)
        by_number = {step.number: step for step in skipped}
        for number in range(num_steps):
            if self.too_many:
                return
            if number in by_number:
                self.in_a_row.append(by_number[number])
            else:
                self.in_a_row.clear()

    def stuck(self, checkpoint: Path | None) -> TrainingStuckError:
        """Return the error that ends the run, with all that is known; `checkpoint` is the newest there is."""
        steps = "\n".join(f"  {step}" for step in self.in_a_row)
        kept = (
            f"The last checkpoint is {checkpoint}; --load goes on from there."
            if checkpoint is not None
            else "There is no checkpoint (--save and --save-interval write them)."
        )
        return TrainingStuckError(
            f"{len(self.in_a_row)} optimizer steps in a row were skipped (--max-skipped-steps {self.limit}); "
            f"the weights are those of weight version {self.in_a_row[0].version}.\n{steps}\n{kept} "
            "A lower --lr or --clip-grad, a --train-dtype of float32, or data without the samples above may "
            "help."
        )
