"""The arithmetic of learning curves: what was spent, what was reached, which learning rate is best. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import mean, stdev
from typing import Any, Literal

Cost = Literal["tokens", "seconds"]
STAGES = ("rollout", "train", "sync")
"""Stages of the loop whose `perf/<stage>_seconds` are the wall time of a run. Evaluations are left out."""


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

    def as_dict(self) -> dict[str, float]:
        """Return the point as plain data."""
        return asdict(self)


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


def stage_seconds(records: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Return the seconds of each stage over all rollouts, and of the evaluations."""
    names = [f"perf/{stage}_seconds" for stage in (*STAGES, "eval")]
    return {name: sum(record.get(name, 0.0) for record in records) for name in names}


def teacher_accuracy(records: Iterable[Mapping[str, float]]) -> float:
    """Return what the teacher reached on the held-out set."""
    return next(record["teacher_eval/accuracy"] for record in records if "teacher_eval/accuracy" in record)
