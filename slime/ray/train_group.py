"""The training side of a run as the loop sees it: plain synchronous calls."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from slime.ray.cluster import Cluster, EnginesLost
from slime.ray.engine_group import SharedGpus
from slime.ray.rollout_group import RolloutGroup
from slime.ray.train_actor import TrainActor, TrainResult
from slime.ray.turns import Apart, Sleepers, Turns
from slime.skipping.account import SkipAccount, joined
from slime.weight_sync.probe import Gap, require_same

if TYPE_CHECKING:
    from slime.arguments import Args

SCHEDULE_SECONDS = 120.0
TRAINER_FOLDER = "trainer"
ROUNDS = 5
"""How often weights are sent at most until no engine is lost meanwhile. How often one may be started anew is
its keeper's business; what is never reached, and seems to live, must have an end here."""
NOTICE_SECONDS = 2.0
"""In which the keeper of a server that has died learns of it: a round before that finds it dead again."""
FIRST_CHECKS = 2
"""Versions of the weights that `--check-weight-sync first` compares. The engines come with the first weights,
so that it is the second, after a step of training, that shows whether anything arrives."""


class TrainGroup:
    """All training ranks, and the way of their weights to the engines."""

    def __init__(self, cluster: Cluster, args: Args, weight_folder: Path | None) -> None:
        """`weight_folder` is where `--weight-sync disk` writes."""
        self._cluster = cluster
        self._args = args
        self._turns: Turns | Apart = Apart()
        self._probed: set[int] = set()
        """Steps whose weights have been compared."""
        self._probe: ray.ObjectRef | None = None
        self.step = 0
        """Optimizer steps behind the weights; as a string, their version."""
        self.skips = SkipAccount(args.max_skipped_steps)
        self._scheduling = _scheduling(cluster)
        self._actors = [
            cluster.start_actor(
                f"train_{rank}",
                TrainActor,
                args,
                rank,
                not cluster.one_machine,
                num_gpus=cluster.resources.gpus_per_rank,
                scheduling=scheduling,
            )
            for rank, scheduling in enumerate(self._scheduling)
        ]
        for rank in range(len(self._actors)):
            cluster.watch(f"train_{rank}")
        host, port = cluster.wait([self._actors[0].address.remote()])[0]
        folder = None if weight_folder is None else str(weight_folder)
        self._ready = [actor.setup.remote(host, port, folder) for actor in self._actors]

    def wait_ready(self) -> None:
        """Return once every rank has its model."""
        self._cluster.wait(self._ready)

    # ---- GPUs that the engines share ----

    def make_room(self) -> list[SharedGpus]:
        """Put all memory away and return the GPUs that each engine is to share. Before `take_turns`."""
        self.wait_ready()
        self.offload()
        gpus: list[tuple[int, ...]] = self._everywhere("gpus")
        size = max(1, int(self._cluster.resources.gpus_per_engine))
        return [
            SharedGpus(
                gpus=tuple(gpu for own in gpus[first : first + size] for gpu in own),
                scheduling=self._scheduling[first],
            )
            for first in range(0, self._cluster.resources.num_engines * size, size)
        ]

    def take_turns(self, engines: Sleepers) -> None:
        """From now on use the GPUs only when it is the trainers' turn."""
        self._turns = Turns(engines, self)

    def onload(self) -> None:
        """Bring model and optimizer back from the host's memory."""
        self._everywhere("onload")

    def offload_optimizer(self) -> None:
        """Put the optimizer's state into the host's memory."""
        self._everywhere("offload_optimizer")

    def offload(self) -> None:
        """Put model and optimizer into the host's memory."""
        self._everywhere("offload")

    # ---- the loop's verbs ----

    def train(self, rollout_id: int, shards: list[ray.ObjectRef]) -> dict[str, float]:
        """Take the optimizer steps of one rollout, a shard for each rank; return metrics.

        Steps that were skipped are in `skips`.
        """
        start = time.perf_counter()
        self._turns.to_training()
        begin = time.perf_counter()
        compared = self._compare()
        refs = [
            actor.train.remote(rollout_id, shard) for actor, shard in zip(self._actors, shards, strict=True)
        ]
        results: list[TrainResult] = self._cluster.wait(refs)
        self._count_steps()
        ended = time.perf_counter()
        metrics = results[0].metrics
        self.skips.enter(
            round(metrics["optimizer_steps"] + metrics["skipped_steps"]),
            joined([result.skipped for result in results]),
        )
        times = {"perf/train_seconds": ended - begin, "perf/take_turn_seconds": begin - start}
        return metrics | compared | times

    def publish_weights(self, rollouts: RolloutGroup) -> dict[str, float]:
        """Bring the trainer's weights to the engines, where there are any; what they sample next comes from
        these.

        An engine that dies meanwhile is started anew and gets them in another round.

        Raises:
            ActorError: an engine refused them.
            WeightMismatchError: an engine does not compute with them what the trainer does.
        """
        for _ in range(ROUNDS - 1):
            try:
                return self._publish(rollouts)
            except EnginesLost:
                if self._args.weight_sync == "distributed":
                    rollouts.engines.start_anew()  # those left wait in a broadcast for the one that is gone
                time.sleep(NOTICE_SECONDS)
        return self._publish(rollouts)

    def finish(self) -> None:
        """Compare the engines with the last weights, where that has waited for the trainers' turn.

        Raises:
            WeightMismatchError: an engine does not compute with them what the trainer does.
        """
        if self._probe is not None:
            self._turns.to_training()
            self._compare()

    def save(self, checkpoint: Path) -> None:
        """Write model, optimizer, schedule and generators into the folder of a checkpoint."""
        self._turns.to_training()
        self._everywhere("save", str(checkpoint.resolve() / TRAINER_FOLDER))

    def export(self, folder: Path) -> None:
        """Write the weights into an empty folder as Hugging Face's libraries load them."""
        self._turns.to_training()
        self._everywhere("export", str(folder.resolve()))

    def outlive_engines(self) -> None:
        """Take all memory: the engines have been ended, in whatever turn it was."""
        self._turns.to_the_end()

    def load(self, checkpoint: Path) -> None:
        """Read what `save` wrote."""
        self._turns.to_training()
        self._everywhere("load", str(checkpoint.resolve() / TRAINER_FOLDER))

    def _publish(self, rollouts: RolloutGroup) -> dict[str, float]:
        start = time.perf_counter()
        self._count_steps()
        if not rollouts.has_engines:
            return {}
        version = str(self.step)
        self._turns.to_sync()
        engines = rollouts.engines.members()  # who died in the trainers' turn is started anew now
        size = max(self._everywhere("publish_weights", engines, version))
        self._turns.to_generation()
        rollouts.expect_version(version)
        synced = time.perf_counter()
        metrics = {
            "perf/sync_seconds": synced - start,
            "perf/sync_megabytes": size / 1e6,
            "rollout/engine_restarts": float(sum(engine.incarnation for engine in engines)),
        }
        if self._probe_is_due():
            self._probe = rollouts.probe()
            self._probed.add(self.step)
        # Sharing GPUs, the trainers compare when it is their turn again: the weights are still these.
        return metrics | (self._compare() if isinstance(self._turns, Apart) else {})

    def _count_steps(self) -> None:
        self.step = self._cluster.wait([self._actors[0].weight_version.remote()])[0]

    def _probe_is_due(self) -> bool:
        when = self._args.check_weight_sync
        new = self.step not in self._probed and len(self._probed) < FIRST_CHECKS
        return when == "every" or (when == "first" and new)

    def _compare(self) -> dict[str, float]:
        """Compare every engine's log-probs of a response of its own with the trainer's, where that is due."""
        if self._probe is None:
            return {}
        gaps: list[Gap] = self._everywhere("compare", self._probe)[0]
        self._probe = None
        require_same(self._args, gaps, str(self.step))
        return {"sync/logprob_abs_diff": max(gap.largest for gap in gaps)}

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
