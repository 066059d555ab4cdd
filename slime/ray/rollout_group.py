"""The rollout side of a run as the loop sees it: plain synchronous calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import ray

from slime.ray.cluster import Cluster, EnginesLost
from slime.ray.engine_group import Engines, NoEngines
from slime.ray.replay_actor import ReplayActor
from slime.ray.rollout_actor import RolloutActor, RolloutResult, Who

if TYPE_CHECKING:
    from slime.arguments import Args


class RolloutGroup:
    """The student's engines and the actor that asks them. Starting returns at once; `wait_ready` waits."""

    name = "rollout"

    def __init__(self, cluster: Cluster, args: Args, engines: Engines) -> None:
        self._cluster = cluster
        self._revive: Callable[[], object] | None = None
        self.engines = engines
        self._actor = cluster.start_actor(self.name, RolloutActor, args)
        cluster.watch(self.name)
        self._ready = self._actor.setup.remote(self.engines.urls)

    @property
    def has_engines(self) -> bool:
        """Whether anybody answers an evaluation and takes new weights."""
        return bool(self.engines.urls)

    def when_engines_are_lost(self, revive: Callable[[], object]) -> None:
        """Call `revive` when no engine has the current weights any more, then ask once again."""
        self._revive = revive

    def wait_ready(self) -> None:
        """Return once data are loaded and every engine answers."""
        self._cluster.wait([self._ready])
        self.engines.members()

    def generate(self, rollout_id: int) -> RolloutResult:
        """Sample and score one rollout."""
        return self._generating(self._actor.generate, rollout_id)

    def generate_later(self, rollout_id: int) -> ray.ObjectRef:
        """Order a rollout; `result` waits for it, and whatever is waited for before fails where it fails.

        The actor does one thing at a time, so what it is told of weights meanwhile comes after it.
        """
        self.engines.set_generating(True)
        ref = self._actor.generate.remote(rollout_id)
        self._cluster.expect(ref)
        return ref

    def evaluate(self, rollout_id: int, who: Who) -> dict[str, float]:
        """Return the held-out accuracy of the student or the teacher."""
        return self._generating(self._actor.evaluate, rollout_id, who)

    def evaluate_later(self, rollout_id: int, who: Who) -> ray.ObjectRef:
        """Order an evaluation; `result` waits for it."""
        return self._actor.evaluate.remote(rollout_id, who)

    def result(self, ref: ray.ObjectRef) -> Any:
        """Return what was ordered.

        Raises:
            EnginesLost: no engine has the current weights any more; what was ordered must be ordered again.
        """
        try:
            ordered = self._cluster.wait([ref])[0]
        except EnginesLost:
            self.engines.set_generating(False)
            raise
        self.engines.set_generating(False)
        return ordered

    def end(self) -> None:
        """End who asks the engines, and those engines that are this run's, in the middle of a rollout."""
        self._cluster.end([self.name])
        self.engines.end()

    def expect_version(self, version: str) -> None:
        """From now on every answer must come from the weights `version`, which all engines have."""
        self._call(self._actor.expect_version, version)

    def probe(self) -> ray.ObjectRef:
        """Return what every engine answers to the same prompt, for the trainers to compare."""
        self.engines.set_generating(True)
        ref = self._actor.probe.remote()
        self.result(ref)
        return ref

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the data."""
        return self._call(self._actor.state_dict)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position that `state_dict` gave."""
        self._call(self._actor.load_state_dict, state)

    def _generating(self, method: Any, *arguments: Any) -> Any:
        """Call what needs the engines; where all are lost, once again after they were given weights anew."""
        try:
            return self._once(method, *arguments)
        except EnginesLost:
            if self._revive is None:
                raise
        self._revive()
        return self._once(method, *arguments)

    def _once(self, method: Any, *arguments: Any) -> Any:
        self.engines.set_generating(True)
        return self.result(method.remote(*arguments))

    def _call(self, method: Any, *arguments: Any) -> Any:
        return self._cluster.wait([method.remote(*arguments)])[0]


class ReplayGroup(RolloutGroup):
    """Recorded rollouts in their place, read by an actor of its own. The arguments refuse evaluations."""

    name = "replay"

    def __init__(self, cluster: Cluster, args: Args) -> None:
        self._cluster = cluster
        self._revive = None
        self.engines: Engines = NoEngines()
        self._actor = cluster.start_actor(self.name, ReplayActor, args)
        cluster.watch(self.name)
        self._ready = self._actor.setup.remote()
