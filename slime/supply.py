"""Where the loop gets its rollouts from: each is made when it is asked for, or one ahead.

                 |  generate 0  |  train 0  |  sync  |  generate 1  |  train 1  |  sync  | ...
    --async-     |  generate 0  |  train 0     |  sync  |  train 1     |  sync  | ...
      rollout                   |  generate 1  |        |  generate 2  |

Ahead, rollout N + 1 is ordered as the training on N begins and is whole before the weights change, so all its
tokens come from one version: the one before the training on N. The first rollout of a run, resumed or not,
has nothing before it and is on-policy.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from slime.metrics.trace import Span, Trace
from slime.ray.cluster import EnginesLost
from slime.ray.rollout_actor import RolloutResult
from slime.ray.rollout_group import RolloutGroup
from slime.ray.train_group import TrainGroup

if TYPE_CHECKING:
    from slime.arguments import Args


class Supply:
    """The rollouts of a run in their order, and what the two sides of the loop waited for each other.

    Every turn of the loop calls `take`, trains, calls `settle`, changes the weights, and calls `end_turn`.
    """

    def __init__(self, args: Args, rollouts: RolloutGroup, trainers: TrainGroup, trace: Trace) -> None:
        self._args = args
        self._rollouts = rollouts
        self._trainers = trainers
        self._trace = trace
        self._rollout_id = 0
        self._ordered: Any = None
        self._ahead: RolloutResult | None = None
        self._position: dict[str, Any] | None = None
        """Where the data stood before the rollout ahead was ordered."""
        self._ahead_step = 0
        self._turn_began = self._taken = time.time()
        self._metrics: dict[str, float] = {}

    def take(self, rollout_id: int) -> RolloutResult:
        """Return a rollout, made now unless it was made ahead; order the next one, where that is wanted."""
        self._rollout_id = rollout_id
        self._metrics = {"perf/wait_for_rollout_seconds": 0.0, "perf/wait_for_train_seconds": 0.0}
        rollout, step = self._ahead, self._ahead_step
        if rollout is None:
            asked, step = time.time(), self._trainers.step
            rollout = self._rollouts.generate(rollout_id)
            self._waited("rollout", asked, time.time())
        self._ahead = self._position = None
        if self._args.async_rollout:
            self._metrics["rollout/steps_behind"] = float(self._trainers.step - step)
            if rollout_id + 1 < self._args.num_rollout:
                self._order(rollout_id + 1)
        self._taken = time.time()
        return rollout

    def settle(self) -> None:
        """Return once nothing is being generated; call it when the training ends."""
        trained, idle = time.time(), self._taken
        if self._ordered is not None:
            self._ahead, self._ordered = self._ordered_rollout(self._ordered), None
            self._waited("rollout", trained, time.time())
            idle = max(trained if self._ahead is None else self._ahead.ended, self._taken)
        self._waited("train", min(idle, trained), trained)

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the data from which a resumed run goes on: that of the next rollout, also
        where it is made already."""
        return self._rollouts.state_dict() if self._position is None else self._position

    def end_turn(self) -> dict[str, float]:
        """Return the times of this turn of the loop."""
        now = time.time()
        self._trace.add("loop", self._span("step", self._turn_began, now))
        seconds, self._turn_began = now - self._turn_began, now
        return self._metrics | {"perf/step_seconds": seconds}

    def _order(self, rollout_id: int) -> None:
        self._position = self._rollouts.state_dict()
        self._ahead_step = self._trainers.step
        self._ordered = self._rollouts.generate_later(rollout_id)

    def _ordered_rollout(self, ref: Any) -> RolloutResult | None:
        """Return the rollout ahead; None where its engines were lost: it is made when it is taken, then."""
        try:
            return self._rollouts.result(ref)
        except EnginesLost:
            self._position = None
            return None

    def _waited(self, what: str, start: float, end: float) -> None:
        """Note that one side of the loop stood still for the other."""
        self._metrics[f"perf/wait_for_{what}_seconds"] += end - start
        self._trace.add("loop", self._span(f"wait for {what}", start, end))

    def _span(self, stage: str, start: float, end: float) -> Span:
        facts = {"rollout_id": self._rollout_id}
        return Span(stage=stage, start=start, seconds=end - start, facts=facts)
