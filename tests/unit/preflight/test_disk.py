"""What a run writes, and what is said of the room for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from slime.preflight import disk
from slime.preflight.disk import Written, all_written, checkpoints_at_once, judge, nearest, saves
from slime.preflight.finding import GIB
from slime.preflight.launch import Download, Launch
from slime.preflight.needs import Need
from tests.fakes.launches import launch, write_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model", {"a": [1000]})


def sizes(launch: Launch) -> dict[str, float]:
    return {written.need.label: written.need.size for written in all_written(launch) if written.need.sure}


@pytest.mark.parametrize(
    ("rollouts", "interval", "keep", "count"),
    [(10, None, 2, 1), (10, 5, 0, 2), (10, 3, 0, 4), (10, 3, 2, 3), (10, 5, 5, 2), (1, 1, 2, 1)],
)
def test_checkpoints_are_those_kept_and_the_one_that_is_written(
    rollouts: int, interval: int | None, keep: int, count: int
) -> None:
    assert checkpoints_at_once(rollouts, interval, keep) == count
    assert (saves(10, 3), saves(10, 0), saves(10, None)) == (4, 1, 1)


def test_a_run_writes_checkpoints_models_and_weights(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "shared_memory", lambda: None)
    assert sizes(launch(student=model)) == {"two versions of the weights": 2 * 4000}
    flags = ("--save", "out", "--save-interval", "1", "--save-keep", "2", "--save-hf-interval", "5")
    gpus = ("0", "1")
    assert sizes(launch(*flags, student=model, student_gpus=gpus)) == {
        "3 checkpoints": 3 * 12000,
        "2 exported models": 2 * 2000,
    }
    monkeypatch.setattr(disk, "shared_memory", lambda: (GIB, GIB))
    assert sizes(launch(student=model)) == {}, "the weights for engines are in shared memory"


def test_a_download_is_as_large_as_its_name_says(tmp_path: Path) -> None:
    coming = (
        Download("Qwen/Qwen3-VL-4B-Thinking", tmp_path / "models" / "Qwen3-VL-4B-Thinking", "model"),
        Download("owner/data", tmp_path / "data", "dataset"),
    )
    (size,) = sizes(launch(student=coming[0].folder, student_gpus=("0", "1"), downloads=coming)).values()
    assert size == 0.9 * 8e9


def test_a_long_recording_is_likely_and_not_sure(model: Path) -> None:
    flags = ("--save-debug-rollout-data", "somewhere", "--rollout-max-response-len", "100")
    (recorded,) = [
        written for written in all_written(launch(*flags, student=model)) if "recorded" in written.need.label
    ]
    assert not recorded.need.sure
    assert recorded.need.size == 10 * 32 * 4 * 100 * 16
    assert recorded.folder.name == "somewhere"


def test_checkpoints_that_are_there_need_no_more_room(model: Path, tmp_path: Path) -> None:
    for number in (2, 4):
        (tmp_path / "save" / f"rollout-{number:06d}").mkdir(parents=True)
    flags = ("--save", str(tmp_path / "save"), "--save-interval", "2", "--save-keep", "2")
    assert sizes(launch(*flags, student=model, student_gpus=("0", "1"))) == {"a checkpoint": 12000}


@pytest.mark.parametrize(("sure", "usual", "fatal"), [(80, 9, None), (80, 11, False), (101, 0, True)])
def test_room_is_judged_by_filesystem(sure: int, usual: int, fatal: bool | None) -> None:
    parts = [
        Written(Need("logs", usual * GIB, sure=False), Path("/out")),
        Written(Need("a checkpoint", sure * GIB), Path("/save")),
    ]
    findings = list(judge(parts, 100 * GIB))
    assert [finding.fatal for finding in findings] == ([] if fatal is None else [fatal])
    for finding in findings:
        assert finding.what.startswith(f"the disk of /save has 100.0 GiB free, and {sure + usual}.0 GiB are ")
        assert f": a checkpoint {sure}.0 GiB, logs " in finding.what
        assert "--save-keep" in finding.remedy


def test_a_folder_that_is_not_there_lies_on_the_disk_of_what_is(tmp_path: Path) -> None:
    assert nearest(tmp_path / "a" / "b") == tmp_path
    (tmp_path / "a").mkdir()
    assert nearest(tmp_path / "a" / "b") == tmp_path / "a"
