"""What layers are made of, and that nothing in them waits for the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

pytest.importorskip("megatron.core")

from slime.backends.batching import MicroBatchBuilder
from slime.backends.megatron import spec
from slime.backends.megatron.backend import MegatronBackend
from slime.trainer import build_shards
from slime.utils.processing_utils import load_processor
from tests.fakes.tiny_model import make_samples, save_vision_model
from tests.fakes.training import DISTILL, ONE_BATCH, joined_backend, make_args

WAITS = {
    getattr(torch.Tensor, name)
    for name in ("item", "tolist", "cpu", "nonzero", "__bool__", "__int__", "__float__", "__index__")
}


class Watch(TorchFunctionMode):
    """Notes which calls of tensors would wait for a GPU, while `layers` is above 0."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = self.entered = 0
        self.waits: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.layers and func in WAITS:
            self.waits.append(func.__name__)
        return func(*args, **(kwargs or {}))

    def enter(self, *_: Any) -> None:
        self.layers += 1
        self.entered += 1

    def leave(self, *_: Any) -> None:
        self.layers -= 1


@pytest.mark.parametrize("recomputed", [(), ("--gradient-checkpointing",)], ids=["kept", "recomputed"])
def test_layers_do_not_wait_for_the_device(tmp_path: Path, recomputed: tuple[str, ...]) -> None:
    model = save_vision_model(tmp_path)
    samples, pictures = make_samples(4)
    flags = (*DISTILL, *ONE_BATCH, "--train-backend", "megatron", *recomputed)
    args = make_args(model, *flags, samples=4)
    shard = build_shards(args, samples, pictures, 1, 0)[0]
    batch = MicroBatchBuilder(load_processor(model), pictures).build(shard.samples)
    assert batch.lengths is not None
    assert len(batch.lengths) == 4
    watch = Watch()
    with joined_backend(args) as backend, watch:
        assert isinstance(backend, MegatronBackend)
        decoder: Any = backend._student.decoder
        layers: list[nn.Module] = list(decoder.layers)
        for layer in layers:
            layer.register_forward_pre_hook(watch.enter)
            layer.register_forward_hook(watch.leave)
        backend.forward_backward([batch], lambda outputs, _: (outputs.log_probs.sum(), {}))
    assert watch.entered == len(layers) * (2 if recomputed else 1)
    assert watch.waits == []


@pytest.mark.parametrize(
    ("installed", "device", "dtype", "used"),
    [
        (True, "cuda", torch.bfloat16, True),
        (True, "cuda", torch.float32, False),
        (True, "cpu", torch.bfloat16, False),
        (False, "cuda", torch.bfloat16, False),
    ],
)
def test_transformer_engine_is_used_where_it_can_attend(
    monkeypatch: pytest.MonkeyPatch, installed: bool, device: str, dtype: torch.dtype, used: bool
) -> None:
    monkeypatch.setattr(spec, "HAVE_TE", installed)
    assert spec.uses_transformer_engine(torch.device(device), dtype) is used
