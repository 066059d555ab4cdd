"""The picture exists, is a picture, and survives a run with nothing in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from PIL import Image

from slime.metrics.plot import draw_curves

FULL = [
    {"rollout_id": 0, "step": 0, "teacher_eval/accuracy": 1.0},
    {"rollout_id": 0, "step": 0, "eval/accuracy": 0.31},
    *(
        {
            "rollout_id": i,
            "step": i + 1,
            "opd_reverse_kl": 0.5 / (i + 1),
            "reward": 0.3 + 0.03 * i,
            "signal/thinking_kl": 0.1,
        }
        for i in range(20)
    ),
    {"rollout_id": 20, "step": 20, "eval/accuracy": 0.95},
]


def _colours(path: Path) -> set[Any]:
    with Image.open(path) as image:
        return {colour for _, colour in image.convert("RGB").getcolors(maxcolors=1 << 24) or []}


@pytest.mark.parametrize(("records", "width"), [(FULL, 1800), (FULL[1:2], 600), ([], 600)])
def test_a_png_is_drawn(records, width, tmp_path):
    path = draw_curves(records, tmp_path)
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.size == (width, 480)


def test_the_teachers_line_is_there_only_with_a_teacher(tmp_path):
    orange = (0xC8, 0x57, 0x1B)
    assert orange in _colours(draw_curves(FULL, tmp_path))
    assert orange not in _colours(draw_curves(FULL[1:], tmp_path))


def test_a_run_without_a_teacher_has_one_panel(tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr(Axes, "set_title", lambda self, title: titles.append(title))
    draw_curves([FULL[1], {"rollout_id": 0, "step": 1, "reward": 0.3}], tmp_path)
    assert titles == ["Accuracy"]
