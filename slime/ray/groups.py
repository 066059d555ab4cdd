"""The actors as the loop sees them: one object that rolls out, one that trains, plain synchronous calls."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from slime.ray.cluster import Cluster
from slime.ray.engine_actor import EngineActor
from slime.ray.replay_actor import ReplayActor
from slime.ray.rollout_actor import RolloutActor, RolloutResult, Who
from slime.ray.train_actor import TrainActor
from slime.weight_sync.store import WeightStore

if TYPE_CHECKING:
    from slime.arguments import Args

SCHEDULE_SECONDS = 120.0
TRAINER_FOLDER = "trainer"


class RolloutGroup:
    """The student's engines and the actor that asks them. Starting returns at once; `wait_ready` waits."""

    has_engines = True
    """Whether anybody answers an evaluation and takes new weights."""

    def __init__(self, cluster: Cluster, args: Args) -> None:
        self._cluster = cluster
        self._ready: list[ray.ObjectRef] = []
        urls = list(args.rollout_engine_urls) or self._start_engines(args)
        self._actor = cluster.start_actor("rollout", RolloutActor, args)
        cluster.watch("rollout")
        self._ready.append(self._actor.setup.remote(urls))

    def wait_ready(self) -> None:
        """Return once data are loaded and every engine answers."""
        self._cluster.wait(self._ready)

    def generate(self, rollout_id: int) -> RolloutResult:
        """Sample and score one rollout."""
        return self._call(self._actor.generate, rollout_id)

    def generate_later(self, rollout_id: int) -> ray.ObjectRef:
        """Order a rollout; `result` waits for it, and whatever is waited for before fails where it fails.

        The actor does one thing at a time, so weights that are sent to it meanwhile come after it.
        """
        ref = self._actor.generate.remote(rollout_id)
        self._cluster.expect(ref)
        return ref

    def evaluate(self, rollout_id: int, who: Who) -> dict[str, float]:
        """Return the held-out accuracy of the student or the teacher."""
        return self._call(self._actor.evaluate, rollout_id, who)

    def evaluate_later(self, rollout_id: int, who: Who) -> ray.ObjectRef:
        """Order an evaluation; `result` waits for it."""
        return self._actor.evaluate.remote(rollout_id, who)

    def result(self, ref: ray.ObjectRef) -> Any:
        """Return what was ordered."""
        return self._cluster.wait([ref])[0]

    def update_weights(self, path: Path, version: str) -> None:
        """Load the weights at `path` into every engine."""
        self._call(self._actor.update_weights, str(path), version)

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the data."""
        return self._call(self._actor.state_dict)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position that `state_dict` gave."""
        self._call(self._actor.load_state_dict, state)

    def _call(self, method: Any, *arguments: Any) -> Any:
        return self._cluster.wait([method.remote(*arguments)])[0]

    def _start_engines(self, args: Args) -> list[str]:
        resources = self._cluster.resources
        engines = {
            f"engine_{number}": self._cluster.start_actor(
                f"engine_{number}", EngineActor, args, number, num_gpus=resources.gpus_per_engine
            )
            for number in range(resources.num_engines)
        }
        urls = self._cluster.wait([engine.start.remote() for engine in engines.values()])
        for name, engine in engines.items():
            self._cluster.stop_at_end(engine)
            self._cluster.watch(name)
            self._ready.append(engine.wait_ready.remote())
        return urls


class ReplayGroup(RolloutGroup):
    """Recorded rollouts in their place, read by an actor of its own. The arguments refuse evaluations."""

    has_engines = False

    def __init__(self, cluster: Cluster, args: Args) -> None:
        self._cluster = cluster
        self._actor = cluster.start_actor("replay", ReplayActor, args)
        cluster.watch("replay")
        self._ready = [self._actor.setup.remote()]


class TrainGroup:
    """All training ranks, and the folder through which their weights reach the engines."""

    def __init__(self, cluster: Cluster, args: Args, store: WeightStore) -> None:
        self._cluster = cluster
        self._store = store
        self.step = 0
        """Optimizer steps behind the published weights; as a string, their version."""
        self._actors = [
            cluster.start_actor(
                f"train_{rank}",
                TrainActor,
                args,
                rank,
                num_gpus=cluster.resources.gpus_per_rank,
                scheduling=scheduling,
            )
            for rank, scheduling in enumerate(_scheduling(cluster))
        ]
        for rank in range(len(self._actors)):
            cluster.watch(f"train_{rank}")
        host, port = cluster.wait([self._actors[0].address.remote()])[0]
        self._ready = [actor.setup.remote(host, port) for actor in self._actors]

    def wait_ready(self) -> None:
        """Return once every rank has its model."""
        self._cluster.wait(self._ready)

    def train(self, rollout_id: int, shards: list[ray.ObjectRef]) -> dict[str, float]:
        """Take the optimizer steps of one rollout, a shard for each rank; return metrics."""
        start = time.perf_counter()
        refs = [
            actor.train.remote(rollout_id, shard) for actor, shard in zip(self._actors, shards, strict=True)
        ]
        metrics = self._cluster.wait(refs)[0]
        return metrics | {"perf/train_seconds": time.perf_counter() - start}

    def publish_weights(self, rollouts: RolloutGroup) -> dict[str, float]:
        """Bring the trainer's weights to the engines, where there are any; what they sample next comes from
        these."""
        start = time.perf_counter()
        self.step = self._cluster.wait([self._actors[0].weight_version.remote()])[0]
        if not rollouts.has_engines:
            return {}
        version = str(self.step)
        path = self._store.path_for(version)
        if path != self._store.current:
            self._everywhere("export_weights", str(path))
        exported = time.perf_counter()
        rollouts.update_weights(path, version)
        self._store.retire_all_but(version)
        return {
            "perf/export_seconds": exported - start,
            "perf/sync_seconds": time.perf_counter() - start,
        }

    def save(self, checkpoint: Path) -> None:
        """Write model, optimizer and schedule into the folder of a checkpoint."""
        self._everywhere("save", str(checkpoint.resolve() / TRAINER_FOLDER))

    def load(self, checkpoint: Path) -> None:
        """Read what `save` wrote."""
        self._everywhere("load", str(checkpoint.resolve() / TRAINER_FOLDER))

    def _everywhere(self, method: str, *arguments: Any) -> list[Any]:
        return self._cluster.wait([getattr(actor, method).remote(*arguments) for actor in self._actors])


def _scheduling(cluster: Cluster) -> list[PlacementGroupSchedulingStrategy | None]:
    """Return where to put each rank: whole nodes' shares at once, so that ranks count node by node."""
    resources = cluster.resources
    if resources.gpus_per_rank < 1:
        return [None] * resources.num_ranks
    per_node = resources.num_ranks // resources.num_nodes
    bundles: list[dict[str, float]] = [{"GPU": per_node}] * resources.num_nodes
    group = placement_group(bundles, strategy="STRICT_SPREAD" if resources.num_nodes > 1 else "PACK")
    if not group.wait(SCHEDULE_SECONDS):
        raise RuntimeError(
            f"Ray found no {resources.num_nodes} nodes with {per_node} free GPUs each for --actor-num-nodes "
            f"and --actor-num-gpus-per-node within {SCHEDULE_SECONDS:g} s; look at `ray status`."
        )
    return [
        PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank // per_node)
        for rank in range(resources.num_ranks)
    ]
