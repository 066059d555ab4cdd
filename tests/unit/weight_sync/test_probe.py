"""An engine that computes with other weights than the trainer is found, and named."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from slime.arguments import Args
from slime.backends.batching import MicroBatchBuilder, TrainSample
from slime.backends.fsdp.backend import FsdpBackend
from slime.utils.processing_utils import load_processor
from slime.weight_sync.probe import (
    LARGEST_IN_FLOAT32,
    MEAN_IN_BFLOAT16,
    Gap,
    Probe,
    WeightMismatchError,
    compare,
    probe_sample,
    require_same,
)
from tests.fakes.tiny_model import make_samples, save_vision_model
from tests.fakes.training import joined, make_args

URLS = ("http://first:1", "http://second:2")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vision_model(tmp_path_factory.mktemp("probe") / "model")


@pytest.fixture(scope="module")
def backend(model: Path) -> Iterator[FsdpBackend]:
    with joined(make(model)) as backend:
        yield backend


def make(model: Path, *flags: str) -> Args:
    return make_args(model, "--rm-type", "math", *flags)


def asked() -> tuple[TrainSample, dict[str, bytes]]:
    """Return a response to a picture, and the picture."""
    samples, pictures = make_samples(1, with_pictures=(True,))
    return probe_sample(samples[0]), pictures


def answer(backend: FsdpBackend, model: Path) -> TrainSample:
    """Return that response as an engine with the backend's present weights scores it."""
    sample, pictures = asked()
    batch = MicroBatchBuilder(load_processor(model), pictures, packed=True).build([sample])
    return replace(sample, rollout_log_probs=backend.compute_log_probs([batch])[0])


@contextmanager
def moved(backend: FsdpBackend, name: str, factor: float) -> Iterator[None]:
    """Scale one of the backend's weights for the block."""
    weights = dict(backend.hf_named_parameters())
    before = weights[name].clone()
    with torch.no_grad():
        weights[name].mul_(factor)
    yield
    with torch.no_grad():
        weights[name].copy_(before)


VISION = "model.visual.merger.linear_fc2.weight"
TEXT = "model.language_model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize("name", [TEXT, VISION])
def test_one_tensor_that_did_not_arrive_is_found_and_its_engine_named(
    model: Path, backend: FsdpBackend, name: str
) -> None:
    args, (_, pictures) = make(model), asked()
    stale = answer(backend, model)
    with moved(backend, name, 1.5):
        fresh = answer(backend, model)
        probe = Probe(urls=URLS, samples=(fresh, stale), pictures=pictures)
        gaps = compare(args, backend, load_processor(model), probe)
    assert [gap.url for gap in gaps] == list(URLS)
    assert gaps[0].largest < 1e-5
    own, theirs = fresh.rollout_log_probs, stale.rollout_log_probs
    assert own is not None
    assert theirs is not None
    assert gaps[1].largest == pytest.approx((own - theirs).abs().max().item(), abs=1e-5)
    assert gaps[1].mean == pytest.approx((own - theirs).abs().mean().item(), abs=1e-5)
    assert gaps[1].largest > LARGEST_IN_FLOAT32
    with pytest.raises(WeightMismatchError) as caught:
        require_same(args, gaps, "7")
    message = str(caught.value)
    assert f"the engine at {URLS[1]} does not compute with the trainer's weights (version 7)" in message
    assert URLS[0] not in message
    assert f"{gaps[1].largest:.2g} at most" in message


def test_the_same_weights_are_the_same(model: Path, backend: FsdpBackend) -> None:
    args, (_, pictures) = make(model), asked()
    probe = Probe(urls=URLS[:1], samples=(answer(backend, model),), pictures=pictures)
    gaps = compare(args, backend, load_processor(model), probe)
    assert gaps[0].largest < 1e-5
    require_same(args, gaps, "0")


def gap(largest: float, mean: float) -> list[Gap]:
    return [Gap(url=URLS[0], largest=largest, mean=mean)]


HALF = (("--train-dtype", "bfloat16"), ("--train-dtype", "float32", "--engine-dtype", "bfloat16"))


@pytest.mark.parametrize("flags", HALF)
def test_in_half_precision_the_mean_counts_and_one_token_may_be_far_off(
    model: Path, flags: tuple[str, ...]
) -> None:
    args = make(model, *flags)
    require_same(args, gap(largest=2.0, mean=0.9 * MEAN_IN_BFLOAT16), "1")
    with pytest.raises(WeightMismatchError, match=r"0\.11 on average"):
        require_same(args, gap(largest=0.11, mean=1.1 * MEAN_IN_BFLOAT16), "1")


def test_in_float32_every_token_counts(model: Path) -> None:
    args = make(model, "--train-dtype", "float32")
    require_same(args, gap(largest=0.9 * LARGEST_IN_FLOAT32, mean=0), "1")
    with pytest.raises(WeightMismatchError, match=r"0\.0011 at most"):
        require_same(args, gap(largest=1.1 * LARGEST_IN_FLOAT32, mean=0), "1")


def test_what_is_no_number_is_not_the_same(model: Path) -> None:
    for flags in ((), HALF[0]):
        with pytest.raises(WeightMismatchError):
            require_same(make(model, *flags), gap(largest=math.nan, mean=math.nan), "1")
