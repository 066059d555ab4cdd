"""Rows that ranks can share: nothing is lost, nothing is twice, and positions are transformers' own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from slime.backends.batching import MicroBatch, MicroBatchBuilder
from slime.backends.megatron.layout import Row, Sharing, lay_out, lengths_of, row_tokens
from slime.tiny.paths import checkpoint_path
from slime.trainer import build_shards
from slime.utils.processing_utils import load_processor
from tests.fakes.tiny_model import make_samples
from tests.fakes.training import DISTILL, ONE_BATCH, make_args

MODEL = checkpoint_path("student")


@pytest.fixture(scope="module")
def batches() -> dict[bool, MicroBatch]:
    """The same samples packed and padded."""
    samples, pictures = make_samples(6)
    shard = build_shards(make_args(MODEL, *DISTILL, *ONE_BATCH, samples=6), samples, pictures, 1, 0)[0]
    processor = load_processor(MODEL)
    return {
        packed: MicroBatchBuilder(processor, pictures, packed=packed).build(shard.samples)
        for packed in (True, False)
    }


def rows_of(batch: MicroBatch, context: int, sequence: int, tokens: int = 0) -> list[Row]:
    """Return what each context-parallel rank has."""
    return [
        lay_out(
            batch,
            Sharing(context=context, context_rank=rank, sequence=sequence),
            merge_size=2,
            tokens=tokens,
        )
        for rank in range(context)
    ]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("context", "sequence", "tokens"), [(1, 1, 0), (1, 4, 0), (2, 1, 0), (3, 2, 1200)])
def test_every_token_is_computed_once(
    batches: dict[bool, MicroBatch], packed: bool, context: int, sequence: int, tokens: int
) -> None:
    batch = batches[packed]
    rows = rows_of(batch, context, sequence, tokens)
    total = sum(rows[0].lengths)
    assert total >= tokens
    assert total == len(rows[0].input_ids) == int(rows[0].borders[-1])
    assert total >= row_tokens(lengths_of(batch), Sharing(context=context, sequence=sequence))
    assert torch.equal(torch.cat([row.local for row in rows]).sort().values, torch.arange(total))
    assert {len(row.local) for row in rows} == {total // context}
    assert total // context % sequence == 0
    assert all(length % (2 * context) == 0 for length in rows[0].lengths if context > 1)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("context", [1, 2, 3])
def test_response_positions_are_found_again(
    batches: dict[bool, MicroBatch], packed: bool, context: int
) -> None:
    """The token behind each position is the response token that it predicts; all of them are on some rank."""
    batch, rows = batches[packed], rows_of(batches[packed], context, 2)
    found = torch.full_like(batch.response_ids, -1)
    for row in rows:
        places = row.local[row.response_local]
        found[row.response_rows] = row.input_ids[places + 1]
    assert torch.equal(found, batch.response_ids)
    assert sum(len(row.response_rows) for row in rows) == len(batch.response_ids)


def test_ranks_have_both_ends_of_each_sample(batches: dict[bool, MicroBatch]) -> None:
    row = rows_of(batches[True], 2, 1)[0]
    first = row.lengths[0]
    chunk = first // 4
    expected = [*range(chunk), *range(first - chunk, first)]
    assert row.local[: first // 2].tolist() == expected


@pytest.mark.parametrize("packed", [True, False])
def test_positions_are_transformers_own(batches: dict[bool, MicroBatch], packed: bool) -> None:
    padded = batches[False]
    assert padded.picture_grids is not None
    model: Any = AutoModelForImageTextToText.from_pretrained(MODEL).base_model
    expected, _ = model.get_rope_index(
        padded.input_ids,
        mm_token_type_ids=padded.image_token_mask,
        image_grid_thw=padded.picture_grids[list(padded.picture_rows)],
        attention_mask=padded.attention_mask,
    )
    (row,) = rows_of(batches[packed], 1, 1)
    start = 0
    for number, length in enumerate(lengths_of(batches[packed])):
        tokens = int(padded.attention_mask[number].sum())
        assert torch.equal(row.positions[:, start : start + tokens], expected[:, number, :tokens])
        start += length
    assert len(set(row.positions[:, : row.lengths[0]].max(dim=1).values.tolist())) == 1


def test_a_dummy_has_a_row(tmp_path: Path) -> None:
    dummy = MicroBatchBuilder(load_processor(MODEL), {}, frozenset()).build([])
    row = lay_out(dummy, Sharing(context=2, sequence=2), tokens=16)
    assert sum(row.lengths) == 16
    assert len(row.response_rows) == 0
