"""Whether student and teacher mean the same by an id."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slime.engines.doctor.files import tokens_of
from slime.preflight.launch import Download, Launch
from slime.preflight.tokens import check_tokens, read_template, read_tokens
from slime.tiny.paths import checkpoint_path
from slime.utils.processing_utils import load_processor
from tests.fakes.launches import launch, teacher

STUDENT = checkpoint_path("student")


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A teacher's checkpoint that can be spoiled."""
    return Path(shutil.copytree(checkpoint_path("teacher"), tmp_path / "teacher"))


def pair(other: Path, **options: Any) -> Launch:
    return launch(student=STUDENT, teacher=teacher(other), **options)


def edit(path: Path, change: Callable[[Any], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_files_are_read_as_transformers_does() -> None:
    processor = load_processor(STUDENT)
    assert read_tokens(STUDENT) == tokens_of(processor.tokenizer)
    assert read_template(STUDENT) == processor.chat_template


def test_checkpoints_of_one_family_agree(other: Path) -> None:
    assert list(check_tokens(pair(other))) == []


def test_other_tokens_are_an_error_unless_they_are_still_to_come(other: Path) -> None:
    edit(other / "tokenizer_config.json", lambda config: config.update(eos_token="<|endoftext|>"))
    (finding,) = check_tokens(pair(other))
    assert finding.fatal
    assert f"student {STUDENT} and teacher {other}: the end of turn is " in finding.what
    assert "one family" in finding.remedy
    assert list(check_tokens(pair(other, downloads=(Download("a/b", other, "model"),)))) == []
    assert list(check_tokens(launch(student=STUDENT))) == [], "there is no teacher"


def test_a_smaller_vocabulary_and_another_image_pad_are_errors(other: Path) -> None:
    def change(config: Any) -> None:
        config["text_config"]["vocab_size"] = 20
        config["image_token_id"] = 5

    edit(other / "config.json", change)
    small, pad = [finding.what for finding in check_tokens(pair(other))]
    assert small.endswith("and the teacher's model has 20")
    assert pad.endswith(": a picture stands at id 6 for the one and 5 for the other")


def test_a_pad_that_is_an_ordinary_token_is_an_error(tmp_path: Path, other: Path) -> None:
    edit(other / "config.json", lambda config: config.update(image_token_id=40))
    (finding,) = check_tokens(launch(student=other, teacher=teacher(other)))
    assert "its config has the picture's pad at id 40, which is " in finding.what


def test_another_template_is_a_warning(other: Path) -> None:
    (other / "chat_template.jinja").write_text("{{ messages }}")
    (finding,) = check_tokens(pair(other))
    assert not finding.fatal
    assert "different chat templates" in finding.what


def test_a_tokenizer_of_another_form_is_left_to_the_doctor(other: Path) -> None:
    (other / "tokenizer.json").unlink()
    assert read_tokens(other) is None
    assert list(check_tokens(pair(other))) == []


def test_a_teacher_in_the_trainer_is_compared_too(other: Path) -> None:
    edit(other / "tokenizer_config.json", lambda config: config.update(eos_token="<|endoftext|>"))
    flags = (
        "--use-opd",
        "--opd-type",
        "megatron",
        "--train-backend",
        "megatron",
        "--opd-teacher-load",
        str(other),
    )
    (finding,) = check_tokens(launch(*flags, student=STUDENT))
    assert "the end of turn" in finding.what
