"""Packed samples: none sees another, and each has what it would have alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen3Config

from slime.backends import attention
from slime.backends.attention import borders, packed_attention, require_packable
from slime.backends.batching import MicroBatch, MicroBatchBuilder
from slime.trainer import build_shards
from slime.utils.processing_utils import load_processor
from tests.fakes.tiny_model import make_samples, save_text_model, save_vision_model
from tests.fakes.training import DISTILL, ONE_BATCH, joined, make_args

LENGTHS = (7, 1, 4, 12, 3)
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["vision", "text"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    save = {"vision": save_vision_model, "text": save_text_model}[request.param]
    return save(tmp_path_factory.mktemp(request.param))


def make_batch(model: Path) -> MicroBatch:
    text_only = load_processor(model).image_processor is None
    samples, pictures = make_samples(6, with_pictures=(False,) if text_only else (True, False))
    shard = build_shards(make_args(model, *DISTILL, *ONE_BATCH), samples, pictures, 1, 0)[0]
    return MicroBatchBuilder(load_processor(model), pictures).build(shard.samples)


def with_another_token(batch: MicroBatch, number: int) -> MicroBatch:
    """Return the micro-batch with the last prompt token of one of its samples changed."""
    first = int((batch.sample_rows == number).nonzero()[0])
    position = batch.response_positions[first]
    ids = batch.input_ids.clone()
    ids[0, position] = 20 + (ids[0, position] - 19) % 15  # no number that this maps to itself
    assert (ids != batch.input_ids).sum() == 1
    return replace(batch, input_ids=ids)


@pytest.mark.parametrize("number", [0, 3])
def test_no_sample_sees_another(model: Path, number: int) -> None:
    batch = make_batch(model)
    with joined(make_args(model, *DISTILL)) as backend:
        before, after = backend.compute_log_probs([batch, with_another_token(batch, number)])
    own = batch.sample_rows == number
    assert torch.equal(before[~own], after[~own]), "bit for bit"
    assert (before[own] - after[own]).abs().min() > 1e-4


def test_one_row_under_a_plain_causal_mask_would_leak(model: Path) -> None:
    batch = replace(make_batch(model), lengths=None)
    with joined(make_args(model, *DISTILL, "--train-layout", "padded")) as backend:
        before, after = backend.compute_log_probs([batch, with_another_token(batch, 0)])
    behind = batch.sample_rows > 0
    assert (before[behind] - after[behind]).abs().max() > 1e-3


def test_model_and_micro_batch_must_agree_on_the_layout(model: Path) -> None:
    batch = make_batch(model)
    with (
        joined(make_args(model, *DISTILL, "--train-layout", "padded")) as backend,
        pytest.raises(ValueError, match="a packed micro-batch was given to a model that reads padded ones"),
    ):
        backend.compute_log_probs([batch])
    with (
        joined(make_args(model, *DISTILL)) as backend,
        pytest.raises(ValueError, match="a padded micro-batch was given to a model that reads packed ones"),
    ):
        backend.compute_log_probs([replace(batch, lengths=None)])


# ---- the attention by itself ----


def draw(dtype: torch.dtype = torch.float64, device: torch.device = CPU) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries of four heads, and keys and values of two, for one row."""
    torch.manual_seed(0)
    states = [torch.randn(1, heads, sum(LENGTHS), 16, dtype=torch.float64) for heads in (4, 2, 2)]
    query, key, value = (state.to(device, dtype).requires_grad_() for state in states)
    return query, key, value


def layer() -> nn.Module:
    module: Any = nn.Module()
    module.num_key_value_groups = 2
    return module


def by_mask(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return attention under the dense mask of all samples."""
    owner = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    mask = (owner[:, None] == owner[None]).tril()
    key, value = (state.repeat_interleave(2, dim=1) for state in (key, value))
    attended = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3)
    return attended.transpose(1, 2)


@pytest.mark.parametrize("bundle", [1, 20, 1000])
def test_it_is_attention_under_a_block_diagonal_mask(bundle: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "BUNDLE_TOKENS", bundle)
    states, expected_states = draw(), draw()
    output, _ = packed_attention(layer(), *states, None, scaling=0.3, **borders(LENGTHS, CPU))
    expected = by_mask(*expected_states)
    torch.testing.assert_close(output, expected)
    weights = torch.randn_like(expected)
    (output * weights).sum().backward()
    (expected * weights).sum().backward()
    for state, expected_state in zip(states, expected_states, strict=True):
        torch.testing.assert_close(state.grad, expected_state.grad)


@pytest.mark.gpu
def test_flash_attention_on_a_gpu_is_the_same() -> None:
    device = torch.device("cuda")
    states, expected_states = draw(torch.bfloat16, device), draw()
    output, _ = packed_attention(layer(), *states, None, scaling=0.3, **borders(LENGTHS, device))
    expected = by_mask(*expected_states)
    torch.testing.assert_close(output.cpu().double(), expected, atol=3e-2, rtol=0)
    output.float().sum().backward()
    expected.sum().backward()
    for state, expected_state in zip(states, expected_states, strict=True):
        assert state.grad is not None
        torch.testing.assert_close(state.grad.cpu().double(), expected_state.grad, atol=5e-2, rtol=0)


def test_without_borders_nothing_is_computed() -> None:
    with pytest.raises(ValueError, match="without their borders"):
        packed_attention(layer(), *draw(), None)
    with pytest.raises(ValueError, match="with a mask"):
        packed_attention(layer(), *draw(), torch.ones(1), **borders(LENGTHS, CPU))
    with pytest.raises(ValueError, match=r"samples of \(7, 1\) tokens do not fill a row of shape \(1, 27\)"):
        packed_attention(layer(), *draw(), None, **borders(LENGTHS[:2], CPU))


def test_bundles_keep_the_order_and_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "BUNDLE_TOKENS", 12)
    assert attention._bundles((3, 4, 5, 20, 1, 1)) == [(0, 2), (2, 3), (3, 4), (4, 6)]
    assert attention._bundles((5,)) == [(0, 1)]


def test_layers_that_do_not_see_the_whole_sample_are_refused() -> None:
    require_packable(Qwen3Config(num_hidden_layers=2))
    sliding = Qwen3Config(num_hidden_layers=2, layer_types=["full_attention", "sliding_attention"])
    with pytest.raises(
        ValueError, match=r"layers of full_attention, sliding_attention; .*--train-layout padded"
    ):
        require_packable(sliding)
