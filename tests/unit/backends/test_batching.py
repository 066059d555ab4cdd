"""Micro-batches: rows, flat response arrays, pictures."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image

from slime.backends.batching import MicroBatchBuilder, TrainSample
from slime.utils.processing_utils import load_processor
from tests.fakes.tiny_model import make_picture, save_vision_model


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_processor(save_vision_model(tmp_path_factory.mktemp("model")))


def sample(index: int, tokens: list[int], response: int, **parts: Any) -> TrainSample:
    return TrainSample(
        index=index,
        tokens=torch.tensor(tokens),
        response_length=response,
        loss_mask=torch.ones(response),
        advantages=torch.full((response,), float(index)),
        **parts,
    )


def test_packed_samples_lie_end_to_end(processor: Any) -> None:
    samples = [sample(4, [11, 12, 13], 2), sample(9, [21, 22, 23, 24, 25], 1)]
    batch = MicroBatchBuilder(processor, {}).build(samples)
    assert batch.lengths == (3, 5)
    assert batch.input_ids.tolist() == [[11, 12, 13, 21, 22, 23, 24, 25]]
    assert batch.attention_mask.tolist() == [[1] * 8]
    assert batch.response_ids.tolist() == [12, 13, 25]
    assert batch.response_positions.tolist() == [0, 1, 6]
    assert batch.sample_rows.tolist() == [0, 0, 1]


def test_rows_are_padded_right_and_responses_lie_flat(processor: Any) -> None:
    samples = [sample(4, [11, 12, 13], 2), sample(9, [21, 22, 23, 24, 25], 1)]
    batch = MicroBatchBuilder(processor, {}, packed=False).build(samples)
    assert batch.lengths is None
    assert batch.sample_indices == (4, 9)
    assert batch.input_ids.tolist() == [[11, 12, 13, 0, 0], [21, 22, 23, 24, 25]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0, 0], [1] * 5]
    assert batch.response_ids.tolist() == [12, 13, 25]
    assert batch.response_positions.tolist() == [0, 1, 8]
    assert batch.sample_rows.tolist() == [0, 0, 1]
    assert batch.advantages.tolist() == [4, 4, 9]
    assert batch.pixel_values is None
    assert batch.rollout_log_probs is None
    assert batch.image_token_mask.sum() == 0


def test_pads_expand_and_each_picture_is_processed_once(processor: Any) -> None:
    pad = processor.image_token_id
    hashes, pictures, grids = [], {}, []
    for seed in (0, 1):
        sha256, png, grid = make_picture(seed)
        hashes.append(sha256)
        grids.append(grid)
        pictures[sha256] = png
    one = {"image_hashes": (hashes[1],), "image_grid_thw": (grids[1],)}
    both = {"image_hashes": tuple(hashes), "image_grid_thw": tuple(grids)}
    samples = [
        sample(0, [7, pad, 8, 9], 2, **one),
        sample(1, [pad, pad, 9], 1, **both),
        sample(2, [50, 51], 1),
    ]
    builder = MicroBatchBuilder(processor, pictures, packed=False)
    batch = builder.build(samples)
    short, long = (t * h * w // 4 for t, h, w in grids)
    assert batch.input_ids.shape == (3, short + long + 1)
    assert samples[1].expanded_length(processor.merge_size) == short + long + 1
    assert batch.image_token_mask.sum(dim=1).tolist() == [long, short + long, 0]
    assert batch.picture_rows == (0, 1, 0)
    assert batch.picture_grids is not None
    assert batch.picture_grids.tolist() == [list(grids[1]), list(grids[0])]
    assert batch.pixel_values is not None
    assert batch.pixel_values.shape == (4 * (short + long), 3 * 2 * 16 * 16)
    assert batch.response_ids.tolist() == [8, 9, 9, 51]
    packed = MicroBatchBuilder(processor, pictures).build(samples)
    assert packed.lengths == (3 + long, short + long + 1, 2)
    assert packed.image_token_mask[0].tolist() == batch.image_token_mask[batch.attention_mask == 1].tolist()
    assert packed.picture_rows == batch.picture_rows


def test_a_shards_pictures_are_processed_once(processor: Any) -> None:
    sha256, png, grid = make_picture(0)
    calls = 0

    class Counting:
        tokenizer = processor.tokenizer
        image_token_id, merge_size = processor.image_token_id, processor.merge_size

        @staticmethod
        def image_processor(**options: Any) -> Any:
            nonlocal calls
            calls += 1
            return processor.image_processor(**options)

    builder = MicroBatchBuilder(Counting(), {sha256: png})
    seen = sample(0, [processor.image_token_id, 8], 1, image_hashes=(sha256,), image_grid_thw=(grid,))
    batches = [builder.build([seen, seen]), builder.build([seen])]
    assert calls == 1
    assert batches[0].pictures[0] is batches[1].pictures[0], "and their pixels exist once"


def test_the_pixels_are_the_processors_own(processor: Any) -> None:
    sha256, png, grid = make_picture(2)
    pad = processor.image_token_id
    batch = MicroBatchBuilder(processor, {sha256: png}).build(
        [sample(0, [pad, 8], 1, image_hashes=(sha256,), image_grid_thw=(grid,))]
    )
    expected = processor.image_processor(images=[Image.open(io.BytesIO(png))], return_tensors="pt")
    assert batch.pixel_values is not None
    assert torch.equal(batch.pixel_values, expected["pixel_values"])


def test_no_samples_give_a_dummy_with_empty_responses(processor: Any) -> None:
    batch = MicroBatchBuilder(processor, {}).build([])
    assert batch.input_ids.shape == (1, 2)
    assert batch.lengths == (2,)
    assert batch.attention_mask.all()
    assert MicroBatchBuilder(processor, {}, packed=False).build([]).input_ids.shape == (1, 2)
    for name in ("response_ids", "response_positions", "loss_mask", "advantages"):
        assert getattr(batch, name).shape == (0,)
    assert batch.teacher_log_probs is not None
    assert batch.rollout_log_probs is not None


def test_a_log_prob_that_one_sample_lacks_is_absent(processor: Any) -> None:
    whole = sample(0, [1, 2], 1, rollout_log_probs=torch.zeros(1), teacher_log_probs=torch.ones(1))
    batch = MicroBatchBuilder(processor, {}).build([whole, replace(whole, rollout_log_probs=None)])
    assert batch.rollout_log_probs is None
    assert batch.teacher_log_probs is not None
    assert batch.teacher_log_probs.tolist() == [1, 1]


def test_a_response_without_prompt_is_refused(processor: Any) -> None:
    with pytest.raises(ValueError, match="sample 3 has 2 tokens, 2 of them response"):
        MicroBatchBuilder(processor, {}).build([sample(3, [1, 2], 2)])


def test_a_missing_picture_is_named(processor: Any) -> None:
    lost = sample(3, [processor.image_token_id, 2], 1, image_hashes=("ab" * 32,), image_grid_thw=((1, 4, 4),))
    with pytest.raises(ValueError, match="sample 3 needs picture abababababab…"):
        MicroBatchBuilder(processor, {}).build([lost])


def test_another_grid_than_the_processors_is_refused(processor: Any) -> None:
    sha256, png, grid = make_picture(0)
    wrong = sample(3, [processor.image_token_id, 2], 1, image_hashes=(sha256,), image_grid_thw=((1, 2, 2),))
    with pytest.raises(ValueError, match=r"sample 3 carries the grid \(1, 2, 2\)") as error:
        MicroBatchBuilder(processor, {sha256: png}).build([wrong])
    assert str(grid) in str(error.value)


def test_a_sampled_pad_is_refused(processor: Any) -> None:
    sha256, png, grid = make_picture(0)
    pad = processor.image_token_id
    with pytest.raises(ValueError, match="2 image pads"):
        MicroBatchBuilder(processor, {sha256: png}).build(
            [sample(0, [pad, 2, pad], 2, image_hashes=(sha256,), image_grid_thw=(grid,))]
        )


def test_a_sampled_pad_in_a_text_sample_is_refused(processor: Any) -> None:
    with pytest.raises(ValueError, match="1 image pads"):
        MicroBatchBuilder(processor, {}).build([sample(0, [2, processor.image_token_id], 1)])
