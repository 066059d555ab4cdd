"""Who gets which processes and GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from slime.arguments.flags import flag


@dataclass(frozen=True, kw_only=True)
class ClusterArgs:
    """Cluster"""

    actor_num_nodes: int = flag(1, help="Nodes that train.", at_least=1)
    actor_num_gpus_per_node: int = flag(
        help="GPUs that train, per node; one training rank each. Without a GPU: training ranks on gloo.",
        derive=lambda args: 1,
        derived_from="1",
        at_least=1,
    )
    num_gpus_per_node: int = flag(8, help="GPUs of a node, all purposes together.", at_least=1)
    rollout_num_gpus: int | None = flag(
        None,
        help="GPUs that generate for the student, over all nodes. Default: the placement plan decides.",
        at_least=0,
    )
    rollout_num_gpus_per_engine: int = flag(
        1, help="GPUs (tensor parallelism) of one student engine.", at_least=1
    )
    colocate: bool = flag(False, help="Training and generation take turns on the same GPUs.")
    train_backend: Literal["fsdp", "megatron"] = flag("fsdp", help="What shards and trains the student.")
    ray_address: str | None = flag(
        None,
        help='Address of a Ray cluster that is already there ("auto" finds it). Default: one of our own.',
    )

    @property
    def num_train_ranks(self) -> int:
        """World size of the training process group."""
        return self.actor_num_nodes * self.actor_num_gpus_per_node

    def validate(self) -> Iterator[str]:
        """Yield what is wrong inside this group."""
        if self.actor_num_nodes > 1 and self.actor_num_gpus_per_node > self.num_gpus_per_node:
            yield (
                f"--actor-num-gpus-per-node is {self.actor_num_gpus_per_node} and --num-gpus-per-node "
                f"{self.num_gpus_per_node}: a node cannot train on more GPUs than it has. Lower the first or "
                "raise the second."
            )
        if self.rollout_num_gpus and self.rollout_num_gpus % self.rollout_num_gpus_per_engine:
            yield (
                f"--rollout-num-gpus {self.rollout_num_gpus} is no multiple of "
                f"--rollout-num-gpus-per-engine {self.rollout_num_gpus_per_engine}: some GPUs would belong "
                "to no engine. Change one of them."
            )
