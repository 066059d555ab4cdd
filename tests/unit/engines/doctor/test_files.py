"""The teacher's files beside the student's: what differs is named before anything is sent."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slime.engines.doctor.files import (
    CheckpointFiles,
    compare_image_processors,
    compare_templates,
    compare_vocabularies,
    fingerprint,
    read_checkpoint,
    weight_files,
)
from slime.engines.doctor.material import Material
from slime.engines.doctor.outcome import Fault
from slime.tiny.paths import checkpoint_path

STUDENT, TEACHER = checkpoint_path("student"), checkpoint_path("teacher")


@pytest.fixture(scope="module")
def material() -> Material:
    return Material(str(STUDENT))


@pytest.fixture
def changed(tmp_path: Path) -> Callable[..., CheckpointFiles]:
    """Return the teacher's files with one file rewritten."""

    def change(name: str, rewrite: Callable[[str], str]) -> CheckpointFiles:
        folder = tmp_path / "teacher"
        shutil.copytree(TEACHER, folder)
        (folder / name).write_text(rewrite((folder / name).read_text()))
        files = read_checkpoint(str(folder))
        assert files is not None
        return files

    return change


def json_edit(**values: Any) -> Callable[[str], str]:
    return lambda text: json.dumps(json.loads(text) | values)


def test_the_shipped_pair_agrees(material: Material) -> None:
    teacher = read_checkpoint(str(TEACHER))
    assert teacher is not None
    compare_vocabularies(material, teacher)
    assert not compare_templates(material, teacher).warning
    assert not compare_image_processors(material, teacher).warning


@pytest.mark.parametrize("path", ["/no/such/folder", "some/teacher", "not a name at all"])
def test_what_is_not_here_is_none(path: str) -> None:
    assert read_checkpoint(path) is None
    assert weight_files(path) == []


def swap_tokens(first: str, second: str) -> Callable[[str], str]:
    def swap(text: str) -> str:
        tokenizer = json.loads(text)
        vocab = tokenizer["model"]["vocab"]
        vocab[first], vocab[second] = vocab[second], vocab[first]
        return json.dumps(tokenizer)

    return swap


def test_another_vocabulary_is_named(material: Material, changed: Callable[..., CheckpointFiles]) -> None:
    with pytest.raises(Fault, match="2 of 129 ids") as caught:
        compare_vocabularies(material, changed("tokenizer.json", swap_tokens("7", "9")))
    assert caught.value.name == "vocabulary-differs"


def test_other_special_tokens_are_named(material: Material, changed: Callable[..., CheckpointFiles]) -> None:
    def rename(text: str) -> str:
        return text.replace("<|vision_pad|>", "<|other|>")

    with pytest.raises(Fault, match="vision_pad") as caught:
        compare_vocabularies(material, changed("tokenizer.json", rename))
    assert caught.value.name == "special-tokens-differ"


def test_another_end_of_turn_is_named(material: Material, changed: Callable[..., CheckpointFiles]) -> None:
    with pytest.raises(Fault, match="end of turn") as caught:
        compare_vocabularies(material, changed("tokenizer_config.json", json_edit(eos_token="<|endoftext|>")))
    assert caught.value.name == "special-tokens-differ"


def test_an_embedding_too_small_for_the_student_is_named(
    material: Material, changed: Callable[..., CheckpointFiles]
) -> None:
    def shrink(text: str) -> str:
        config = json.loads(text)
        config["text_config"]["vocab_size"] = 100
        return json.dumps(config)

    with pytest.raises(Fault, match="up to 128") as caught:
        compare_vocabularies(material, changed("config.json", shrink))
    assert caught.value.name == "vocabulary-small"


def test_a_template_that_writes_the_probe_otherwise_is_named(
    material: Material, changed: Callable[..., CheckpointFiles]
) -> None:
    teacher = changed("chat_template.jinja", lambda text: text.replace("assistant\\n", "assistant\\n<think>"))
    with pytest.raises(Fault) as caught:
        compare_templates(material, teacher)
    assert caught.value.name == "template-differs"


def test_a_template_that_differs_elsewhere_is_a_warning(
    material: Material, changed: Callable[..., CheckpointFiles]
) -> None:
    teacher = changed("chat_template.jinja", lambda text: "{#- other -#}" + text)
    assert compare_templates(material, teacher).warning == "template-differs-elsewhere"


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ({"image_mean": [0.4, 0.5, 0.5]}, "image_mean"),
        ({"image_std": [0.4, 0.5, 0.5]}, "image_std"),
        ({"merge_size": 4}, "merge_size"),
        ({"size": {"shortest_edge": 4096, "longest_edge": 65536}}, "--image-max-pixels 65536"),
        ({"size": {"shortest_edge": 9216, "longest_edge": 262144}}, "--image-min-pixels 9216"),
    ],
)
def test_another_image_processor_is_named(
    material: Material, changed: Callable[..., CheckpointFiles], values: dict[str, Any], shown: str
) -> None:
    with pytest.raises(Fault) as caught:
        compare_image_processors(material, changed("preprocessor_config.json", json_edit(**values)))
    assert caught.value.name == "processor-differs"
    assert shown in caught.value.message + caught.value.remedy


def test_limits_of_the_run_within_the_teachers_are_well(changed: Callable[..., CheckpointFiles]) -> None:
    narrow = Material(str(STUDENT), min_pixels=9216, max_pixels=65536)
    teacher = changed(
        "preprocessor_config.json", json_edit(size={"shortest_edge": 9216, "longest_edge": 65536})
    )
    compare_image_processors(narrow, teacher)


def test_the_fingerprint_tells_weights_apart(tmp_path: Path) -> None:
    assert fingerprint(weight_files(str(TEACHER))) == fingerprint(weight_files(str(TEACHER)))
    assert fingerprint(weight_files(str(TEACHER))) != fingerprint(weight_files(str(STUDENT)))
    shutil.copytree(TEACHER, tmp_path / "copy")
    copied = weight_files(str(tmp_path / "copy"))
    assert fingerprint(copied) == fingerprint(weight_files(str(TEACHER)))
    data = bytearray(copied[0].read_bytes())
    data[-5] ^= 1
    copied[0].write_bytes(bytes(data))
    assert fingerprint(copied) != fingerprint(weight_files(str(TEACHER)))
