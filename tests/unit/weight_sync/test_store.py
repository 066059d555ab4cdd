"""The folder of published weights: in shared memory where it fits, and gone at the end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from slime.weight_sync.store import WeightStore


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(bytes(1000))
    return folder


def _create(tmp_path: Path, checkpoint: Path, *, one_machine: bool = True) -> WeightStore:
    shared = tmp_path / "shm"
    shared.mkdir(exist_ok=True)
    return WeightStore.create(tmp_path / "out", checkpoint, one_machine=one_machine, shared_memory=shared)


def test_the_store_is_in_shared_memory_on_one_machine_and_in_the_output_on_several(tmp_path, checkpoint):
    with _create(tmp_path, checkpoint) as store:
        assert store.root.parent == tmp_path / "shm"
    with _create(tmp_path, checkpoint, one_machine=False) as store:
        assert store.root.parent == tmp_path / "out"
    assert list((tmp_path / "out").iterdir()) == list((tmp_path / "shm").iterdir()) == []


def test_small_shared_memory_is_left_alone(tmp_path, checkpoint, monkeypatch):
    usage = type("Usage", (), {"free": 1})
    monkeypatch.setattr("slime.weight_sync.store.shutil.disk_usage", lambda path: usage)
    with _create(tmp_path, checkpoint) as store:
        assert store.root.parent == tmp_path / "out"


def test_only_the_newest_version_stays(tmp_path, checkpoint):
    with _create(tmp_path, checkpoint) as store:
        for version in ("0", "1"):
            store.path_for(version).mkdir()
            store.retire_all_but(version)
        assert [path.name for path in store.root.iterdir() if path.is_dir()] == ["version-1"]
        assert store.current == store.path_for("1")


def test_a_checkpoint_without_safetensors_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="--hf-checkpoint"):
        _create(tmp_path, tmp_path / "empty")


def test_the_driver_pays_for_no_torch():
    command = "import sys, slime.weight_sync.store; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command], check=False).returncode == 0
