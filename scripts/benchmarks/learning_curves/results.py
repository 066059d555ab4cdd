"""What a finished run leaves in the output folder, and how it is found again."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from scripts.benchmarks.learning_curves.curves import Point, mean_accuracy
from scripts.benchmarks.learning_curves.methods import GRID_SEED, Run

RESULT_FILE = "result.json"


@dataclass(frozen=True, kw_only=True)
class Result:
    """One finished run."""

    run: Run
    teacher: float
    """The teacher's accuracy on the test split."""
    test_rows: int
    points: tuple[Point, ...]
    """All evaluations; the first is of the start, the last of the finished student."""
    final_kl: float
    """Mean of log pi_S - log pi_T over what the finished student samples on test prompts."""
    final_sampled_accuracy: float
    """Share of those responses that are right: accuracy at temperature 1, where `points` are greedy."""
    stage_seconds: Mapping[str, float]
    wall_seconds: float
    """All of the run, evaluations included."""

    @property
    def start(self) -> float:
        """Accuracy before the first rollout."""
        return self.points[0].accuracy

    @property
    def accuracy(self) -> float:
        """Accuracy at the end."""
        return self.points[-1].accuracy

    def level(self, share: float) -> float:
        """Return the accuracy at which this share of the gap to the teacher is closed."""
        return self.start + share * (self.teacher - self.start)

    def as_dict(self) -> dict[str, Any]:
        """Return the result as plain data."""
        return asdict(self) | {"run": self.run.as_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Return the result of `as_dict`."""
        points = tuple(Point(**point) for point in data["points"])
        return cls(**{**data, "run": Run.from_dict(data["run"]), "points": points})


def run_folder(out: Path, run: Run) -> Path:
    """Return where a run writes."""
    return out / "runs" / run.name


def finished(out: Path, run: Run) -> Result | None:
    """Return the result of a run; None while there is none.

    Raises:
        ValueError: the folder holds a run of that name under other settings.
    """
    path = run_folder(out, run) / RESULT_FILE
    if not path.exists():
        return None
    data = json.loads(path.read_text(encoding="utf-8"))
    if data["run"] != run.as_dict():
        raise ValueError(
            f"{path} is of other settings than this benchmark's: {data['run']}. Give the same flags as then, "
            "or another --out."
        )
    return Result.from_dict(data)


def all_finished(out: Path, runs: Iterable[Run]) -> list[Result]:
    """Return the results of those runs that have one."""
    found = [finished(out, run) for run in runs]
    return [result for result in found if result is not None]


def best_learning_rate(results: Sequence[Result]) -> float:
    """Return the learning rate whose curve is highest on average over the tokens; of equals the smallest.

    The curves, of one case, method and seed, are held against each other over as many tokens as the longest
    has; one that ended before holds its last accuracy.
    """
    scores = grid_scores(results)
    return max(sorted(scores), key=lambda rate: scores[rate])


def grid_scores(results: Sequence[Result]) -> dict[float, float]:
    """Return the mean height of the curve of each learning rate."""
    budget = max(result.points[-1].tokens for result in results)
    return {result.run.learning_rate: mean_accuracy(result.points, budget) for result in results}


def by_method(results: Iterable[Result]) -> dict[tuple[str, str], list[Result]]:
    """Return the results of each case and method, by their names, in the order of the results."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.run.case.name, result.run.method), []).append(result)
    return groups


def seed_runs(grid: Sequence[Result], seeds: int) -> Iterator[Run]:
    """Yield the runs under more seeds, `seeds` with the grid's own, at each method's best learning rate."""
    for results in by_method(grid).values():
        run = replace(results[0].run, learning_rate=best_learning_rate(results))
        for number in range(1, seeds):
            yield replace(run, seed=GRID_SEED + number)
