"""One training rank: the process around a `Trainer` and its backend."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import ray

from slime.ray.actor import Actor, Surroundings

if TYPE_CHECKING:
    from slime.arguments import Args
    from slime.backends.base import TrainBackend
    from slime.trainer import Trainer, TrainShard


class TrainActor(Actor):
    """Trains in step with the other ranks: each verb must be called on all of them."""

    def __init__(self, args: Args, rank: int, surroundings: Surroundings) -> None:
        super().__init__(f"train_{rank}", surroundings)
        # OpenMP reads this once, when torch is imported below. Ray has set it to 1.
        os.environ["OMP_NUM_THREADS"] = str(args.train_threads)
        self._args = args
        self._rank = rank
        self._trainer: Trainer | None = None
        self._backend: TrainBackend | None = None

    def address(self) -> tuple[str, int]:
        """Return this node's address and a free port: where the ranks meet, if this is rank 0."""
        host = ray.util.get_node_ip_address() if self._args.actor_num_nodes > 1 else "127.0.0.1"
        with socket.socket() as probe:
            probe.bind((host, 0))
            return host, probe.getsockname()[1]

    def setup(self, master_address: str, master_port: int) -> None:
        """Join the process group and load the model."""
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

        args, checkpoint = self._args, self._args.hf_checkpoint
        processor = load_processor(checkpoint)
        masked = never_sampled(processor.tokenizer, model_facts(checkpoint).vocab_size)
        self._backend = create_backend(args, self._rank, args.num_train_ranks, masked)
        self._trainer = Trainer(args, self._backend, processor, masked)

    def train(self, rollout_id: int, shard: TrainShard) -> dict[str, float]:
        """Take the optimizer steps of one rollout; return metrics, the same on every rank."""
        if self._trainer is None:
            raise RuntimeError(f"train_{self._rank} has no trainer yet; call setup() first")
        with self.stopwatch.stage("train", rollout_id=rollout_id):
            return self._trainer.train(rollout_id, shard)

    def weight_version(self) -> int:
        """Return the number of optimizer steps behind the weights."""
        return self._ready().weight_version

    def export_weights(self, path: str) -> int:
        """Write the full weights as a Hugging Face folder; return bytes. Rank 0 writes, all gather."""
        from slime.weight_sync.disk import write_weights

        with self.stopwatch.stage("export weights", version=self.weight_version()):
            return write_weights(
                self._ready().hf_named_parameters(),
                Path(path),
                checkpoint=Path(self._args.hf_checkpoint),
                writes=self._rank == 0,
            )

    def save(self, path: str) -> None:
        """Write model, optimizer and schedule below `path`."""
        with self.stopwatch.stage("save", version=self.weight_version()):
            self._ready().save_checkpoint(Path(path))

    def load(self, path: str) -> None:
        """Read what `save` wrote."""
        self._ready().load_checkpoint(Path(path))

    def _ready(self) -> TrainBackend:
        if self._backend is None:
            raise RuntimeError(f"train_{self._rank} has no backend yet; call setup() first")
        return self._backend
