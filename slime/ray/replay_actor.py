"""The rollout side of a replay: one actor that reads recorded rollouts, and hands each training rank its
shard."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from slime.ray.actor import Actor, Surroundings
from slime.ray.rollout_actor import RolloutResult, put_shards

if TYPE_CHECKING:
    from slime.arguments import Args
    from slime.rollout.replay import RecordedRollouts


class ReplayActor(Actor):
    """Stands where a `RolloutActor` does; has no engines, so there is nothing to evaluate or to update."""

    def __init__(self, args: Args, surroundings: Surroundings) -> None:
        super().__init__("replay", surroundings)
        self._args = args
        self._recorded: RecordedRollouts | None = None

    def setup(self) -> None:
        """Read the model's facts."""
        from slime.rollout.replay import RecordedRollouts

        self._recorded = RecordedRollouts(self._args)

    def generate(self, rollout_id: int) -> RolloutResult:
        """Read one rollout and put its shards into the object store."""
        start = time.perf_counter()
        with self.stopwatch.stage("rollout", rollout_id=rollout_id):
            batch = self._ready().generate(rollout_id)
        read = time.perf_counter()
        with self.stopwatch.stage("shards", rollout_id=rollout_id):
            refs = put_shards(self._args, rollout_id, batch, self._ready())
        now = time.perf_counter()
        counts = {
            "response_tokens": float(sum(sample.response_length for sample in batch.samples)),
            "perf/replay_seconds": now - start,
            "perf/shards_seconds": now - read,
        }
        return RolloutResult(shards=refs, metrics=batch.metrics | counts)

    def state_dict(self) -> dict[str, Any]:
        """Return the recorded position in the data."""
        return self._ready().state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position that `state_dict` gave."""
        self._ready().load_state_dict(state)

    def _ready(self) -> RecordedRollouts:
        if self._recorded is None:
            raise RuntimeError("the replay actor has nothing to read yet; call setup() first")
        return self._recorded
