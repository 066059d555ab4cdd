"""The tables: a line for each method, and a line for what the grid of learning rates gave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from scripts.benchmarks.learning_curves.curves import Cost, binomial_error, reached, standard_error
from scripts.benchmarks.learning_curves.methods import CASES, GRID_SEED, METHODS, Run
from scripts.benchmarks.learning_curves.results import Result, best_learning_rate, by_method, grid_scores
from slime.metrics.summary import gap_closed

NOT_REACHED = "not reached"
HEADER = (
    "method",
    "lr",
    "accuracy",
    "± test rows",
    "gap closed",
    "at temperature 1",
    "final KL",
    "tokens to 50 %",
    "tokens to 80 %",
    "of them the teacher's",
    "seconds to 50 %",
    "seconds to 80 %",
)


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One method in one case, at its best learning rate."""

    grid: tuple[Result, ...]
    """All learning rates under the grid's seed."""
    seeds: tuple[Result, ...]
    """The best one under every seed that has been run."""

    @property
    def run(self) -> Run:
        """The run that was chosen in the grid."""
        return self.seeds[0].run


def summaries(results: Sequence[Result]) -> list[Summary]:
    """Return a summary for each case and method that has its grid, in the order of the tables."""
    made: list[Summary] = []
    for group in by_method(results).values():
        grid = [result for result in group if result.run.seed == GRID_SEED]
        if not grid:
            continue
        rate = best_learning_rate(grid)
        seeds = sorted(
            (result for result in group if result.run.learning_rate == rate),
            key=lambda result: result.run.seed,
        )
        made.append(Summary(grid=tuple(grid), seeds=tuple(seeds)))
    order = list(METHODS)
    return sorted(made, key=lambda summary: order.index(summary.run.method))


def report(results: Sequence[Result]) -> str:
    """Return both tables of each case as Markdown."""
    parts: list[str] = []
    for case in CASES.values():
        own = [summary for summary in summaries(results) if summary.run.case.name == case.name]
        if own:
            parts += [f"## {case.title}", _setting(own), method_table(own), grid_table(own)]
    return "\n\n".join(parts)


def _setting(own: Sequence[Summary]) -> str:
    """Say what holds for all methods of a case."""
    first = own[0].seeds[0]
    starts = {result.start for summary in own for result in summary.seeds}
    start = " to ".join(f"{value:.3f}" for value in sorted({min(starts), max(starts)}))
    return (
        f"Accuracy on the {first.test_rows} test rows: the student before {start}, the teacher "
        f"{first.teacher:.3f}."
    )


def method_table(own: Sequence[Summary]) -> str:
    """Return a line for each method: means over the seeds, ± their standard error."""
    rows: list[Sequence[str]] = []
    for summary in own:
        seeds = summary.seeds
        shares = [gap_closed(result.start, result.accuracy, result.teacher) for result in seeds]
        known = [share for share in shares if share is not None]
        rows.append(
            (
                METHODS[summary.run.method].label,
                f"{summary.run.learning_rate:g}",
                with_error([result.accuracy for result in seeds], "{:.3f}"),
                f"{binomial_error(mean(result.accuracy for result in seeds), seeds[0].test_rows):.3f}",
                with_error(known, "{:.0%}") if known else "not given",
                with_error([result.final_sampled_accuracy for result in seeds], "{:.3f}"),
                with_error([result.final_kl for result in seeds], "{:.3f}"),
                _cost(seeds, 0.5, "tokens"),
                _cost(seeds, 0.8, "tokens"),
                _cost(seeds, 0.8, "teacher_tokens") if METHODS[summary.run.method].teacher_samples else "0",
                _cost(seeds, 0.5, "seconds"),
                _cost(seeds, 0.8, "seconds"),
            )
        )
    return _table(HEADER, rows)


def grid_table(own: Sequence[Summary]) -> str:
    """Return what each learning rate of the grid gave under the grid's seed; the chosen one is bold."""
    rates = sorted({result.run.learning_rate for summary in own for result in summary.grid})
    rows: list[Sequence[str]] = []
    for summary in own:
        scores = grid_scores(summary.grid)
        last = {result.run.learning_rate: result.accuracy for result in summary.grid}
        cells = [f"{scores[rate]:.3f} ({last[rate]:.3f})" if rate in scores else "" for rate in rates]
        best = rates.index(summary.run.learning_rate)
        cells[best] = f"**{cells[best]}**"
        rows.append((METHODS[summary.run.method].label, *cells))
    return _table(("mean accuracy (the last)", *(f"lr {rate:g}" for rate in rates)), rows)


def _cost(seeds: Sequence[Result], share: float, cost: Cost) -> str:
    """Return the mean cost of closing a share of the gap, over the seeds that did."""
    costs = [reached(result.points, result.level(share), cost) for result in seeds]
    known = [spent for spent in costs if spent is not None]
    if not known:
        return NOT_REACHED
    text = with_error(known, "{:,.0f}" if cost != "seconds" else "{:.1f}")
    return text if len(known) == len(seeds) else f"{text} ({len(known)} of {len(seeds)})"


def with_error(values: Sequence[float], form: str) -> str:
    """Return the mean, ± its standard error where there are several values."""
    error = standard_error(values)
    text = form.format(mean(values))
    return text if error is None else f"{text} ± {form.format(error)}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|---|" + "--:|" * (len(header) - 1)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)
