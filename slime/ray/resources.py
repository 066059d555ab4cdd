"""What the student's processes ask of Ray: how many ranks and engines, and the GPUs of each. Pure.

The placement (`placement.py`) has given the student its GPUs before Ray starts; this divides them by the
flags of the training command, and refuses what does not fit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class ResourceArgs(Protocol):
    """What the division reads of the arguments."""

    @property
    def num_train_ranks(self) -> int: ...
    @property
    def actor_num_nodes(self) -> int: ...
    @property
    def actor_num_gpus_per_node(self) -> int: ...
    @property
    def rollout_num_gpus(self) -> int | None: ...
    @property
    def rollout_num_gpus_per_engine(self) -> int: ...
    @property
    def rollout_engine_urls(self) -> tuple[str, ...]: ...
    @property
    def replays(self) -> bool: ...
    @property
    def engine(self) -> str: ...


@dataclass(frozen=True, kw_only=True)
class Resources:
    """The student's share of a cluster."""

    num_ranks: int
    num_nodes: int
    gpus_per_rank: float
    """0 on a CPU, a half where the one GPU is shared with the engine."""
    num_engines: int
    gpus_per_engine: float

    def describe(self) -> str:
        """Return the division as one line."""
        ranks = f"{self.num_ranks} training rank{'s' if self.num_ranks > 1 else ''}"
        engines = f"{self.num_engines} engine{'s' if self.num_engines != 1 else ''} of our own"
        if self.gpus_per_rank == 0:
            return f"student: {ranks} and {engines} on the CPU"
        if self.gpus_per_rank < 1:
            return f"student: {ranks} and {engines} share one GPU"
        return f"student: {ranks} of 1 GPU, {engines} of {self.gpus_per_engine:g}"


def plan_resources(args: ResourceArgs, num_gpus: int) -> Resources:
    """Divide the `num_gpus` GPUs that Ray sees between training ranks and engines.

    Raises:
        ValueError: they do not suffice; the message names the flags.
    """
    ranks, per_engine = args.num_train_ranks, args.rollout_num_gpus_per_engine
    external = bool(args.rollout_engine_urls) or args.replays
    if num_gpus == 0:
        engines = 0 if external else max(1, (args.rollout_num_gpus or 0) // per_engine)
        return Resources(
            num_ranks=ranks,
            num_nodes=args.actor_num_nodes,
            gpus_per_rank=0,
            num_engines=engines,
            gpus_per_engine=0,
        )
    rollout = args.rollout_num_gpus
    if rollout is None:
        rollout = max(1, num_gpus - ranks)
    if external:
        rollout = 0
    shared = ranks == rollout == num_gpus == 1 and args.engine == "transformers"
    if ranks + rollout > num_gpus and not shared:
        raise ValueError(
            f"Ray sees {num_gpus} GPUs; {ranks} training ranks (--actor-num-nodes x "
            f"--actor-num-gpus-per-node) and --rollout-num-gpus {rollout} need {ranks + rollout}. Lower one "
            "of them; sharing GPUs needs --colocate, which has not landed, or one GPU and --engine "
            "transformers."
        )
    if not external and (rollout < 1 or rollout % per_engine):
        raise ValueError(
            f"{rollout} GPUs are left to generate, which --rollout-num-gpus-per-engine {per_engine} does not "
            "divide into engines. Change it, --rollout-num-gpus or --actor-num-gpus-per-node."
        )
    return Resources(
        num_ranks=ranks,
        num_nodes=args.actor_num_nodes,
        gpus_per_rank=0.5 if shared else 1,
        num_engines=rollout // per_engine,
        gpus_per_engine=0.5 if shared else per_engine,
    )
