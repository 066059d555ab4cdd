"""The table: what a step cost each way, and how far they are apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from scripts.benchmarks.training.workload import Shape

Record = dict[str, Any]
"""What `measuring.measured` returned for one step."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line: how it is computed of a way's steps, and how it is written."""

    name: str
    value: Callable[[Shape, Sequence[Record]], float]
    form: str
    more_is_better: bool = False


def _median(records: Sequence[Record], name: str) -> float:
    return median(record[name] for record in records)


ROWS = (
    Row("tokens per second", lambda shape, records: shape.tokens / _median(records, "wall"), "{:,.0f}", True),
    Row("CPU, ms a token", lambda shape, records: 1e3 * _median(records, "cpu") / shape.tokens, "{:,.2f}"),
    Row("peak memory of a step, MB", lambda _, records: _median(records, "peak_bytes") / 1e6, "{:,.0f}"),
)


def ratios(shape: Shape, plain: Sequence[Record], ours: Sequence[Record]) -> dict[str, float]:
    """Return how many times better ours is, by the names of the rows."""
    found = {}
    for row in ROWS:
        theirs, mine = row.value(shape, plain), row.value(shape, ours)
        found[row.name] = mine / theirs if row.more_is_better else theirs / mine
    return found


def table(shape: Shape, plain: Sequence[Record], ours: Sequence[Record], name: str = "plain") -> str:
    """Return a Markdown table; the last column is how many times better ours is than the way `name`."""
    better = ratios(shape, plain, ours)
    lines = [f"| vocabulary {shape.vocabulary:,} | {name} | ours | ratio |", "|---|--:|--:|--:|"]
    for row in ROWS:
        theirs, mine = (row.form.format(row.value(shape, records)) for records in (plain, ours))
        lines.append(f"| {row.name} | {theirs} | {mine} | {better[row.name]:.1f} |")
    return "\n".join(lines)


def sizes(shape: Shape) -> str:
    """Say what a step is."""
    responses = shape.responses()
    return (
        f"{shape.total} samples of {shape.prompts} prompts ({shape.prompt} tokens, one picture), responses "
        f"of {min(responses)} to {max(responses)}: {shape.tokens:,} tokens, {sum(responses):,} learned from; "
        f"padded {shape.padded_tokens:,}."
    )
