"""What is said of the data before any model reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from slime.preflight.data import check_data
from slime.preflight.finding import Finding
from slime.preflight.launch import Download
from slime.tiny.paths import checkpoint_path
from tests.fakes.launches import launch, write_model

ROW = {"problem": "2 + 2?", "answer": "4", "images": []}


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def found(path: Path, *flags: str, student: Path | None = None, **options: Any) -> list[Finding]:
    student = checkpoint_path("student") if student is None else student
    return list(check_data(launch("--prompt-data", str(path), *flags, student=student, **options)))


def test_sound_data_are_no_news(tmp_path: Path) -> None:
    train = lines(tmp_path / "train.jsonl", ROW, {**ROW, "answer": 5, "metadata": {"a": 1}})
    assert found(train, "--eval-prompt-data", "test", f"{train}@[0:1]") == []
    assert found(Path("owner/name")) == [], "a hub name is loaded later"
    assert found(tmp_path / "none.parquet", downloads=(Download("a/b", tmp_path, "dataset"),)) == []


def test_files_that_are_not_there_or_hold_nothing_are_errors(tmp_path: Path) -> None:
    empty = lines(tmp_path / "empty.jsonl")
    train, test = found(tmp_path / "train.parquet", "--eval-prompt-data", "test", str(empty))
    assert train.what == f"--prompt-data {tmp_path}/train.parquet is not there"
    assert test.what == f"--eval-prompt-data test: {empty} holds no rows."
    assert train.fatal
    assert test.fatal
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 nothing")
    (broken,) = found(tmp_path / "broken.parquet")
    assert "cannot be read as parquet" in broken.what


def test_every_column_that_is_missing_is_told(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    pq.write_table(pa.table({"question": ["?"], "images": [[]]}), path)
    problem, answer = found(path)
    assert problem.what == (
        f"--prompt-data: {path} has no column 'problem', which --input-key names; it has question, images"
    )
    assert problem.remedy == "Set --input-key to the right one."
    assert "'answer', which --label-key names" in answer.what
    renamed = ("--input-key", "question", "--multimodal-keys", '{"image": "pictures"}')
    (answer, pictures) = found(path, *renamed)
    assert pictures.remedy == "Set --multimodal-keys ('{}' for text alone)."


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"problem": "?"}, "no column 'answer' (--label-key)"),
        ({**ROW, "problem": None}, "column 'problem' (--input-key) is empty"),
        ({**ROW, "answer": ["4"]}, "the label in column 'answer' is a list"),
        ({**ROW, "metadata": "text"}, "column 'metadata' is a str; an object is needed"),
        (["no object"], "a list, not an object with columns"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(tmp_path: Path, row: Any, why: str) -> None:
    path = lines(tmp_path / "train.jsonl", ROW, row)
    (finding,) = found(path)
    assert finding.fatal
    assert finding.what.startswith(
        f"--prompt-data: 1 of the first 2 rows cannot be used. {path}, row 2: {why}"
    )
    (finding,) = found(path, "--bad-rows", "skip")
    assert not finding.fatal
    (finding,) = found(lines(path, row), "--bad-rows", "skip")
    assert finding.fatal, "no row is left"


def test_a_blank_answer_is_a_warning(tmp_path: Path) -> None:
    path = lines(tmp_path / "train.jsonl", ROW, {**ROW, "answer": "  "})
    (finding,) = found(path)
    assert not finding.fatal
    assert (
        f"1 of the first 2 rows have a blank answer in column 'answer', the first one {path}, row 2"
        in finding.what
    )


def test_pictures_for_a_model_that_does_not_see_are_an_error(tmp_path: Path) -> None:
    path = lines(tmp_path / "train.jsonl", ROW, {**ROW, "images": ["a.png"]})
    blind = write_model(tmp_path / "model", {"a": [1]})
    (finding,) = found(path, student=blind)
    assert "has no vision part" in finding.what
    assert found(path, "--multimodal-keys", "{}", student=blind) == []
    assert found(path) == []


def test_a_replay_reads_no_prompts(tmp_path: Path) -> None:
    assert found(tmp_path / "none.parquet", "--load-debug-rollout-data", str(tmp_path)) == []
