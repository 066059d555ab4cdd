"""The folder of published weights: in shared memory where it fits, and gone at the end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from slime.scratch import ScratchFolder
from slime.weight_sync.store import create_weight_folder


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(bytes(1000))
    return folder


def _create(tmp_path: Path, checkpoint: Path, *, one_machine: bool = True) -> ScratchFolder:
    shared = tmp_path / "shm"
    shared.mkdir(exist_ok=True)
    return create_weight_folder(tmp_path / "out", checkpoint, one_machine=one_machine, shared_memory=shared)


def test_the_store_is_in_shared_memory_on_one_machine_and_in_the_output_on_several(tmp_path, checkpoint):
    with _create(tmp_path, checkpoint) as store:
        assert store.path.parent == tmp_path / "shm"
    with _create(tmp_path, checkpoint, one_machine=False) as store:
        assert store.path.parent == tmp_path / "out"
    assert list((tmp_path / "out").iterdir()) == list((tmp_path / "shm").iterdir()) == []


def test_small_shared_memory_is_left_alone(tmp_path, checkpoint, monkeypatch):
    usage = type("Usage", (), {"free": 1})
    monkeypatch.setattr("slime.weight_sync.store.shutil.disk_usage", lambda path: usage)
    with _create(tmp_path, checkpoint) as store:
        assert store.path.parent == tmp_path / "out"


def test_a_checkpoint_without_safetensors_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="--hf-checkpoint"):
        _create(tmp_path, tmp_path / "empty")


def test_the_driver_pays_for_no_torch():
    command = "import sys, slime.weight_sync.store; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command], check=False).returncode == 0
