"""How `MegatronBackend` goes through its micro-batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

pytest.importorskip("megatron.core")

from slime.backends.base import LossInputs
from slime.backends.batching import MicroBatch, MicroBatchBuilder
from slime.backends.megatron import backend as module
from slime.backends.megatron.layout import Row
from slime.trainer import build_shards
from slime.utils.processing_utils import load_processor
from tests.fakes.tiny_model import make_samples, save_vision_model
from tests.fakes.training import DISTILL, joined_backend, make_args


def test_micro_batches_come_to_the_device_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_vision_model(tmp_path)
    samples, pictures = make_samples(4)
    args = make_args(model, *DISTILL, "--train-backend", "megatron", samples=4)
    shard = build_shards(args, samples, pictures, 1, 0)[0]
    builder = MicroBatchBuilder(load_processor(model), pictures)
    batches = [builder.build([sample]) for sample in shard.samples]
    order: list[str] = []

    def lay_out(batch: MicroBatch, *arguments: Any, **more: Any) -> Row:
        order.append(f"lay out {batch.sample_indices[0]}")
        return original(batch, *arguments, **more)

    def loss_fn(outputs: LossInputs, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        order.append(f"train {batch.sample_indices[0]}")
        return outputs.log_probs.sum(), {}

    original = module.lay_out
    monkeypatch.setattr(module, "lay_out", lay_out)
    with joined_backend(args) as backend:
        backend.forward_backward(batches, loss_fn)
    numbers = [batch.sample_indices[0] for batch in batches]
    assert len(numbers) == 4
    assert order == [f"{what} {number}" for number in numbers for what in ("lay out", "train")]
