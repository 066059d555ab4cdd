"""Whether the engines compute what the trainer computes: log-probs of a response of their own, compared.

Weights that arrive under a wrong name, half of them, or not at all, are no error anywhere: an engine goes on
with what it has. One response tells.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from slime.backends.base import TrainBackend
from slime.backends.batching import BatchProcessor, MicroBatchBuilder, TrainSample
from slime.utils.types import Sample

if TYPE_CHECKING:
    from slime.arguments import Args

LARGEST_IN_FLOAT32 = 1e-3
"""What one token's log-probs may differ by where trainer and engines compute in float32."""
MEAN_IN_BFLOAT16 = 0.1
"""What they may differ by on average where either computes in bfloat16."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """One response of each engine to the same prompt."""

    urls: tuple[str, ...]
    """Who answered."""
    samples: tuple[TrainSample, ...]
    """Each with the engine's log-probs of its response."""
    pictures: Mapping[str, bytes]
    """Content hash -> encoded bytes."""


@dataclass(frozen=True, kw_only=True)
class Gap:
    """By how much an engine's log-probs of its response differ from the trainer's."""

    url: str
    largest: float
    mean: float


class WeightMismatchError(RuntimeError):
    """An engine does not compute with the trainer's weights."""


def probe_sample(sample: Sample) -> TrainSample:
    """Return an engine's answer as the trainer reads it, without any score."""
    inputs = sample.multimodal_train_inputs or {}
    length = sample.response_length
    return TrainSample(
        index=sample.index or 0,
        tokens=torch.tensor(sample.tokens, dtype=torch.int64),
        response_length=length,
        loss_mask=torch.ones(length),
        advantages=torch.zeros(length),
        rollout_log_probs=torch.tensor(sample.rollout_log_probs, dtype=torch.float32),
        image_hashes=tuple(inputs.get("image_hashes", ())),
        image_grid_thw=tuple((int(t), int(h), int(w)) for t, h, w in inputs.get("image_grid_thw", ())),
    )


def compare(args: Args, backend: TrainBackend, processor: BatchProcessor, probe: Probe) -> list[Gap]:
    """Return how far each engine is from the trainer's present weights. Collective, the same on all ranks."""
    builder = MicroBatchBuilder(processor, probe.pictures, packed=args.train_layout == "packed")
    batches = [builder.build([sample]) for sample in probe.samples]
    gaps = []
    for url, sample, own in zip(probe.urls, probe.samples, backend.compute_log_probs(batches), strict=True):
        assert sample.rollout_log_probs is not None
        difference = (own - sample.rollout_log_probs).abs()
        gaps.append(Gap(url=url, largest=difference.max().item(), mean=difference.mean().item()))
    return gaps


def require_same(args: Args, gaps: list[Gap], version: str) -> None:
    """Hold the gaps against what the precision allows.

    Raises:
        WeightMismatchError: an engine is further off.
    """
    exact = args.precision == "float32" and args.engine_dtype in (None, "float32")
    for gap in gaps:
        off, allowed = (gap.largest, LARGEST_IN_FLOAT32) if exact else (gap.mean, MEAN_IN_BFLOAT16)
        if not off <= allowed:
            raise WeightMismatchError(
                f"the engine at {gap.url} does not compute with the trainer's weights (version {version}): "
                f"its log-probs are off by {off:.2g} {'at most' if exact else 'on average'}, and "
                f"the precision allows {allowed:g}. Use another --weight-sync and tell us; "
                "--check-weight-sync never goes on regardless."
            )
