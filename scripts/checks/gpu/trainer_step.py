"""One optimizer step of the main job's tiny student on the GPU against the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from scripts.checks.gpu.batch import (
    LINEAR_STEP,
    ScoredBatch,
    job_args,
    masked_ids,
    scored_batch,
    write_prompts,
)
from scripts.checks.gpu.result import Row, relative_gap, within
from scripts.checks.gpu.setting import CPU, Setting, backend_on
from slime.backends.fsdp.backend import FsdpBackend
from slime.backends.fsdp.export import hf_named_parameters
from slime.tiny.paths import checkpoint_path
from slime.trainer import Trainer, build_shards
from slime.utils.processing_utils import load_processor

CHECK = "trainer step"
EXACT = {"loss": 1e-4, "gradient norm": 1e-4, "weights": 1e-3}
LOOSE = {"loss": 0.1, "gradient norm": 0.1, "weights": 0.2}


@dataclass(frozen=True)
class Step:
    """What came of one optimizer step."""

    loss: float
    grad_norm: float
    change: dict[str, Tensor]
    """Of each weight, float32, on the CPU."""


def run(setting: Setting) -> Iterator[Row]:
    """Take the same step on the CPU in float32, and on the device in float32 and bfloat16."""
    batch = scored_batch(setting.scratch)
    data = write_prompts(setting.scratch)
    expected = _step(CPU, "float32", batch, data)
    for dtype, limits in (("float32", EXACT), ("bfloat16", LOOSE)):
        found = _step(setting.device, dtype, batch, data)
        gaps = {
            "loss": relative_gap(found.loss, expected.loss),
            "gradient norm": relative_gap(found.grad_norm, expected.grad_norm),
            "weights": _distance(found.change, expected.change),
        }
        for name, gap in gaps.items():
            what = "change of all weights" if name == "weights" else name
            against = f"{dtype} on the {setting.name} against float32 on the CPU, relative gap"
            yield within(CHECK, f"{what}: {against}", gap, limits[name])


def _step(device: torch.device, dtype: str, batch: ScoredBatch, data: Path) -> Step:
    """Take one step with packed micro-batches, as a training rank does."""
    checkpoint = checkpoint_path("student")
    args = job_args(checkpoint, data, *LINEAR_STEP, "--train-dtype", dtype)
    masked = masked_ids(checkpoint)
    with backend_on(device, args, masked) as backend:
        before = _weights(backend)
        trainer = Trainer(args, backend, load_processor(checkpoint), masked)
        [shard] = build_shards(args, batch.samples, batch.pictures, 1, 0)
        metrics = trainer.train(0, shard)
        after = _weights(backend)
    change = {name: after[name] - before[name] for name in before}
    return Step(loss=metrics["loss"], grad_norm=metrics["grad_norm"], change=change)


def _weights(backend: FsdpBackend) -> dict[str, Tensor]:
    """Return the weights as they are stored; those that a backend hands out are rounded to its precision."""
    stored = hf_named_parameters(backend._student.hf, torch.float32)
    return {name: weight.cpu().clone() for name, weight in stored}


def _distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the norm of the difference of all weights' changes, as a share of the expected ones' norm."""
    apart = sum(float((found[name] - expected[name]).double().square().sum()) for name in expected)
    whole = sum(float(change.double().square().sum()) for change in expected.values())
    return (apart / whole) ** 0.5
