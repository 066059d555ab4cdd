"""The arithmetic of learning curves: what was spent, what was reached, which learning rate is best. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import stdev
from typing import Literal

Cost = Literal["tokens", "teacher_tokens", "seconds"]
STAGES = ("rollout", "train", "sync")
"""Stages of the loop whose `perf/<stage>_seconds` are the wall time of a run. Evaluations are left out."""
HOPELESS_EVALUATIONS, HOPELESS_SHARE = 10, 0.1


@dataclass(frozen=True, kw_only=True)
class Point:
    """An evaluation, and what had been spent before it."""

    rollouts: int
    tokens: float
    """Response tokens trained on, whoever sampled them."""
    teacher_tokens: float
    """Response tokens that the teacher sampled."""
    seconds: float
    accuracy: float


def curve_of(records: Iterable[Mapping[str, float]], *, teacher_samples: bool) -> list[Point]:
    """Return a point for each evaluation among a tracker's records, which are in the order of the run."""
    points: list[Point] = []
    rollouts, tokens, teacher_tokens, seconds = 0, 0.0, 0.0, 0.0
    for record in records:
        if "eval/accuracy" in record:
            points.append(
                Point(
                    rollouts=rollouts,
                    tokens=tokens,
                    teacher_tokens=teacher_tokens,
                    seconds=seconds,
                    accuracy=record["eval/accuracy"],
                )
            )
        elif "response_tokens" in record:
            rollouts += 1
            tokens += record["tokens"]
            teacher_tokens += record["response_tokens"] if teacher_samples else 0.0
            seconds += sum(record[f"perf/{stage}_seconds"] for stage in STAGES)
    return points


def stage_seconds(records: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the seconds of each stage over all rollouts, and of the evaluations."""
    names = [f"perf/{stage}_seconds" for stage in (*STAGES, "eval")]
    return {name: sum(record.get(name, 0.0) for record in records) for name in names}


def first_value(records: Iterable[Mapping[str, float]], name: str) -> float:
    """Return the first value of a metric."""
    return next(record[name] for record in records if name in record)


def is_closed(accuracies: Sequence[float], teacher: float, share: float | None) -> bool:
    """Tell whether the last two evaluations have both closed this share of the gap that the first one found;
    never for None."""
    if share is None or len(accuracies) < 3:
        return False
    return min(accuracies[-2:]) >= accuracies[0] + share * (teacher - accuracies[0])


def is_hopeless(accuracies: Sequence[float], teacher: float) -> bool:
    """Tell whether ten evaluations after the first have not closed a tenth of the gap."""
    if len(accuracies) <= HOPELESS_EVALUATIONS:
        return False
    return max(accuracies) < accuracies[0] + HOPELESS_SHARE * (teacher - accuracies[0])


def reached(points: Sequence[Point], level: float, cost: Cost) -> float | None:
    """Return what it cost to reach an accuracy: up to the first evaluation at or above it, interpolated
    linearly from the evaluation before; None where no evaluation is."""
    before: Point | None = None
    for point in points:
        if point.accuracy >= level:
            spent: float = getattr(point, cost)
            if before is None:
                return spent
            share = (level - before.accuracy) / (point.accuracy - before.accuracy)
            start: float = getattr(before, cost)
            return start + share * (spent - start)
        before = point
    return None


def mean_accuracy(points: Sequence[Point], budget: float) -> float:
    """Return the mean height of the curve over 0 to `budget` tokens.

    A run that ended before holds its last accuracy to the end of the budget.
    """
    inside = [(point.tokens, point.accuracy) for point in points if point.tokens <= budget]
    inside.append((budget, accuracy_at(points, budget)))
    area = sum((right - left) * (low + high) / 2 for (left, low), (right, high) in pairwise(inside))
    return area / budget


def accuracy_at(points: Sequence[Point], tokens: float) -> float:
    """Return the accuracy after so many tokens, on straight lines between evaluations, the last one held."""
    for left, right in pairwise(points):
        if tokens < right.tokens:
            share = (tokens - left.tokens) / (right.tokens - left.tokens)
            return left.accuracy + share * (right.accuracy - left.accuracy)
    return points[-1].accuracy


def standard_error(values: Sequence[float]) -> float | None:
    """Return the standard error of the mean; None of fewer than two values."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def binomial_error(accuracy: float, rows: int) -> float:
    """Return the standard error of an accuracy that was measured on so many rows."""
    return math.sqrt(accuracy * (1 - accuracy) / rows)
