"""The time line reads as Chrome's viewer reads it, however the run that wrote it ended."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slime.metrics.trace import TRACE_FILE, Span, Stopwatch, Trace, read_trace

GENERATION = Span(stage="generation", start=1000.5, seconds=0.25, facts={"id": 3})
GOLDEN = """[
{"name": "process_name", "ph": "M", "pid": 1, "args": {"name": "rollout"}},
{"name": "thread_name", "ph": "M", "pid": 1, "tid": 1, "args": {"name": "generation"}},
{"name": "generation", "ph": "X", "pid": 1, "tid": 1, "ts": 1000500000, "dur": 250000, "args": {"id": 3}},
{"name": "process_name", "ph": "M", "pid": 2, "args": {"name": "train_0"}},
{"name": "thread_name", "ph": "M", "pid": 2, "tid": 2, "args": {"name": "train"}},
{"name": "train", "ph": "X", "pid": 2, "tid": 2, "ts": 1000600000, "dur": 1500000, "args": {"id": 2}},
{"name": "generation", "ph": "X", "pid": 1, "tid": 1, "ts": 1002000000, "dur": 500000, "args": {}}
]
"""


def _write(folder: Path) -> Trace:
    trace = Trace(folder)
    trace.add("rollout", GENERATION)
    trace.add("train_0", Span(stage="train", start=1000.6, seconds=1.5, facts={"id": 2}))
    trace.add("rollout", Span(stage="generation", start=1002.0, seconds=0.5))
    return trace


def test_an_actor_is_a_process_and_a_stage_is_a_row(tmp_path):
    trace = _write(tmp_path)
    trace.close()
    trace.close()
    text = (tmp_path / TRACE_FILE).read_text()
    assert text == GOLDEN
    assert json.loads(text) == read_trace(tmp_path / TRACE_FILE)


@pytest.mark.parametrize("lost", [0, 1, 40])
def test_what_a_killed_run_wrote_can_be_read_and_gone_on_with(tmp_path, lost):
    path = tmp_path / TRACE_FILE
    _write(tmp_path)  # never closed
    text = path.read_text()
    path.write_text(text[: len(text) - lost])
    before = read_trace(path)
    assert len(before) == (7 if lost == 0 else 6)
    if lost == 0:
        assert json.loads(text + "]") == before
    trace = Trace(tmp_path)
    trace.add("rollout", GENERATION)
    trace.close()
    assert json.loads(path.read_text()) == [*before, before[2]]


def test_a_run_without_stages_leaves_an_empty_array(tmp_path):
    Trace(tmp_path).close()
    assert json.loads((tmp_path / TRACE_FILE).read_text()) == []
    assert read_trace(tmp_path / TRACE_FILE) == []
    assert read_trace(tmp_path / "none.json") == []


def test_what_actors_measure_is_collected_when_it_is_asked_for(tmp_path):
    trace = Trace(tmp_path)
    trace.collect()
    trace.source = lambda: {"rollout": [GENERATION], "train_0": []}
    trace.collect()
    assert [event["name"] for event in read_trace(tmp_path / TRACE_FILE)][2:] == ["generation"]


def test_a_stage_is_measured_also_where_it_fails():
    stopwatch = Stopwatch()
    with pytest.raises(ValueError, match="no number"), stopwatch.stage("train", rollout_id=1):
        raise ValueError("no number")
    (span,) = stopwatch.take()
    assert (span.stage, span.facts) == ("train", {"rollout_id": 1})
    assert span.seconds >= 0
    assert stopwatch.take() == []
