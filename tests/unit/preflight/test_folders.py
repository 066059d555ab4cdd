"""Whether a run may write where it has to."""

from __future__ import annotations

from pathlib import Path

import pytest

from slime.preflight.folders import check_folders, write_problem
from tests.fakes.launches import launch


def test_a_folder_that_takes_a_file_is_left_as_it_was(tmp_path: Path) -> None:
    flags = ("--output-dir", str(tmp_path / "out"), "--save", str(tmp_path / "out" / "checkpoints"))
    assert list(check_folders(launch(*flags))) == []
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_way_and_a_folder_that_takes_nothing_are_errors(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    flags = ("--output-dir", str(tmp_path / "file" / "out"), "--save", str(tmp_path / "file" / "out" / "ck"))
    one, other = check_folders(launch(*flags, folders={"SLIME_SCRIPT_MODEL_DIR": Path("/proc/models")}))
    assert (
        one.what
        == f"nothing can be written to {tmp_path}/file/out (--output-dir, --save): {tmp_path}/file is a file"
    )
    assert one.remedy.endswith("another folder by --output-dir, --save")
    assert "/proc/models (SLIME_SCRIPT_MODEL_DIR)" in other.what
    assert one.fatal
    assert other.fatal


def test_the_folder_of_recordings_is_that_of_their_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    place = "/proc/recorded/rollout-{rollout_id}.parquet"
    (finding,) = check_folders(launch("--output-dir", str(tmp_path), "--save-debug-rollout-data", place))
    assert "/proc/recorded (--save-debug-rollout-data)" in finding.what
    assert write_problem(tmp_path) is None
