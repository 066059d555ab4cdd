"""The soak of docs/survival.md, small."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.checks.soak.__main__ import soak
from scripts.checks.soak.faults import FAULTS
from scripts.checks.soak.job import PROMPTS, SAMPLES, Job


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_short_soak_loses_nothing(tmp_path: Path) -> None:
    kinds = {fault.name: fault for fault in FAULTS}
    job = Job(tmp_path / "run", tmp_path / "data", rollouts=20, save_interval=3)
    try:
        outcome = soak(job, [(4, kinds["engine killed"]), (8, kinds["driver killed"])])
    finally:
        job.kill()
    assert outcome.faults == ["engine killed", "driver killed"]
    assert outcome.starts == 2
    assert outcome.trained_samples == 20 * PROMPTS * SAMPLES
    assert list(outcome.rollout_ids) == list(range(20))
    assert [thing for thing in outcome.left if "port" in thing] == []
    assert job.left() == []
