"""The picture: accuracy over the response tokens trained on, a panel for each case."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from scripts.benchmarks.learning_curves.curves import accuracy_at
from scripts.benchmarks.learning_curves.methods import CASES, METHODS
from scripts.benchmarks.learning_curves.report import Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLOT_FILE = "learning_signals.png"
COLOURS = {
    "sampled": "#1f5fa8",
    "reverse_kl": "#2a8a5b",
    "forward_kl": "#c8571b",
    "jsd": "#8550a6",
    "hybrid": "#4fa3d1",
    "sft": "#555555",
    "grpo": "#b3261e",
}
STEPS = 200


def draw(summaries: Sequence[Summary], folder: Path) -> Path:
    """Draw every case that has results into a PNG; return its path."""
    cases = [
        case for case in CASES.values() if any(summary.run.case.name == case.name for summary in summaries)
    ]
    # The canvas is named outright: pyplot would keep the figure and look for a display.
    figure = Figure(figsize=(6.5 * len(cases), 4.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, case in zip(figure.subplots(1, len(cases), squeeze=False)[0], cases, strict=True):
        own = [summary for summary in summaries if summary.run.case.name == case.name]
        _draw_case(axes, own)
        axes.set_title(case.title)
    path = folder / PLOT_FILE
    figure.savefig(path)
    return path


def _draw_case(axes: Axes, own: Sequence[Summary]) -> None:
    axes.axhline(own[0].seeds[0].teacher, color="black", linestyle=":", linewidth=1, label="teacher")
    for summary in own:
        name = summary.run.method
        colour, style = COLOURS[name.removesuffix("_top8")], "--" if name.endswith("_top8") else "-"
        tokens, low, middle, high = band(summary)
        axes.plot(tokens, middle, color=colour, linestyle=style, linewidth=1.6, label=METHODS[name].label)
        axes.fill_between(tokens, low, high, color=colour, alpha=0.12, linewidth=0)
    axes.set_ylim(0, 1.04)
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1000:,.0f} k"))
    axes.set_xlabel("response tokens trained on")
    axes.set_ylabel("accuracy on the test split")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, frameon=False, loc="lower right")


def band(summary: Summary) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return tokens, and over them the lowest, mean and highest accuracy of the seeds.

    A seed that ended before the longest holds its last accuracy.
    """
    tokens = np.linspace(0, max(result.points[-1].tokens for result in summary.seeds), STEPS)
    curves = np.array([[accuracy_at(result.points, at) for at in tokens] for result in summary.seeds])
    return tokens, curves.min(axis=0), curves.mean(axis=0), curves.max(axis=0)
