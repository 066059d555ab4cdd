"""Runs training jobs for tests: in this process as one rank, or in several processes joined by gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch import Tensor

from slime.arguments import Args, parse_args
from slime.backends import create_backend
from slime.backends.base import LossFn, LossInputs, TrainBackend
from slime.backends.batching import MicroBatch
from slime.backends.fsdp.backend import FsdpBackend
from slime.engines.process import free_port
from slime.skipping.account import SkippedStep
from slime.trainer import Trainer, build_shards
from slime.utils.processing_utils import load_processor
from slime.utils.types import Sample

ONE_BATCH = ("--use-dynamic-batch-size", "--max-tokens-per-gpu", "100000")
LINEAR_STEP = ("--lr", "1", "--adam-eps", "1", "--adam-beta1", "0", "--adam-beta2", "0", "--clip-grad", "0")
"""AdamW moves a weight by g / (|g| + 1): what differs in weights after a step differs in the gradient."""
DISTILL = (
    *("--use-opd", "--opd-type", "sglang", "--rm-url", "http://127.0.0.1:1/generate"),
    *(
        "--custom-rm-path",
        "plugin.reward_func",
        "--custom-reward-post-process-path",
        "plugin.post_process_rewards",
    ),
)
WORKER = "from tests.fakes.training import work; work()"


@dataclass(frozen=True)
class Plant:
    """A fault in the loss of the micro-batch that holds one sample."""

    rollout_id: int
    sample: int
    fault: Literal["nan loss", "nan gradient", "huge gradient"]

    def spoil(self, loss: Tensor, outputs: LossInputs, batch: MicroBatch) -> Tensor:
        """Return the loss of a micro-batch with the fault, if it belongs there."""
        if self.sample not in batch.sample_indices:
            return loss
        match self.fault:
            case "nan loss":
                return loss * float("nan")
            case "nan gradient":
                return loss + (outputs.log_probs * 0).abs().sqrt().sum()
            case "huge gradient":
                return loss + 1e6 * outputs.log_probs.sum()


@contextmanager
def planted(trainer: Trainer, plants: Sequence[Plant]) -> Iterator[None]:
    """Put faults into the losses of the trainer."""
    objective = trainer._objective

    def spoiled(*arguments: Any) -> LossFn:
        loss_fn = objective(*arguments)

        def spoil(outputs: LossInputs, batch: MicroBatch) -> tuple[Tensor, Mapping[str, Tensor]]:
            loss, sums = loss_fn(outputs, batch)
            for plant in plants:
                loss = plant.spoil(loss, outputs, batch)
            return loss, sums

        return spoil

    with patch.object(trainer, "_objective", spoiled):
        yield


@dataclass
class Job:
    """One run of `Trainer.train`: flags, data, and what came of it."""

    flags: tuple[str, ...]
    samples: list[Sample]
    pictures: dict[str, bytes]
    rollouts: int = 1
    port: int = 0
    load: str | None = None
    save: str | None = None
    model: Path | None = None
    """None: that of the other jobs."""
    keep_loaded: bool = False
    masked_ids: tuple[int, ...] = ()
    """Tokens that are never sampled."""
    plants: tuple[Plant, ...] = ()


@dataclass
class Outcome:
    """Metrics of each rollout on one rank, and the full weights after the last."""

    metrics: list[dict[str, float]] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    loaded: dict[str, Tensor] = field(default_factory=dict)
    """The full weights before the first, where the job asks for them."""
    skipped: list[SkippedStep] = field(default_factory=list)
    """The optimizer steps that the rank did not take."""


def make_args(model: Path, *flags: str, samples: int = 8, ranks: int = 1) -> Args:
    """Return arguments for a training test; `samples` come in groups of two."""
    return parse_args(
        [
            *("--hf-checkpoint", str(model), "--prompt-data", "unused.parquet", "--num-rollout", "10"),
            *("--rollout-batch-size", str(samples // 2), "--n-samples-per-prompt", "2"),
            *("--train-threads", "1", "--actor-num-gpus-per-node", str(ranks)),
            *flags,
        ]
    )


@contextmanager
def joined(args: Args, rank: int = 0, world_size: int = 1, port: int | None = None) -> Iterator[FsdpBackend]:
    """Give an FSDP backend in a process group of its own."""
    with joined_backend(args, rank, world_size, port) as backend:
        assert isinstance(backend, FsdpBackend)
        yield backend


@contextmanager
def joined_backend(
    args: Args,
    rank: int = 0,
    world_size: int = 1,
    port: int | None = None,
    masked_ids: Sequence[int] = (),
) -> Iterator[TrainBackend]:
    """Give the backend that the arguments name in a process group of its own."""
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port or free_port()), "LOCAL_RANK": "0"}
    with patch.dict(os.environ, environment):
        backend = create_backend(args, rank, world_size, masked_ids)
    try:
        yield backend
    finally:
        backend.close()


def train(model: Path, job: Job, rank: int = 0, world_size: int = 1) -> Outcome:
    """Run one job as one rank."""
    model = job.model or model
    args = make_args(model, *job.flags, samples=len(job.samples), ranks=world_size)
    outcome = Outcome()
    with joined_backend(args, rank, world_size, job.port, job.masked_ids) as backend:
        if job.load is not None:
            backend.load_checkpoint(Path(job.load))
        if job.keep_loaded:
            outcome.loaded = {name: tensor.clone() for name, tensor in backend.hf_named_parameters()}
        trainer = Trainer(args, backend, load_processor(model), job.masked_ids)
        for rollout_id in range(job.rollouts):
            shards = build_shards(args, job.samples, job.pictures, args.num_data_ranks, rollout_id)
            with planted(trainer, [plant for plant in job.plants if plant.rollout_id == rollout_id]):
                outcome.metrics.append(trainer.train(rollout_id, shards[args.data_rank(rank)]))
            outcome.skipped += trainer.skipped
        if job.save is not None:
            backend.save_checkpoint(Path(job.save))
        outcome.weights = {name: tensor.clone() for name, tensor in backend.hf_named_parameters()}
    return outcome


def train_on_ranks(
    model: Path, jobs: Sequence[Job], folder: Path, world_size: int = 2, timeout: float = 500
) -> list[list[Outcome]]:
    """Run all jobs on `world_size` processes; return each job's outcome on every rank.

    Raises:
        AssertionError: a rank failed, or they were not done in time: a hang.
    """
    for job in jobs:
        job.port = free_port()
    torch.save(list(jobs), folder / "jobs.pt")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(model), str(folder), str(rank), str(world_size)],
            env=environment,
            stdout=(folder / f"rank{rank}.log").open("w"),
            stderr=subprocess.STDOUT,
        )
        for rank in range(world_size)
    ]
    try:
        codes = [process.wait(timeout=timeout) for process in ranks]
    except subprocess.TimeoutExpired:
        codes = [None]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    logs = "\n".join((folder / f"rank{rank}.log").read_text()[-3000:] for rank in range(world_size))
    assert codes == [0] * world_size, f"ranks ended with {codes} (None: they hang)\n{logs}"
    outcomes = [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(world_size)]
    return [list(of_ranks) for of_ranks in zip(*outcomes, strict=True)]


def work() -> None:
    """Be one rank: run the jobs of a folder and write what came of them."""
    model, folder, rank, world_size = sys.argv[1:5]
    jobs = torch.load(Path(folder) / "jobs.pt", weights_only=False)
    outcomes = [train(Path(model), job, int(rank), int(world_size)) for job in jobs]
    torch.save(outcomes, Path(folder) / f"rank{rank}.pt")
