"""Finding checkpoints and making the dataset once."""

from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from slime.tiny import CHECKPOINTS, checkpoint_path, ensure_dataset, problems
from slime.tiny.__main__ import main
from slime.tiny.geometry import GEOMETRY
from slime.tiny.words import WORDS


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for split in problems.SPLIT_SIZES:
        monkeypatch.setitem(problems.SPLIT_SIZES, split, 8)


def test_ensure_dataset_writes_once(tmp_path: Path) -> None:
    first = ensure_dataset(tmp_path / "data")
    times = {split: path.stat().st_mtime_ns for split, path in first.items()}
    assert list(first) == ["train", "validation", "test"]
    assert ensure_dataset(str(tmp_path / "data")) == first
    assert {split: path.stat().st_mtime_ns for split, path in first.items()} == times
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == [
        "test.parquet",
        "train.parquet",
        "validation.parquet",
    ]


def test_ensure_dataset_replaces_other_versions_and_broken_files(
    tmp_path: Path,
) -> None:
    paths = ensure_dataset(tmp_path)
    whole = paths["test"].read_bytes()
    paths["test"].write_bytes(b"not parquet")
    assert ensure_dataset(tmp_path)["test"].read_bytes() == whole
    for other in (replace(GEOMETRY, version="version 99"), WORDS):
        written = pq.read_schema(ensure_dataset(tmp_path, other)["train"])
        assert written.metadata[b"slime.tiny"] == other.stamp().encode()
        assert written.names == other.schema.names


def test_an_unknown_checkpoint_is_named_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'big'.*teacher, student, weak, text_teacher, text_student"):
        checkpoint_path("big")


def test_a_checkpoint_that_is_not_there_says_how_to_make_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slime.tiny.paths._SHIPPED", tmp_path)
    with pytest.raises(FileNotFoundError, match="--retrain --only weak"):
        checkpoint_path("weak")


def test_shipped_checkpoints_are_small() -> None:
    for name in CHECKPOINTS:
        files = list(checkpoint_path(name).iterdir())
        assert sum(file.stat().st_size for file in files) < 2_000_000


def test_the_command_writes_the_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--data", str(tmp_path)]) == 0
    assert str(tmp_path / "test.parquet") in capsys.readouterr().out


def test_the_command_writes_the_set_in_words(tmp_path: Path) -> None:
    assert main(["--data", str(tmp_path), "--set", "words"]) == 0
    [row] = pq.read_table(tmp_path / "test.parquet").slice(0, 1).to_pylist()
    assert list(row) == ["prompt", "label", "solution"]


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--data", "x", "--only", "weak"],
        ["--data", "x", "--measure"],
        ["--data", "x", "--set", "pictures"],
        ["--measure", "--set", "words"],
    ],
)
def test_the_command_refuses_what_makes_no_sense(argv: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(argv)
