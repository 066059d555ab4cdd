"""The models that a run names, as folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from slime.arguments import parse_args
from slime.local_models import local_model, with_local_models

HUB = "Qwen/Qwen3-VL-4B-Thinking"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name: f"/cache/{name}")


@pytest.mark.usefixtures("hub")
def test_a_model_is_a_folder_or_comes_from_the_hub(tmp_path: Path) -> None:
    assert local_model(str(tmp_path), "--hf-checkpoint") == tmp_path
    assert local_model(HUB, "--hf-checkpoint") == Path(f"/cache/{HUB}")


@pytest.mark.usefixtures("hub")
def test_every_model_of_a_run_becomes_a_folder(tmp_path: Path) -> None:
    inner = ("--use-opd", "--opd-type", "megatron", "--train-backend", "megatron", "--rm-type", "math")
    reference = ("--kl-loss-coef", "0.1", "--ref-load", HUB)
    more = ("--hf-checkpoint", str(tmp_path), "--prompt-data", "p", "--num-rollout", "1")
    args = with_local_models(parse_args([*inner, "--opd-teacher-load", HUB, *reference, *more]))
    assert (args.hf_checkpoint, args.ref_load) == (str(tmp_path), f"/cache/{HUB}")
    assert args.opd_teacher_load == f"/cache/{HUB}"
    args = with_local_models(parse_args(["--rm-type", "math", *more]))
    assert (args.ref_load, args.opd_teacher_load) == (None, None)


@pytest.mark.parametrize("name", ["no/such/folder", "nobody/nothing"])
def test_a_model_that_is_nowhere_is_named(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"--ref-load {name}"):
        local_model(name, "--ref-load")
