"""What is compared without a server: large students, text-only ones, scores that should be equal."""

import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from slime.engines.doctor import sameness
from slime.engines.doctor.files import read_checkpoint
from slime.engines.doctor.material import Material
from slime.engines.doctor.sameness import local_log_probs, same_model
from slime.engines.doctor.state import Options, State, difference
from slime.engines.doctor.teacher import Teacher
from slime.tiny.paths import checkpoint_path
from tests.contracts.reference import MODEL, Reference

STUDENT, TEACHER = str(checkpoint_path("student")), str(checkpoint_path("teacher"))


def state_of(student: str, teacher: str | None, **info: Any) -> State:
    state = State(Teacher("http://127.0.0.1:1", 1.0), Options(), Material(student), with_student=True)
    state.files = read_checkpoint(teacher) if teacher else None
    state.model_info = info
    return state


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every student is too large to be run."""
    monkeypatch.setattr(sameness, "SMALL_BYTES", 0)


@pytest.mark.usefixtures("large")
async def test_a_large_student_is_compared_by_its_weight_files() -> None:
    assert (await same_model(state_of(STUDENT, STUDENT))).warning == "same-weights"
    found = await same_model(state_of(STUDENT, TEACHER))
    assert not found.warning
    assert "KL not measured" in found.message


@pytest.mark.usefixtures("large")
async def test_a_large_student_whose_teacher_is_elsewhere_is_compared_by_name() -> None:
    assert (await same_model(state_of(STUDENT, None, model_path=STUDENT))).warning == "same-weights"
    found = await same_model(state_of(STUDENT, None, model_path="some/teacher"))
    assert found.skipped
    assert "not compared" in found.message


def test_the_student_here_scores_as_transformers_does() -> None:
    material = Material(STUDENT)
    picture = material.picture()
    response = material.response(len(material.tokenizer))
    probe = material.probe([picture], response, material.facts.vocab_size)
    ours = torch.tensor(local_log_probs(material, [picture], [probe, probe]))
    expected = Reference(Path(STUDENT)).log_probs([*probe.prompt, *response], [picture.image], len(response))
    torch.testing.assert_close(ours, torch.cat([expected, expected]), atol=1e-4, rtol=0)


def test_two_teachers_at_once_load_the_student_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two overlapping loads would leave transformers without weight tying for the rest of the process."""
    sameness._student.cache_clear()
    loads: list[float] = []
    load = AutoModelForImageTextToText.from_pretrained

    def slow(*args: Any, **options: Any) -> Any:
        loads.append(time.monotonic())
        time.sleep(0.3)
        return load(*args, **options)

    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", slow)
    tie_weights = PreTrainedModel.tie_weights
    material = Material(STUDENT)
    picture = material.picture()
    probe = material.probe([picture], material.response(8), material.facts.vocab_size)
    with ThreadPoolExecutor(4) as pool:
        scores = list(pool.map(lambda _: local_log_probs(material, [picture], [probe]), range(4)))
    assert len(loads) == 1
    assert PreTrainedModel.tie_weights is tie_weights
    assert all(score == pytest.approx(scores[0], abs=1e-5) for score in scores)


async def test_a_student_that_does_not_load_is_a_warning(tmp_path: Path) -> None:
    broken = tmp_path / "student"
    shutil.copytree(STUDENT, broken)
    (broken / "model.safetensors").write_bytes(b"no weights")
    state = state_of(str(broken), TEACHER)
    state.samples = [(state.own.probe([], (20, 21), 130), [-1.0, -2.0])]
    assert (await same_model(state)).warning == "student-unrun"


@pytest.fixture
def text_model(tmp_path: Path) -> str:
    """Make a language model without vision, of random weights."""
    config = Qwen3Config(
        vocab_size=384, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=512, eos_token_id=342,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "text")
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(tmp_path / "text")
    return str(tmp_path / "text")


def test_a_text_only_student_makes_text_probes(text_model: str) -> None:
    material = Material(text_model)
    assert not material.sees
    probe = material.probe([], material.response(len(material.tokenizer)), 384)
    assert probe.images == ()
    assert probe.prompt_length == len(probe.prompt)
    scores = local_log_probs(material, [], [probe])
    assert len(scores) == len(probe.response)
    assert max(scores) < 0


def test_the_difference_of_rows() -> None:
    assert difference([-1.0, -2.0], [-1.5, -2.0]) == (0.25, 0.5)
    assert difference([], []) == (0.0, 0.0)
