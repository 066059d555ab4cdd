"""Whether models and checkpoints are whole."""

from __future__ import annotations

from pathlib import Path

from slime.preflight.checkpoints import check_checkpoints
from slime.preflight.launch import Download
from slime.tiny.paths import checkpoint_path
from tests.fakes.launches import launch, teacher, write_model


def test_whole_models_are_no_news(tmp_path: Path) -> None:
    whole = launch(student=checkpoint_path("student"), teacher=teacher(checkpoint_path("teacher")))
    assert list(check_checkpoints(whole)) == []
    assert list(check_checkpoints(launch(student="owner/name"))) == [], "a hub name is fetched later"


def test_every_damage_of_every_model_is_told(tmp_path: Path) -> None:
    student = write_model(tmp_path / "student", {"a": [10]})
    (student / "config.json").write_text("{")
    (student / "other.safetensors").write_bytes(b"version https://git-lfs.github.com")
    empty = tmp_path / "teacher"
    empty.mkdir()
    findings = list(check_checkpoints(launch(student=student, teacher=teacher(empty))))
    assert all(finding.fatal for finding in findings)
    config, weights, no_config, no_weights = [finding.what for finding in findings]
    assert config.startswith(f"--hf-checkpoint {student}: its config.json cannot be read")
    assert "other.safetensors is no safetensors file" in weights
    assert no_config == f"SLIME_SCRIPT_TEACHER_MODEL {empty}: it has no config.json"
    assert no_weights.endswith("it has no *.safetensors file")
    coming = launch(student=student, downloads=(Download("owner/student", student, "model"),))
    assert list(check_checkpoints(coming)) == []


def test_a_checkpoint_to_go_on_from_must_be_there(tmp_path: Path) -> None:
    student = checkpoint_path("student")
    (finding,) = check_checkpoints(launch("--load", str(tmp_path), student=student))
    assert finding.what.startswith(f"--load {tmp_path}: neither a checkpoint")
