"""Our way to train, as a training rank does: shards, packed micro-batches, the objective, FSDP."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from scripts.benchmarks.training.workload import LEARNING_RATE, Machine, Shape
from slime.arguments import parse_args
from slime.backends import create_backend
from slime.backends.fsdp.outputs import ResponseOutputs
from slime.trainer import Trainer, build_shards
from slime.utils.processing_utils import load_processor
from slime.utils.types import Sample


class OurTrainer:
    """One rank of a run with all metrics on, and the plain way's objective (or the divergence of a top-k)."""

    def __init__(
        self,
        model: Path,
        shape: Shape,
        machine: Machine,
        samples: Sequence[Sample],
        pictures: Mapping[str, bytes],
        port: int,
    ) -> None:
        self._args = parse_args(
            [
                *("--hf-checkpoint", str(model), "--prompt-data", "unused.parquet", "--num-rollout", "1000"),
                *("--use-opd", "--opd-type", "sglang", "--rm-url", "http://127.0.0.1:1/generate"),
                *("--custom-rm-path", "plugin.reward_func"),
                *("--custom-reward-post-process-path", "plugin.post_process_rewards"),
                *("--rollout-batch-size", str(shape.prompts), "--n-samples-per-prompt", str(shape.samples)),
                *("--use-dynamic-batch-size", "--max-tokens-per-gpu", str(shape.budget)),
                *("--calculate-per-token-loss", "--lr", str(LEARNING_RATE)),
                *("--train-threads", str(torch.get_num_threads()), "--train-dtype", machine.dtype),
                *(("--gradient-checkpointing",) if machine.gradient_checkpointing else ()),
                *(("--opd-loss", "topk", "--opd-top-k", str(shape.top_k)) if shape.top_k else ()),
            ]
        )
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK="0")
        self._trainer = Trainer(self._args, create_backend(self._args, 0, 1), load_processor(model))
        self._samples = samples
        self._pictures = pictures
        self._rollout_id = 0

    def step(self) -> dict[str, float]:
        """Take one optimizer step; return what the plain way must agree with."""
        [shard] = build_shards(self._args, self._samples, self._pictures, 1, self._rollout_id)
        metrics = self._trainer.train(self._rollout_id, shard)
        self._rollout_id += 1
        return {
            "reverse_kl": metrics["opd_reverse_kl"],
            "grad_norm": metrics["grad_norm"],
            "micro_batches": metrics["micro_batches"],
        }


class ApartTrainer(OurTrainer):
    """Ours, with a pass over the LM head for every question of the loss. In a process of its own."""

    def __init__(
        self,
        model: Path,
        shape: Shape,
        machine: Machine,
        samples: Sequence[Sample],
        pictures: Mapping[str, bytes],
        port: int,
    ) -> None:
        ResponseOutputs.expect = lambda self, ids, top: None
        super().__init__(model, shape, machine, samples, pictures, port)
