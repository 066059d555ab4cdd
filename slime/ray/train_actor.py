"""One training rank: the process around a `Trainer` and its backend."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import ray

from slime.ray.actor import Actor, Surroundings

if TYPE_CHECKING:
    from slime.arguments import Args
    from slime.backends.base import TrainBackend
    from slime.backends.batching import BatchProcessor
    from slime.skipping.account import SkippedStep
    from slime.trainer import Trainer, TrainShard
    from slime.weight_sync.base import EngineMember
    from slime.weight_sync.probe import Gap, Probe
    from slime.weight_sync.sync import WeightSync


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What came of one rollout on one rank."""

    metrics: dict[str, float]
    """The same on every rank."""
    skipped: list[SkippedStep]
    """The same steps on every rank, each with the rank's own suspects."""


class TrainActor(Actor):
    """Trains in step with the other ranks: each verb must be called on all of them."""

    def __init__(self, args: Args, rank: int, several_nodes: bool, surroundings: Surroundings) -> None:
        """`several_nodes` says whether an engine or another rank is on another machine."""
        super().__init__(f"train_{rank}", surroundings)
        # OpenMP reads this once, when torch is imported below. Ray has set it to 1.
        os.environ["OMP_NUM_THREADS"] = str(args.train_threads)
        self._args = args
        self._rank = rank
        self._several_nodes = several_nodes
        self._trainer: Trainer | None = None
        self._backend: TrainBackend | None = None
        self._weight_sync: WeightSync | None = None
        self._processor: BatchProcessor

    def address(self) -> tuple[str, int]:
        """Return this node's address and a free port: where the ranks meet, if this is rank 0."""
        from slime.engines.process import free_port

        host = self._host()
        return host, free_port(host)

    def gpus(self) -> tuple[int, ...]:
        """Return the numbers of this rank's GPUs on its node: none on a CPU."""
        return tuple(int(gpu) for gpu in ray.get_runtime_context().get_accelerator_ids()["GPU"])

    def setup(self, master_address: str, master_port: int, weight_folder: str | None) -> None:
        """Join the process group and load the model; `weight_folder` is where weights for engines go."""
        os.environ.update(
            MASTER_ADDR=master_address,
            MASTER_PORT=str(master_port),
            RANK=str(self._rank),
            WORLD_SIZE=str(self._args.num_train_ranks),
            # Ray shows each actor its own GPU alone, so it is the first one that it sees.
            LOCAL_RANK="0",
        )
        from slime.backends import create_backend
        from slime.data.vocabulary import never_sampled
        from slime.engines.model_facts import model_facts
        from slime.trainer import Trainer
        from slime.utils.processing_utils import load_processor
        from slime.weight_sync.sync import create_weight_sync

        args, checkpoint = self._args, self._args.hf_checkpoint
        processor = load_processor(checkpoint)
        masked = never_sampled(processor.tokenizer, model_facts(checkpoint).vocab_size)
        self._backend = create_backend(args, self._rank, args.num_train_ranks, masked)
        self._processor = processor
        self._trainer = Trainer(args, self._backend, processor, masked)
        folder = None if weight_folder is None else Path(weight_folder)
        self._weight_sync = create_weight_sync(args, self._rank, folder, self._host())

    def train(self, rollout_id: int, shard: TrainShard) -> TrainResult:
        """Take the optimizer steps of one rollout."""
        if self._trainer is None:
            raise RuntimeError(f"train_{self._rank} has no trainer yet; call setup() first")
        with self.stopwatch.stage("train", rollout_id=rollout_id):
            metrics = self._trainer.train(rollout_id, shard)
        return TrainResult(metrics=metrics, skipped=self._trainer.skipped)

    def weight_version(self) -> int:
        """Return the number of optimizer steps behind the weights."""
        return self._ready().weight_version

    def publish_weights(self, engines: Sequence[EngineMember], version: str) -> int:
        """Bring the full weights to the engines; return the bytes that this rank sent. All gather."""
        if self._weight_sync is None:
            raise RuntimeError(f"train_{self._rank} has no way to the engines yet; call setup() first")
        with self.stopwatch.stage("sync weights", version=version):
            return self._weight_sync.publish(self._ready().hf_named_parameters(), engines, version)

    def compare(self, probe: Probe) -> list[Gap]:
        """Return how far the engines' log-probs of their own responses are from the present weights'."""
        from slime.weight_sync.probe import compare

        with self.stopwatch.stage("compare weights", version=self.weight_version()):
            return compare(self._args, self._ready(), self._processor, probe)

    def onload(self) -> None:
        """Bring model and optimizer back from the host's memory."""
        with self.stopwatch.stage("onload"):
            self._ready().onload()

    def offload_optimizer(self) -> None:
        """Put the optimizer's state into the host's memory."""
        with self.stopwatch.stage("offload optimizer"):
            self._ready().offload_optimizer()

    def offload(self) -> None:
        """Put model and optimizer into the host's memory."""
        with self.stopwatch.stage("offload"):
            self._ready().offload()

    def save(self, path: str) -> None:
        """Write model, optimizer, schedule and generators below `path`."""
        with self.stopwatch.stage("save", version=self.weight_version()):
            self._ready().save_checkpoint(Path(path))

    def export(self, path: str) -> None:
        """Write the weights into the empty folder `path` as Hugging Face's libraries load them."""
        from slime.weight_sync.checked import checked
        from slime.weight_sync.disk import fill_folder

        checkpoint = Path(self._args.hf_checkpoint)
        with self.stopwatch.stage("export", version=self.weight_version()):
            parameters = checked(self._ready().hf_named_parameters(), checkpoint)
            fill_folder(parameters, Path(path), checkpoint=checkpoint, writes=self._rank == 0)

    def load(self, path: str) -> None:
        """Read what `save` wrote."""
        self._ready().load_checkpoint(Path(path))

    def _host(self) -> str:
        """Return this node's address, as the others of the run reach it."""
        return ray.util.get_node_ip_address() if self._several_nodes else "127.0.0.1"

    def _ready(self) -> TrainBackend:
        if self._backend is None:
            raise RuntimeError(f"train_{self._rank} has no backend yet; call setup() first")
        return self._backend
