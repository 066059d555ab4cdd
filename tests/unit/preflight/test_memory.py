"""What is said of the host's memory, and of the shared part of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from slime.preflight.finding import GIB
from slime.preflight.memory import free_memory, judge, judge_shared
from slime.preflight.needs import Need
from tests.fakes.launches import launch, write_model


@pytest.mark.parametrize(
    ("sure", "usual", "fatal"),
    [(50, 39, None), (50, 45, False), (99, 0, False), (101, 0, True), (90, 50, False)],
)
def test_a_sure_need_beyond_what_is_free_is_an_error_and_a_likely_one_a_warning(
    sure: int, usual: int, fatal: bool | None
) -> None:
    findings = list(
        judge([Need("training", sure * GIB), Need("its processes", usual * GIB, sure=False)], 100 * GIB)
    )
    assert [finding.fatal for finding in findings] == ([] if fatal is None else [fatal])
    for finding in findings:
        assert finding.what.startswith(f"100.0 GiB of memory are free, and at least {sure + usual}.0 GiB are")
        assert f"training {sure}.0 GiB" in finding.what


def test_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=5 * GIB))
    monkeypatch.setattr(psutil, "swap_memory", lambda: SimpleNamespace(free=2 * GIB))
    assert free_memory(tmp_path / "none") == 7 * GIB
    contents = {
        "max": "1073741824",
        "current": "900000000",
        "stat": "anon 7\ninactive_file 50000000",
    }
    for name, text in contents.items():
        (tmp_path / f"memory.{name}").write_text(text + "\n")
    assert free_memory(tmp_path) == 1073741824 - 900000000 + 50000000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(tmp_path) == 7 * GIB


def test_shared_memory_must_hold_what_is_handed_over_there(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", {"a": [2**12, 2**12]})
    handed = launch("--weight-sync", "tensor", "--colocate", student=model)
    assert list(judge_shared(handed, (2 * GIB, GIB))) == []
    (finding,) = judge_shared(handed, (2 * GIB, 2**20))
    assert finding.fatal
    assert "has 1.0 MiB free, and a bucket of weights takes 64.0 MiB there" in finding.what
    assert "--shm-size" in finding.remedy
    (finding,) = judge_shared(launch(student=model), (64 * 2**20, 64 * 2**20))
    assert not finding.fatal
    assert "/dev/shm has 64.0 MiB" in finding.what
    (finding,) = judge_shared(launch(student=model), None)
    assert not finding.fatal
    assert list(judge_shared(launch("--ray-address", "auto", student=model), (2**20, 2**20))) == []
