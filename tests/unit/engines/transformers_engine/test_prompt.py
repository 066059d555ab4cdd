"""Expansion of pads: what is served, what is dropped, what is refused."""

import numpy as np
import pytest
import torch

from slime.engines.transformers_engine.errors import InternalFault, InvalidValue
from slime.engines.transformers_engine.images import Pixels
from slime.engines.transformers_engine.prompt import build_prompt, reported_ids, tokenize
from tests.unit.engines.transformers_engine.support import PAD, load_parts


def pixels(height: int, width: int, name: bytes = b"x") -> Pixels:
    return Pixels(name, torch.zeros(height * width, 1536), (1, height, width))


def test_one_pad_becomes_the_pictures_tokens_and_positions():
    _, _, vision = load_parts()
    prompt = build_prompt([5, PAD, 6], [pixels(4, 6)], vision)
    assert prompt.ids.tolist() == [5, *[PAD] * 6, 6]
    assert prompt.positions.tolist() == [
        [0, 1, 1, 1, 1, 1, 1, 4],
        [0, 1, 1, 1, 2, 2, 2, 4],
        [0, 1, 2, 3, 1, 2, 3, 4],
    ]
    assert prompt.next_position == 5
    assert prompt.image_tokens == 6
    assert reported_ids(prompt.target_ids, vision.vocab_size) == [5, *[0] * 6, 6]


def test_without_a_picture_a_pad_is_a_token():
    _, _, vision = load_parts()
    prompt = build_prompt([5, PAD, PAD], [], vision)
    assert (prompt.length, prompt.image_tokens) == (3, 0)
    assert reported_ids(prompt.target_ids, vision.vocab_size) == [5, PAD, PAD]


def test_a_pad_at_the_start_and_a_surplus_picture_are_ignored():
    _, _, vision = load_parts()
    assert build_prompt([PAD, 5], [pixels(4, 4)], vision).image_tokens == 0
    kept = build_prompt([5, PAD], [pixels(4, 4, b"a"), pixels(4, 4, b"b")], vision)
    assert [image.digest for image in kept.images] == [b"a"]


@pytest.mark.parametrize("ids", [[5, PAD, PAD], [5, PAD, 6, PAD], [5, PAD, 347]])
def test_expanded_sampled_and_video_pads_crash_as_there(ids):
    _, _, vision = load_parts()
    with pytest.raises(InternalFault):
        build_prompt(ids, [pixels(4, 4)], vision)


@pytest.mark.parametrize("bad", [-1, 384])
def test_ids_outside_the_vocabulary_are_refused(bad):
    _, _, vision = load_parts()
    with pytest.raises(InvalidValue, match=f"holds {bad}, outside"):
        build_prompt([5, bad], [], vision)


def test_the_last_id_is_reported_as_zero():
    assert reported_ids(np.array([1, 382, 383]), 384) == [1, 382, 0]


@pytest.mark.parametrize(
    "placeholder", ["<|vision_start|><|image_pad|><|image_pad|><|vision_end|>", "<image>"]
)
def test_text_placeholders_become_one_pad_each(placeholder):
    tokenizer, _, vision = load_parts()
    ids = tokenize(f"a{placeholder}b", 1, tokenizer, vision)
    assert ids.count(PAD) == 1
    with pytest.raises(InvalidValue, match="2 image placeholders but 1 image"):
        tokenize(placeholder * 2, 1, tokenizer, vision)


def test_different_pictures_make_different_keys():
    _, _, vision = load_parts()
    one, other = (build_prompt([5, PAD], [pixels(4, 4, name)], vision) for name in (b"a", b"b"))
    assert one.key != other.key
