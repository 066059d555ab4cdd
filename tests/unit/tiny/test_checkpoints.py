"""The shipped checkpoints: complete folders, deepstack in use, the accuracies that the main job counts on."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, Qwen3VLForConditionalGeneration

from slime.tiny import CHECKPOINTS, checkpoint_path
from slime.tiny.accuracy import boxed_answer, greedy_accuracy, respond
from slime.tiny.examples import IGNORED, Encoder
from slime.tiny.geometry import Problem, make_splits
from slime.tiny.model import build_model
from slime.tiny.slips import Segment
from slime.tiny.tokenizer import VOCAB_SIZE

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def test_rows() -> list[Problem]:
    return make_splits()["test"]


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(checkpoint_path("teacher"))


def load(name: str) -> Qwen3VLForConditionalGeneration:
    return Qwen3VLForConditionalGeneration.from_pretrained(checkpoint_path(name), dtype=torch.float32).eval()


@pytest.mark.parametrize("name", CHECKPOINTS)
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


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_all_checkpoints_share_tokenizer_and_processor(name: str) -> None:
    for file in ("tokenizer.json", "chat_template.jinja", "preprocessor_config.json"):
        teacher = (checkpoint_path("teacher") / file).read_bytes()
        assert (checkpoint_path(name) / file).read_bytes() == teacher


def test_the_teacher_answers_and_ends(encoder: Encoder, test_rows: list[Problem]) -> None:
    rows = test_rows[:128]
    responses = respond(load("teacher"), encoder, [row.text for row in rows], [row.image for row in rows])
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


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_nobody_answers_without_the_picture(name: str, encoder: Encoder, test_rows: list[Problem]) -> None:
    assert greedy_accuracy(load(name), encoder, test_rows[:256], blank=True) <= 0.15


def test_logits_depend_on_the_deepstack_tap(encoder: Encoder, test_rows: list[Problem]) -> None:
    model = load("teacher")
    inputs = encoder.prompts([test_rows[0].text], [test_rows[0].image]).inputs
    with torch.no_grad():
        before = model(**inputs).logits
        for value in model.model.visual.deepstack_merger_list.parameters():
            value.zero_()
        assert (model(**inputs).logits - before).abs().max() > 1


def test_left_padding_does_not_change_an_answer(encoder: Encoder, test_rows: list[Problem]) -> None:
    model, rows = load("teacher"), sorted(test_rows[:16], key=lambda row: len(row.text))
    together = respond(model, encoder, [row.text for row in rows], [row.image for row in rows])
    assert together == [respond(model, encoder, [row.text], [row.image])[0] for row in rows]


def test_only_what_is_learned_carries_labels(encoder: Encoder, test_rows: list[Problem]) -> None:
    row, other = test_rows[:2]
    batch = encoder.examples(
        [row.text, other.text],
        [row.image, other.image],
        [[Segment(row.solution, True)], [Segment("1", False), Segment("6", True)]],
    )
    labels = [label for label in batch.labels[0].tolist() if label != IGNORED]
    assert encoder.tokenizer.decode(labels) == row.solution + "<|im_end|>"
    assert (batch.labels[1] != IGNORED).sum() == 2
    assert int((batch.inputs["input_ids"][0] == encoder.image_id).sum()) == 9
    assert batch.inputs["pixel_values"].shape == (2 * 36, 3 * 2 * 16 * 16)


def test_an_untrained_model_knows_nothing(encoder: Encoder, test_rows: list[Problem]) -> None:
    assert greedy_accuracy(build_model(0).eval(), encoder, test_rows[:32]) == 0
