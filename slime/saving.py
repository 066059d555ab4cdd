"""When the run is written down: checkpoints to go on from, and models for others to load.

A checkpoint is written while its rollout is the trainers' turn, and completed when that rollout's metrics are
on the disk: whatever kills the run, no rollout before the checkpoint is without its metrics.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from slime.checkpoints import (
    RunState,
    begin_checkpoint,
    checkpoints_in,
    damage,
    finish_checkpoint,
    keep_newest,
    maker_of,
)
from slime.durable import begin_folder, finish_folder
from slime.ray.cluster import ActorError
from slime.ray.interrupts import shielded
from slime.ray.rollout_group import RolloutGroup
from slime.ray.train_group import TrainGroup

if TYPE_CHECKING:
    from slime.arguments import Args

HF_FOLDER = "hf"


class SaveError(RuntimeError):
    """A checkpoint could not be written; those before it are as they were."""


class Saver:
    """Writes what `--save-interval` and `--save-hf-interval` ask for."""

    def __init__(self, args: Args, trainers: TrainGroup) -> None:
        self._args = args
        self._trainers = trainers
        self._partial: Path | None = None
        """The checkpoint that is written, and does not count yet."""
        self._saved = 0
        """Rollouts behind the newest checkpoint that counts, or behind the beginning."""

    def write(self, state: RunState) -> dict[str, float]:
        """Write what is due after `state.rollout_id` rollouts, before their weights leave the trainers' turn;
        return what it took."""
        if self._args.save is None:
            return {}
        save, metrics = Path(self._args.save), {}
        if is_due(self._args.save_interval, state.rollout_id, self._args.num_rollout):
            start = time.perf_counter()
            self._write_checkpoint(save, state)
            metrics["perf/save_seconds"] = time.perf_counter() - start
        every = self._args.save_hf_interval
        if every is not None and is_due(every, state.rollout_id, self._args.num_rollout):
            start = time.perf_counter()
            path = save / HF_FOLDER / f"rollout-{state.rollout_id:06d}"
            partial = begin_folder(path)
            with whole_or_not_at_all(partial, save, state):
                self._trainers.export(partial)
                finish_folder(partial, path)
            metrics["perf/export_seconds"] = time.perf_counter() - start
        return metrics

    def complete(self, state: RunState) -> None:
        """Let the checkpoint that was written count, and remove the oldest."""
        if self._partial is None:
            return
        with whole_or_not_at_all(self._partial, self._partial.parent, state):
            path = finish_checkpoint(self._partial, state, maker_of(self._args))
        self._partial = None
        self._saved = state.rollout_id
        keep_newest(path, self._args.save_keep)

    @contextmanager
    def saving_at_a_signal(self, state: RunState, rollouts: RolloutGroup) -> Iterator[None]:
        """Write what has been trained since the last checkpoint when a signal ends the block.

        The rollout that is being made is lost; a run that goes on makes it from the same prompts.
        """
        self._saved = state.rollout_id
        try:
            yield
        except KeyboardInterrupt:
            with shielded():
                self._save_before_the_end(state, rollouts)
            raise

    def _save_before_the_end(self, state: RunState, rollouts: RolloutGroup) -> None:
        if self._args.save is None or state.rollout_id == self._saved:
            return
        sys.stderr.write(f"A signal: saving what {state.rollout_id} rollouts have taught, then ending.\n")
        rollouts.end()  # the trainers need the memory that they share, and nobody to answer to
        self._trainers.outlive_engines()
        self._write_checkpoint(Path(self._args.save), state)
        self.complete(state)

    def _write_checkpoint(self, save: Path, state: RunState) -> None:
        self._partial = begin_checkpoint(save, state.rollout_id)
        with whole_or_not_at_all(self._partial, save, state):
            self._trainers.save(self._partial)


@contextmanager
def whole_or_not_at_all(partial: Path, save: Path, state: RunState) -> Iterator[None]:
    """Remove what was written where not all of it can be, on a full disk, say: it may take all the room.

    Raises:
        SaveError: that happened; the message ends with what there is to go on from.
    """
    try:
        yield
    except (ActorError, OSError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        free = shutil.disk_usage(save).free / 1e6
        whole = next((path for path in checkpoints_in(save) if damage(path) is None), None)
        rest = "There is no whole checkpoint" if whole is None else f"The newest whole checkpoint is {whole}"
        raise SaveError(
            f"{error}\nWhat {state.rollout_id} rollouts have taught could not be written to {save}, where "
            f"{free:,.0f} MB are free. {rest}. Make room or give another --save; --load {save} goes on from "
            "there."
        ) from error


def is_due(interval: int | None, done: int, whole: int) -> bool:
    """Tell whether to write after `done` of `whole` rollouts: every `interval`, and after the last."""
    return done == whole or (bool(interval) and done % interval == 0)
