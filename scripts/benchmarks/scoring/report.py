"""The table of one workload: what each client cost and made the server do, and how far they are apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from scripts.benchmarks.scoring.workload import Shape

Record = dict[str, Any]
"""What one turn of one client cost (`measuring.Cost`), brought back, and made the server do (`server`)."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line: how it is computed of a client's turns, and how it is written."""

    name: str
    value: Callable[[Shape, Sequence[Record]], float]
    form: str = "{:,.1f}"
    more_is_better: bool = False


def _per_sample(
    read: Callable[[Record], float], scale: float = 1.0
) -> Callable[[Shape, Sequence[Record]], float]:
    return lambda shape, records: scale * median(read(record) for record in records) / shape.total


def _per_group(name: str) -> Callable[[Shape, Sequence[Record]], float]:
    return lambda shape, records: median(record["server"][name] for record in records) / shape.groups


def _late(name: str) -> Callable[[Shape, Sequence[Record]], float]:
    return lambda shape, records: 1e3 * percentile([lag for record in records for lag in record[name]], 0.99)


SAMPLES = Row(
    "samples per second",
    lambda shape, records: shape.total / median(record["wall"] for record in records),
    form="{:,.2f}",
    more_is_better=True,
)
ENTRIES = Row("entries in an answer", lambda shape, records: max(records[-1]["entries"]), "{:,.0f}")
PREFILLED = Row("tokens prefilled a group", _per_group("prefilled_tokens"), "{:,.0f}")
STUB_ROWS = (
    SAMPLES,
    Row("client CPU, ms a sample", _per_sample(lambda record: record["cpu"], 1e3), "{:,.2f}"),
    Row("event-loop lag p99, ms", _late("lags")),
    Row("… of it, the loop's own work, ms", _late("own_lags")),
    Row(
        "client's peak memory, MB",
        lambda shape, records: max(record["peak_bytes"] for record in records) / 1e6,
    ),
    ENTRIES,
    Row("bytes to the server, kB a sample", _per_sample(lambda record: record["server"]["bytes_in"], 1e-3)),
    Row("bytes back, kB a sample", _per_sample(lambda record: record["server"]["bytes_out"], 1e-3)),
    PREFILLED,
    Row("vision passes a group", _per_group("vision_passes"), "{:,.0f}"),
)
SGLANG_ROWS = (
    SAMPLES,
    Row("server CPU, s a sample", _per_sample(lambda record: record["server"]["cpu"]), "{:,.3f}"),
    ENTRIES,
    PREFILLED,
    Row("tokens from the cache a group", _per_group("cached_tokens"), "{:,.0f}", more_is_better=True),
)


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that is not exceeded by `share` of them."""
    return sorted(values)[math.ceil(share * len(values)) - 1]


def table(shape: Shape, rows: Sequence[Row], plain: Sequence[Record], ours: Sequence[Record]) -> str:
    """Return a Markdown table; the last column is how many times better ours is."""
    lines = [f"| {shape.label}, n {shape.samples} | plain | ours | ratio |", "|---|--:|--:|--:|"]
    for row in rows:
        theirs, mine = row.value(shape, plain), row.value(shape, ours)
        ratio = _ratio(mine, theirs) if row.more_is_better else _ratio(theirs, mine)
        lines.append(f"| {row.name} | {row.form.format(theirs)} | {row.form.format(mine)} | {ratio} |")
    return "\n".join(lines)


def _ratio(larger: float, smaller: float) -> str:
    return f"{larger / smaller:.1f}" if smaller > 0 and larger > 0 else ""
