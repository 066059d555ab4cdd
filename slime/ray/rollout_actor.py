"""The rollout side of the run: one actor that owns the `RolloutManager` and hands each training rank its
shard.

Shards go into Ray's object store here, so samples and pictures never pass through the driver.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import ray

from slime.ray.actor import Actor, Surroundings

if TYPE_CHECKING:
    from slime.arguments import Args
    from slime.rollout.manager import RolloutManager
    from slime.rollout.rollout import RolloutBatch
    from slime.utils.types import Sample
    from slime.weight_sync.probe import Probe

Who = Literal["student", "teacher"]


@dataclass(frozen=True, kw_only=True)
class RolloutResult:
    """One rollout, as the driver sees it."""

    shards: list[ray.ObjectRef]
    """One `TrainShard` per training rank."""
    metrics: dict[str, float]
    ended: float = field(default_factory=time.time)
    """When it was whole: seconds since the epoch."""


class PictureSource(Protocol):
    """What shards need beside the samples."""

    @property
    def merge_size(self) -> int: ...
    def pictures(self, hashes: Iterable[str]) -> dict[str, bytes]: ...


def put_shards(
    args: Args, rollout_id: int, batch: RolloutBatch, source: PictureSource
) -> list[ray.ObjectRef]:
    """Put one rollout's shards into the object store; return one for each training rank.

    Ranks that share a model share a shard.
    """
    from slime.trainer import build_shards

    shards = build_shards(
        args,
        batch.samples,
        source.pictures(batch.image_hashes()),
        args.num_data_ranks,
        rollout_id,
        merge_size=source.merge_size,
    )
    refs = [ray.put(shard) for shard in shards]
    return [refs[args.data_rank(rank)] for rank in range(args.num_train_ranks)]


class RolloutActor(Actor):
    """Generates, scores and evaluates; keeps the position in the data."""

    def __init__(self, args: Args, surroundings: Surroundings) -> None:
        super().__init__("rollout", surroundings, on_terminal=True)
        self._args = args
        self._manager: RolloutManager | None = None
        self._version: str | None = None

    def setup(self, engine_urls: Sequence[str]) -> None:
        """Load processor and data; the engines need not answer yet."""
        from slime.rollout.manager import RolloutManager

        self._manager = RolloutManager(self._args, list(engine_urls))
        # What the imports brought stays for ever. Out of the collector's sight it no longer stops the loop
        # for the 200 ms that walking it takes.
        gc.collect()
        gc.freeze()

    def generate(self, rollout_id: int) -> RolloutResult:
        """Sample and score one rollout and put its shards into the object store.

        Raises:
            RuntimeError: an answer came from other weights than the last published ones.
        """
        manager = self._ready()
        start = time.perf_counter()
        with self.stopwatch.stage("rollout", rollout_id=rollout_id):
            batch = manager.generate(rollout_id)
        self.stopwatch.add(*batch.spans)
        self._check_versions(batch.samples)
        generated = time.perf_counter()
        with self.stopwatch.stage("shards", rollout_id=rollout_id):
            refs = put_shards(self._args, rollout_id, batch, manager)
        tokens = sum(sample.response_length for sample in batch.samples)
        now = time.perf_counter()
        times = {
            "response_tokens": float(tokens),
            "perf/rollout_seconds": now - start,
            "perf/rollout_tokens_per_second": tokens / (now - start),
            "perf/shards_seconds": now - generated,
        }
        return RolloutResult(shards=refs, metrics=batch.metrics | times)

    def evaluate(self, rollout_id: int, who: Who) -> dict[str, float]:
        """Return the held-out accuracy of the student's engines or of the teacher."""
        with self.stopwatch.stage("evaluation", rollout_id=rollout_id, who=who):
            return self._ready().evaluate(rollout_id, who)

    def expect_version(self, version: str) -> None:
        """From now on every answer must come from the weights `version`, which all engines have."""
        self._ready().expect_version(version)
        self._version = version

    def probe(self) -> Probe:
        """Let every engine answer the same prompt."""
        with self.stopwatch.stage("probe"):
            return self._ready().probe()

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the data."""
        return self._ready().state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position that `state_dict` gave."""
        self._ready().load_state_dict(state)

    def close(self) -> None:
        """End what the manager started."""
        if self._manager is not None:
            self._manager.close()

    def _check_versions(self, samples: Sequence[Sample]) -> None:
        if self._version is None or self._args.sample_from == "teacher":
            return
        for sample in samples:
            stale = set(sample.weight_versions) - {self._version}
            if stale or (sample.response_length and not sample.weight_versions):
                raise RuntimeError(
                    f"sample {sample.index} was generated by weights {sample.weight_versions} after version "
                    f"{self._version} was published; an engine kept its old weights. Look at the engines' "
                    "logs in the output folder."
                )

    def _ready(self) -> RolloutManager:
        if self._manager is None:
            raise RuntimeError("the rollout actor has no manager yet; call setup() first")
        return self._manager
