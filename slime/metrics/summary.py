"""What a run came to: the closing table and the same as `summary.json`. Pure but for `write_summary`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

SUMMARY_FILE = "summary.json"
MIN_GAP = 0.1
"""Below this distance between teacher and student a share of it is noise and is not given."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One run in a few numbers. Accuracies are shares of 1; None where nothing was evaluated."""

    student_before: float | None
    student_after: float | None
    teacher: float | None
    gap_closed: float | None
    rollouts: int
    student_tokens: int
    """Response tokens that were trained on; the student sampled them, unless the teacher wrote them."""
    wall_seconds: float
    backend: str
    engine: str
    written_by: str = "student"
    """Who sampled the response tokens."""
    signal: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Metrics of the teacher's signal, in the first and in the last tenth of the rollouts."""


def gap_closed(before: float | None, after: float | None, teacher: float | None) -> float | None:
    """Return (after - before) / (teacher - before); None where one is unknown or the gap under `MIN_GAP`."""
    if before is None or after is None or teacher is None or teacher - before < MIN_GAP:
        return None
    return (after - before) / (teacher - before)


def render_table(summary: Summary, *, with_teacher: bool = True) -> str:
    """Return the closing table as text; a run without a teacher has no lines about one."""
    minutes, seconds = divmod(round(summary.wall_seconds), 60)
    share = "not given" if summary.gap_closed is None else f"{summary.gap_closed:.0%}"
    teacher = [("teacher", _accuracy(summary.teacher)), ("gap closed", share)]
    rows = [
        ("student before", _accuracy(summary.student_before)),
        ("student after", _accuracy(summary.student_after)),
        *(teacher if with_teacher else []),
        ("rollouts", str(summary.rollouts)),
        (f"{summary.written_by} tokens", f"{summary.student_tokens:,}"),
        ("wall time", f"{minutes} min {seconds:02d} s"),
        ("backend, engine", f"{summary.backend}, {summary.engine}"),
    ]
    left = max(len(label) for label, _ in rows)
    right = max(len(value) for _, value in rows)
    border = f"+-{'-' * left}-+-{'-' * right}-+"
    body = [f"| {label:<{left}} | {value:>{right}} |" for label, value in rows]
    return "\n".join([border, *body, border])


def write_summary(summary: Summary, output_dir: Path) -> Path:
    """Write `summary.json` and return its path."""
    path = output_dir / SUMMARY_FILE
    path.write_text(json.dumps(asdict(summary), indent=2) + "\n", encoding="utf-8")
    return path


def _accuracy(value: float | None) -> str:
    return "not evaluated" if value is None else f"{value:.3f}"
