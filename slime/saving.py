"""When the run is written down: checkpoints to go on from, and models for others to load.

A checkpoint is written while its rollout is the trainers' turn, and completed when that rollout's metrics are
on the disk: whatever kills the run, no rollout before the checkpoint is without its metrics.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from slime.checkpoints import RunState, begin_checkpoint, finish_checkpoint, keep_newest, maker_of
from slime.durable import begin_folder, finish_folder
from slime.ray.train_group import TrainGroup
from slime.supply import Supply

if TYPE_CHECKING:
    from slime.arguments import Args

HF_FOLDER = "hf"


class Saver:
    """Writes what `--save-interval` and `--save-hf-interval` ask for."""

    def __init__(self, args: Args, supply: Supply, trainers: TrainGroup) -> None:
        self._args = args
        self._supply = supply
        self._trainers = trainers
        self._partial: Path | None = None

    def write(self, state: RunState) -> dict[str, float]:
        """Write what is due after `state.rollout_id` rollouts, before their weights leave the trainers' turn;
        return what it took."""
        if self._args.save is None:
            return {}
        save, metrics = Path(self._args.save), {}
        if is_due(self._args.save_interval, state.rollout_id, self._args.num_rollout):
            start = time.perf_counter()
            state.data = self._supply.state_dict()
            self._partial = begin_checkpoint(save, state.rollout_id)
            self._trainers.save(self._partial)
            metrics["perf/save_seconds"] = time.perf_counter() - start
        every = self._args.save_hf_interval
        if every is not None and is_due(every, state.rollout_id, self._args.num_rollout):
            start = time.perf_counter()
            path = save / HF_FOLDER / f"rollout-{state.rollout_id:06d}"
            partial = begin_folder(path)
            self._trainers.export(partial)
            finish_folder(partial, path)
            metrics["perf/export_seconds"] = time.perf_counter() - start
        return metrics

    def complete(self, state: RunState) -> None:
        """Let the checkpoint that was written count, and remove the oldest."""
        if self._partial is None:
            return
        path = finish_checkpoint(self._partial, state, maker_of(self._args))
        self._partial = None
        keep_newest(path, self._args.save_keep)


def is_due(interval: int | None, done: int, whole: int) -> bool:
    """Tell whether to write after `done` of `whole` rollouts: every `interval`, and after the last."""
    return done == whole or (interval is not None and done % interval == 0)
