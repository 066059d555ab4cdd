"""Rows with their file and number."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from slime.data.errors import BadRow, DataError
from slime.data.reader import data_folder, parse_source, read_rows

Write = Callable[..., str]
ROWS = [{"problem": f"p{number}", "answer": number} for number in range(5)]


def said(source: str) -> list[tuple[str, int, Any]]:
    """Return (file name, row number, problem) of each row."""
    return [
        (Path(row.file).name, row.number, row.get(["problem"])["problem"])
        for row in read_rows(source, ["problem"])
    ]


def test_parquet_and_jsonl_give_the_same_rows(parquet: Write, jsonl: Write) -> None:
    expected = [(number + 1, f"p{number}") for number in range(5)]
    assert [(number, text) for _, number, text in said(parquet(ROWS))] == expected
    assert [(number, text) for _, number, text in said(jsonl(ROWS))] == expected


def test_jsonl_numbers_are_lines_and_blank_lines_are_no_rows(jsonl: Write) -> None:
    source = jsonl([ROWS[0], "", "   ", ROWS[1], "{broken", "[1]"])
    rows = read_rows(source, ["problem"])
    assert [row.number for row in rows] == [1, 4, 5, 6]
    with pytest.raises(BadRow, match=r"train.jsonl, row 5: no JSON"):
        rows[2].get(["problem"])
    with pytest.raises(BadRow, match=r"row 6: a list, not an object"):
        rows[3].get(["problem"])


def test_folder_is_read_by_split(parquet: Write, tmp_path: Path) -> None:
    parquet(ROWS[:2], "set/data/train-00000-of-00002.parquet")
    parquet(ROWS[2:4], "set/data/train-00001-of-00002.parquet")
    parquet(ROWS[4:], "set/data/test-00000-of-00001.parquet")
    parquet(ROWS[:1], "set/.cache/train.parquet")
    folder = str(tmp_path / "set")
    assert [(number, text) for _, number, text in said(folder)] == [
        (1, "p0"),
        (2, "p1"),
        (1, "p2"),
        (2, "p3"),
    ]
    assert [text for _, _, text in said(folder + "@test")] == ["p4"]
    with pytest.raises(DataError, match="no file of the split 'validation'"):
        read_rows(folder + "@validation", ["problem"])


def test_folder_of_one_file_needs_no_split(jsonl: Write, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    shutil.move(jsonl(ROWS), tmp_path / "one" / "problems.jsonl")
    assert len(said(str(tmp_path / "one"))) == 5
    assert len(said(str(tmp_path / "one") + "@[1:3]")) == 2


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("a/b", ("a/b", None, (None, None))),
        ("a/b@test", ("a/b", "test", (None, None))),
        ("a/b@[0:100]", ("a/b", None, (0, 100))),
        ("a/b@test@[-5:]", ("a/b", "test", (-5, None))),
    ],
)
def test_source_is_path_split_and_slice(source: str, parts: tuple[Any, ...]) -> None:
    assert parse_source(source) == parts


def test_existing_path_with_an_at_sign_is_taken_whole(parquet: Write, tmp_path: Path) -> None:
    source = parquet(ROWS, "geo@v2.parquet")
    assert len(said(source)) == 5
    assert len(said(source + "@[:2]")) == 2
    assert data_folder(source) == tmp_path


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("rows.csv", b"a,b\n", "no data file"),
        ("rows.parquet", b"not parquet", "cannot be read as parquet"),
        ("rows.jsonl", b"\n\n", "holds no rows"),
    ],
)
def test_unusable_file_is_one_clear_error(tmp_path: Path, name: str, content: bytes, why: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=why):
        read_rows(str(tmp_path / name), ["problem"])


def test_missing_path_is_one_clear_error(tmp_path: Path, parquet: Write) -> None:
    with pytest.raises(DataError, match="is not there, and is no hub name"):
        read_rows(str(tmp_path / "absent.parquet"), ["problem"])
    with pytest.raises(DataError, match="hub data set cannot be loaded"):
        read_rows("nobody/nothing", ["problem"])
    with pytest.raises(DataError, match="drop @test"):
        read_rows(parquet(ROWS) + "@test", ["problem"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no \.parquet or \.jsonl file"):
        read_rows(str(tmp_path / "empty"), ["problem"])


def test_text_that_is_no_utf8_is_a_bad_row(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    broken = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff\xfe"]).buffers())
    pq.write_table(pa.table({"problem": broken}), tmp_path / "train.parquet")
    (row,) = read_rows(str(tmp_path / "train.parquet"), ["problem"])
    with pytest.raises(BadRow, match=r"train.parquet, row 1: cannot be read"):
        row.get(["problem"])


def test_hub_data_set_is_read_with_its_pictures_encoded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, make_row: Callable[..., dict[str, Any]]
) -> None:
    import datasets

    rows = [make_row(number) for number in range(3)]
    features = datasets.Features(
        {
            "problem": datasets.Value("string"),
            "answer": datasets.Value("string"),
            "images": [datasets.Image()],
        }
    )
    loaded = datasets.Dataset.from_list(rows, features=features)
    asked: list[tuple[str, str]] = []

    def load_dataset(name: str, split: str) -> datasets.Dataset:
        asked.append((name, split))
        return loaded

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    read = read_rows("owner/geo@test", ["problem", "images"])
    assert asked == [("owner/geo", "test")]
    assert [(row.file, row.number) for row in read] == [("owner/geo@test", number) for number in (1, 2, 3)]
    assert read[1].get(["images"])["images"][0]["bytes"] == rows[1]["images"][0]["bytes"]
    assert read[1].shard.count(1, "images") == 1
    assert data_folder("owner/geo@test") is None
