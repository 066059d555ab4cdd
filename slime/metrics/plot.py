"""The run as a picture: accuracy, and of a distillation the teacher's and the reverse KL that was closed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLOT_FILE = "curves.png"
STUDENT, TEACHER, FAINT = "#1f5fa8", "#c8571b", "#9db8d6"
PARTS = {"thinking": "#1f5fa8", "answer": "#3a9d6e", "first_token": "#8e6bb0", "last_token": "#b03a5b"}
"""Kinds of tokens whose reverse KL is drawn."""


def draw_curves(records: Sequence[dict[str, float]], output_dir: Path) -> Path:
    """Draw accuracy and, of a distillation, reverse KL and where it is, over the rollouts, into a PNG.

    Return its path.
    """
    panels = [_draw_accuracy]
    if any("opd_reverse_kl" in record for record in records):
        panels += [_draw_divergence, _draw_anatomy]
    # The canvas is named outright: pyplot would keep the figure and look for a display.
    figure = Figure(figsize=(5 * len(panels), 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for draw, axes in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True):
        draw(axes, records)
        axes.set_xlabel("rollouts")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    path = output_dir / PLOT_FILE
    figure.savefig(path)
    return path


def _draw_accuracy(axes: Axes, records: Sequence[dict[str, float]]) -> None:
    sampled = _series(records, "reward", offset=1)
    if sampled[0]:
        axes.plot(*sampled, color=FAINT, linewidth=1, label="student, sampled on training prompts")
    evaluated = _series(records, "eval/accuracy")
    if evaluated[0]:
        axes.plot(*evaluated, color=STUDENT, marker="o", linewidth=2, label="student, held-out, greedy")
        for x, y in zip(*evaluated, strict=True):
            axes.annotate(
                f"{y:.2f}", (x, y), textcoords="offset points", xytext=(5, -11), ha="left", fontsize=8
            )
    teacher = _series(records, "teacher_eval/accuracy")
    if teacher[0]:
        level = teacher[1][-1]
        axes.axhline(level, color=TEACHER, linestyle="--", linewidth=1.5, label=f"teacher, {level:.2f}")
    axes.set_ylim(0, 1.08)
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    axes.set_title("Accuracy")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower right", fontsize=8, frameon=False)


def _draw_divergence(axes: Axes, records: Sequence[dict[str, float]]) -> None:
    axes.plot(*_series(records, "opd_reverse_kl", offset=1), color=STUDENT, marker=".", linewidth=1.5)
    axes.axhline(0, color="black", linewidth=0.6)
    axes.set_title("Reverse KL to the teacher (nats per response token)")


def _draw_anatomy(axes: Axes, records: Sequence[dict[str, float]]) -> None:
    """Draw on which tokens student and teacher differ."""
    for name, colour in PARTS.items():
        points = _series(records, f"signal/{name}_kl", offset=1)
        if points[0]:
            axes.plot(*points, color=colour, linewidth=1.5, label=name.replace("_", " "))
    axes.axhline(0, color="black", linewidth=0.6)
    axes.set_title("Where the reverse KL is")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="best", fontsize=8, frameon=False)


def _series(
    records: Sequence[dict[str, float]], name: str, offset: int = 0
) -> tuple[list[float], list[float]]:
    """Return the x (rollouts done) and y of one metric; `offset` is 1 for what a rollout itself logs."""
    points = [(record["rollout_id"] + offset, record[name]) for record in records if name in record]
    return [x for x, _ in points], [y for _, y in points]
