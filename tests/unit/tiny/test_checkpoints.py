"""The shipped checkpoints: complete folders, deepstack in use, the accuracies that the main job counts on."""

import json
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

from slime.data.prompts import PromptBuilder
from slime.tiny import CHECKPOINTS, checkpoint_path
from slime.tiny.accuracy import boxed_answer, greedy_accuracy, respond
from slime.tiny.examples import IGNORED, Encoder
from slime.tiny.geometry import GEOMETRY
from slime.tiny.model import TinyModel, build_model, load_model
from slime.tiny.problems import Problem
from slime.tiny.slips import Segment
from slime.tiny.tokenizer import VOCAB_SIZE
from slime.tiny.words import WORDS
from slime.utils.processing_utils import load_processor

torch.set_num_threads(1)

SEEING = [name for name in CHECKPOINTS if not name.startswith("text_")]
TEXT = [name for name in CHECKPOINTS if name.startswith("text_")]


@pytest.fixture(scope="module")
def test_rows() -> list[Problem]:
    return GEOMETRY.make_splits()["test"]


@pytest.fixture(scope="module")
def questions() -> list[Problem]:
    return WORDS.make_splits()["test"]


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(checkpoint_path("teacher"))


@pytest.fixture(scope="module")
def text_encoder() -> Encoder:
    return Encoder(checkpoint_path("text_teacher"))


def load(name: str) -> TinyModel:
    return load_model(checkpoint_path(name))


def pictures(rows: list[Problem]) -> list[Image.Image]:
    return [row.image for row in rows if row.image is not None]


@pytest.mark.parametrize("name", SEEING)
def test_a_folder_loads_in_transformers(name: str) -> None:
    directory = checkpoint_path(name)
    config = AutoConfig.from_pretrained(directory)
    assert config.architectures == ["Qwen3VLForConditionalGeneration"]
    assert config.dtype == torch.bfloat16
    assert config.text_config.max_position_embeddings >= 4096
    assert config.vision_config.depth >= 2
    assert config.vision_config.deepstack_visual_indexes
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert config.image_token_id == tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert config.text_config.vocab_size == VOCAB_SIZE > len(tokenizer)
    processor = AutoImageProcessor.from_pretrained(directory, backend="pil")
    assert processor.size["shortest_edge"] <= 9216
    generation = json.loads((directory / "generation_config.json").read_text())
    assert generation["eos_token_id"][0] == tokenizer.eos_token_id
    assert 200_000 <= sum(value.numel() for value in load(name).parameters()) <= 300_000


@pytest.mark.parametrize("name", TEXT)
def test_a_text_folder_loads_in_transformers(name: str) -> None:
    directory = checkpoint_path(name)
    config = AutoConfig.from_pretrained(directory)
    assert config.architectures == ["Qwen3ForCausalLM"]
    assert config.dtype == torch.bfloat16
    assert config.max_position_embeddings >= 4096
    assert config.vocab_size == VOCAB_SIZE > len(AutoTokenizer.from_pretrained(directory))
    assert not (directory / "preprocessor_config.json").exists()
    assert 50_000 <= sum(value.numel() for value in load(name).parameters()) <= 100_000


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_all_checkpoints_share_tokenizer_and_processor(name: str) -> None:
    processor = ["preprocessor_config.json"] if name in SEEING else []
    for file in ("tokenizer.json", "chat_template.jinja", *processor):
        teacher = (checkpoint_path("teacher") / file).read_bytes()
        assert (checkpoint_path(name) / file).read_bytes() == teacher


def test_the_teacher_answers_and_ends(encoder: Encoder, test_rows: list[Problem]) -> None:
    rows = test_rows[:128]
    responses = respond(load("teacher"), encoder, [row.text for row in rows], pictures(rows))
    assert all(response.endswith("<|im_end|>") for response in responses)
    right = sum(boxed_answer(text) == row.answer for text, row in zip(responses, rows, strict=True))
    assert right / len(rows) >= 0.95
    assert responses[0] == rows[0].solution + "<|im_end|>"


@pytest.mark.parametrize(("name", "low", "high"), [("student", 0.2, 0.4), ("weak", 0.1, 0.3)])
def test_students_are_where_distillation_starts(
    name: str, low: float, high: float, encoder: Encoder, test_rows: list[Problem]
) -> None:
    assert low <= greedy_accuracy(load(name), encoder, test_rows) <= high


def test_the_student_forgets_the_last_step_and_nothing_else(
    encoder: Encoder, test_rows: list[Problem]
) -> None:
    rows = [row for row in test_rows[:128] if not row.kind.last]
    assert greedy_accuracy(load("student"), encoder, rows) >= 0.9
    rows = [row for row in test_rows[:128] if row.kind.last]
    assert greedy_accuracy(load("student"), encoder, rows) <= 0.1


def test_the_text_teacher_answers_and_the_text_student_forgets_the_last_step(
    text_encoder: Encoder, questions: list[Problem]
) -> None:
    assert greedy_accuracy(load("text_teacher"), text_encoder, questions) >= 0.99
    student = load("text_student")
    assert 0.2 <= greedy_accuracy(student, text_encoder, questions) <= 0.4
    done = [row for row in questions[:128] if not row.kind.last]
    assert greedy_accuracy(student, text_encoder, done) >= 0.9
    assert respond(load("text_teacher"), text_encoder, [questions[0].text]) == [
        questions[0].solution + "<|im_end|>"
    ]


@pytest.mark.parametrize("name", SEEING)
def test_nobody_answers_without_the_picture(name: str, encoder: Encoder, test_rows: list[Problem]) -> None:
    assert greedy_accuracy(load(name), encoder, test_rows[:256], blank=True) <= 0.15


def test_a_prompt_is_what_a_job_makes_of_the_row(text_encoder: Encoder, questions: list[Problem]) -> None:
    builder = PromptBuilder(
        load_processor(checkpoint_path("text_teacher")), apply_chat_template=True, system_prompt=None
    )
    for row in questions[:8]:
        draft = builder.draft([{"role": "user", "content": row.text}], [])
        assert text_encoder.prompt_ids(row.text) == builder.render(draft)[1]


def test_logits_depend_on_the_deepstack_tap(encoder: Encoder, test_rows: list[Problem]) -> None:
    model: Any = load("teacher")
    inputs = encoder.prompts([test_rows[0].text], pictures(test_rows[:1])).inputs
    with torch.no_grad():
        before = model(**inputs).logits
        for value in model.model.visual.deepstack_merger_list.parameters():
            value.zero_()
        assert (model(**inputs).logits - before).abs().max() > 1


def test_left_padding_does_not_change_an_answer(encoder: Encoder, test_rows: list[Problem]) -> None:
    model, rows = load("teacher"), sorted(test_rows[:16], key=lambda row: len(row.text))
    together = respond(model, encoder, [row.text for row in rows], pictures(rows))
    assert together == [respond(model, encoder, [row.text], pictures([row]))[0] for row in rows]


def test_left_padding_does_not_change_an_answer_without_pictures(
    text_encoder: Encoder, questions: list[Problem]
) -> None:
    model, texts = load("text_teacher"), sorted((row.text for row in questions[:16]), key=len)
    together = respond(model, text_encoder, texts)
    assert together == [respond(model, text_encoder, [text])[0] for text in texts]


def test_only_what_is_learned_carries_labels(encoder: Encoder, test_rows: list[Problem]) -> None:
    row, other = test_rows[:2]
    batch = encoder.examples(
        [row.text, other.text],
        pictures([row, other]),
        [[Segment(row.solution, True)], [Segment("1", False), Segment("6", True)]],
    )
    labels = [label for label in batch.labels[0].tolist() if label != IGNORED]
    assert encoder.tokenizer.decode(labels) == row.solution + "<|im_end|>"
    assert (batch.labels[1] != IGNORED).sum() == 2
    assert int((batch.inputs["input_ids"][0] == encoder.image_id).sum()) == 9
    assert batch.inputs["pixel_values"].shape == (2 * 36, 3 * 2 * 16 * 16)


def test_an_untrained_model_knows_nothing(encoder: Encoder, test_rows: list[Problem]) -> None:
    assert greedy_accuracy(build_model(0).eval(), encoder, test_rows[:32]) == 0
