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
    @property
    def colocate(self) -> bool: ...
    @property
    def weight_sync(self) -> str: ...


@dataclass(frozen=True, kw_only=True)
class Resources:
    """The student's share of a cluster."""

    num_ranks: int
    num_nodes: int
    gpus_per_rank: float
    """0 on a CPU, a half where the one GPU is shared with the engine."""
    num_engines: int
    gpus_per_engine: float
    """With `colocated` those of as many training ranks."""
    colocated: bool = False
    """Whether engines and ranks take turns on the same GPUs."""

    def describe(self) -> str:
        """Return the division as one line."""
        ranks = f"{self.num_ranks} training rank{'s' if self.num_ranks > 1 else ''}"
        engines = f"{self.num_engines} engine{'s' if self.num_engines != 1 else ''} of our own"
        turns = ", taking turns" if self.colocated else ""
        if self.gpus_per_rank == 0:
            return f"student: {ranks} and {engines} on the CPU{turns}"
        if self.gpus_per_rank < 1:
            return f"student: {ranks} and {engines} share one GPU"
        if self.colocated:
            same = f"on the same GPUs {engines} of {self.gpus_per_engine:g}{turns}"
            return f"student: {ranks} of 1 GPU, and {same}"
        return f"student: {ranks} of 1 GPU, {engines} of {self.gpus_per_engine:g}"


def plan_resources(args: ResourceArgs, num_gpus: int) -> Resources:
    """Divide the `num_gpus` GPUs that Ray sees between training ranks and engines.

    Raises:
        ValueError: they do not suffice; the message names the flags.
    """
    ranks, per_engine = args.num_train_ranks, args.rollout_num_gpus_per_engine
    external = bool(args.rollout_engine_urls) or args.replays
    if num_gpus and args.weight_sync == "tensor" and not (args.colocate or external):
        raise ValueError(
            "--weight-sync tensor hands over memory of GPUs that trainer and engines share, and without "
            "--colocate each has its own. Add it, or use --weight-sync distributed."
        )
    if num_gpus == 0:
        if args.colocate and args.engine == "sglang":
            raise ValueError(
                "--colocate asks the engines to release their memory, of which an SGLang server on a CPU "
                "dies, and Ray sees no GPU. Drop it, or use --engine transformers."
            )
        engines = 0 if external else max(1, (args.rollout_num_gpus or 0) // per_engine)
        return Resources(
            num_ranks=ranks,
            num_nodes=args.actor_num_nodes,
            gpus_per_rank=0,
            num_engines=engines,
            gpus_per_engine=0,
            colocated=args.colocate,
        )
    if args.colocate:
        return _shared(args, num_gpus)
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
            "of them, or let both take turns by --colocate."
        )
    if shared and args.weight_sync == "distributed":
        raise ValueError(
            "--weight-sync distributed needs a GPU of its own for each who takes part, and trainer and "
            "engine share one. Use --weight-sync disk, or --colocate."
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


def _shared(args: ResourceArgs, num_gpus: int) -> Resources:
    """Give every rank a GPU, and each engine those of as many ranks in a row."""
    ranks = args.num_train_ranks
    if ranks > num_gpus:
        raise ValueError(
            f"Ray sees {num_gpus} GPUs and {ranks} training ranks (--actor-num-nodes x "
            "--actor-num-gpus-per-node) need one each. Lower one of them."
        )
    return Resources(
        num_ranks=ranks,
        num_nodes=args.actor_num_nodes,
        gpus_per_rank=1,
        num_engines=ranks // args.rollout_num_gpus_per_engine,
        gpus_per_engine=args.rollout_num_gpus_per_engine,
        colocated=True,
    )
