"""The other examples' launchers on tiny models, from their command to the files they leave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from slime.engines.process import free_port
from slime.tiny.words import WORDS
from tests.fakes.jobs import launched, write_data
from tests.fakes.launcher import REPOSITORY

GRPO = REPOSITORY / "examples" / "geo3k_vlm" / "run_geo3k_vlm.sh"
TEXT = REPOSITORY / "examples" / "on_policy_distillation" / "run_opd_text.sh"
SHORT = {"NUM_ROLLOUT": "2", "EXTRA_ARGS": "--train-threads 1"}

pytestmark = pytest.mark.timeout(600)


def finished(folder: Path, data: Path, script: Path, **knobs: str) -> tuple[str, list[dict[str, float]], Any]:
    """Run a launcher to its end; return its console, the metrics of its rollouts and its summary."""
    with launched(folder, data, SHORT | knobs, script) as job:
        status = job.wait()
        assert status == 0, job.console
        job.assert_nothing_left()
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rollouts = [record for record in records if "grad_norm" in record]
    return job.console, rollouts, json.loads((folder / "summary.json").read_text())


def test_grpo_trains_without_a_teacher(data: dict[str, Path], tmp_path: Path) -> None:
    console, rollouts, summary = finished(
        tmp_path / "run", data["train"].parent, GRPO, N_SAMPLES_PER_PROMPT="4"
    )
    assert [record["rollout_id"] for record in rollouts] == [0, 1]
    assert any(record["grad_norm"] > 0 for record in rollouts)
    assert "opd_reverse_kl" not in rollouts[0]
    assert (summary["rollouts"], summary["teacher"], summary["gap_closed"]) == (2, None, None)
    assert "| student after" in console
    assert "teacher" not in console.lower().partition("student before")[2]


def test_text_is_distilled_without_pictures(tmp_path: Path) -> None:
    data = write_data(tmp_path / "words", problems=WORDS)
    knobs = {"SKIP_DOCTOR": "1", "TEACHER_PORT": str(free_port())}
    console, rollouts, summary = finished(tmp_path / "run", data["train"].parent, TEXT, **knobs)
    for record in rollouts:
        assert record["opd_reverse_kl"] > 0
        assert record["teacher/aligned_frac"] == 1
        # engine and trainer agree on a text model, too
        assert record["train_rollout_logprob_abs_diff"] < 1e-3
    assert 0 <= summary["student_before"] < summary["teacher"] <= 1
    assert "| gap closed" in console
