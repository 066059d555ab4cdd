"""Logits of a whole batch never exist: no tensor kept for the backward pass is [P, V]."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from slime.backends.batching import MicroBatchBuilder
from slime.losses.log_probs import chunked_log_probs
from slime.losses.reduction import GlobalMean
from slime.objective import Distillation, Objective
from slime.trainer import build_shards
from slime.utils.processing_utils import load_processor
from tests.fakes.tiny_model import VOCABULARY, make_samples, save_vision_model
from tests.fakes.training import DISTILL, ONE_BATCH, joined, make_args


class Recorder:
    """Notes the shape of all that autograd saves."""

    def __init__(self) -> None:
        self.shapes: set[tuple[int, ...]] = set()

    def pack(self, tensor: Tensor) -> Tensor:
        self.shapes.add(tuple(tensor.shape))
        return tensor

    def vocabulary_rows(self, vocabulary: int) -> int:
        """Return the most rows of any saved tensor whose last axis is the vocabulary."""
        rows = [shape[:-1] for shape in self.shapes if shape and shape[-1] == vocabulary]
        return max((torch.Size(row).numel() for row in rows), default=0)


def test_the_function_saves_no_logits() -> None:
    positions, width, vocabulary = 50, 8, 333
    hidden = torch.randn(positions, width, requires_grad=True)
    head = torch.randn(vocabulary, width, requires_grad=True)
    recorder = Recorder()
    with saved_tensors_hooks(recorder.pack, lambda tensor: tensor):
        made = chunked_log_probs(hidden, head, torch.tensor([[0, 1]] * positions), 16, with_rest=True)
        torch.cat([part.flatten() for part in made]).sum().backward()
    assert (positions, width) in recorder.shapes
    assert recorder.vocabulary_rows(vocabulary) == 0


def test_the_plain_way_would_be_seen() -> None:
    logits = torch.randn(50, 333, requires_grad=True)
    recorder = Recorder()
    with saved_tensors_hooks(recorder.pack, lambda tensor: tensor):
        logits.log_softmax(-1)[:, 0].sum().backward()
    assert recorder.vocabulary_rows(333) == 50


@pytest.mark.parametrize("signal", [{}, {"loss": "topk", "divergence": "jsd"}], ids=["sampled", "topk"])
def test_a_whole_training_pass_saves_no_logits(tmp_path: Path, signal: dict[str, Any]) -> None:
    """Pictures, entropy bonus and all; the head is tied, so its own [V, H] is there and nothing else of V."""
    model = save_vision_model(tmp_path)
    samples, pictures = make_samples(4, top_k=3)
    args = make_args(model, *DISTILL, *ONE_BATCH, "--logprob-chunk-size", "8", "--opd-top-k", "3", samples=4)
    shard = build_shards(args, samples, pictures, 1, 0)[0]
    recorder = Recorder()
    with joined(args) as backend:
        batch = MicroBatchBuilder(load_processor(model), pictures).build(shard.samples)
        mean = GlobalMean(num_tokens=shard.steps[0].num_tokens, num_samples=4, over_tokens=True)
        objective = Objective(
            mean=mean, distillation=Distillation(coef=1.0, mean=mean, **signal), entropy_coef=0.1
        )
        with saved_tensors_hooks(recorder.pack, lambda tensor: tensor):
            backend.forward_backward([batch], objective)
    assert len(recorder.shapes) > 20
    assert recorder.vocabulary_rows(VOCABULARY) == 0
