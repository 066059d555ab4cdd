"""The closing table and its JSON."""

from __future__ import annotations

import dataclasses
import json

import pytest

from slime.metrics.summary import Summary, gap_closed, render_table, write_summary


@pytest.fixture
def summary() -> Summary:
    return Summary(
        student_before=0.31,
        student_after=0.95,
        teacher=1.0,
        gap_closed=gap_closed(0.31, 0.95, 1.0),
        rollouts=20,
        student_tokens=123456,
        wall_seconds=125.4,
        backend="fsdp",
        engine="transformers",
    )


def test_the_share_of_the_gap():
    assert gap_closed(0.3, 0.9, 1.0) == pytest.approx(6 / 7)
    assert gap_closed(0.3, 0.2, 1.0) == pytest.approx(-1 / 7)


@pytest.mark.parametrize(
    "triple", [(0.91, 0.95, 1.0), (1.0, 1.0, 0.5), (None, 0.5, 1.0), (0.3, None, 1.0), (0.3, 0.5, None)]
)
def test_no_share_where_the_gap_is_small_or_unknown(triple):
    assert gap_closed(*triple) is None


def test_the_table_shows_every_line(summary):
    table = render_table(summary)
    assert len({len(line) for line in table.splitlines()}) == 1
    for text in ("0.310", "0.950", "1.000", "93%", "123,456", "2 min 05 s", "fsdp, transformers"):
        assert text in table


def test_what_was_not_evaluated_says_so(summary):
    bare = dataclasses.replace(summary, student_after=None, teacher=None, gap_closed=None)
    assert render_table(bare).count("not evaluated") == 2
    assert "not given" in render_table(bare)


def test_a_run_without_a_teacher_has_no_lines_about_one(summary):
    table = render_table(dataclasses.replace(summary, teacher=None, gap_closed=None), with_teacher=False)
    assert "teacher" not in table
    assert "gap" not in table
    assert {"0.310", "0.950", "fsdp,"} <= set(table.split())


def test_the_teachers_tokens_are_not_called_the_students(summary):
    assert "teacher tokens" in render_table(dataclasses.replace(summary, written_by="teacher"))


def test_the_json_has_the_promised_keys(summary, tmp_path):
    written = json.loads(write_summary(summary, tmp_path).read_text())
    assert list(written) == [
        "student_before",
        "student_after",
        "teacher",
        "gap_closed",
        "rollouts",
        "student_tokens",
        "wall_seconds",
        "backend",
        "engine",
        "written_by",
        "signal",
    ]
    assert written["student_tokens"] == 123456
