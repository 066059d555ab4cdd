"""Every flag of a run, declared once: frozen typed groups, flat on the outside (`args.rm_url`).

The lowest layer: it imports nothing else of slime. Functions take the narrowest group that they need; plugins
get the whole `Args`. Values that a flag derives from others are filled in here: nobody asks "and if it is
None?".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from slime.arguments.cluster import ClusterArgs
from slime.arguments.contradictions import contradictions
from slime.arguments.data import DataArgs
from slime.arguments.distillation import DistillationArgs
from slime.arguments.engine import EngineArgs, SglangArgs
from slime.arguments.evaluation import EvaluationArgs
from slime.arguments.flags import ArgumentsError, flags_of, range_problems
from slime.arguments.megatron import MegatronArgs
from slime.arguments.optim import BatchArgs, LossArgs, OptimArgs
from slime.arguments.parser import parse
from slime.arguments.pending import pending
from slime.arguments.printing import format_groups, printable
from slime.arguments.recording import RecordingArgs
from slime.arguments.reward import RewardArgs
from slime.arguments.rollout import RolloutArgs
from slime.arguments.run import CheckpointArgs, OutputArgs
from slime.arguments.weight_sync import WeightSyncArgs

GROUPS = (
    CheckpointArgs,
    DataArgs,
    RolloutArgs,
    EngineArgs,
    WeightSyncArgs,
    RewardArgs,
    DistillationArgs,
    LossArgs,
    BatchArgs,
    OptimArgs,
    EvaluationArgs,
    RecordingArgs,
    ClusterArgs,
    MegatronArgs,
    OutputArgs,
)
"""The groups whose fields are flags, in the order of `--help` and of the printed configuration."""


@dataclass(frozen=True, kw_only=True)
class Args(
    CheckpointArgs,
    DataArgs,
    RolloutArgs,
    EngineArgs,
    SglangArgs,
    WeightSyncArgs,
    RewardArgs,
    DistillationArgs,
    LossArgs,
    BatchArgs,
    OptimArgs,
    EvaluationArgs,
    RecordingArgs,
    ClusterArgs,
    MegatronArgs,
    OutputArgs,
):
    """All arguments of a run, checked and complete.

    Raises:
        ArgumentsError: a value out of range, a contradiction, or a flag whose machinery has not landed.
    """

    def __post_init__(self) -> None:
        for group in GROUPS:
            for declared in flags_of(group):
                if declared.spec.derive is not None and getattr(self, declared.attribute) is None:
                    object.__setattr__(self, declared.attribute, declared.spec.derive(self))
        problems = [problem for group in GROUPS for problem in range_problems(flags_of(group), self)]
        # A group's own `validate` is hidden by the next group's in the inheritance: each is called by name.
        problems += [problem for group in (*GROUPS, SglangArgs) for problem in group.validate(self)]
        if not problems:
            problems += contradictions(self)
        if not problems:
            problems += pending(self)
        if problems:
            raise ArgumentsError(problems)

    def validate(self) -> Iterator[str]:
        """Yield nothing: construction has checked the groups and their combination."""
        yield from ()

    @property
    def num_data_ranks(self) -> int:
        """How many shards a rollout is cut into: training ranks over those that share one."""
        return self.num_train_ranks // self.ranks_per_model

    def data_rank(self, rank: int) -> int:
        """Return which shard a training rank trains; those that share a model share a shard.

        Megatron counts ranks of tensor parallelism first, then of context, data and pipeline parallelism.
        """
        return rank // (self.tensor_model_parallel_size * self.context_parallel_size) % self.num_data_ranks

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps of one rollout."""
        return self.samples_per_rollout // self.global_batch_size

    @property
    def trains_on_grades(self) -> bool:
        """Whether the task's advantages are made of the rule's grades, not of a plugin's rewards."""
        plugin = self.custom_rm_path is not None or self.custom_reward_post_process_path is not None
        return self.task_reward_weight > 0 or not (self.use_opd or plugin)

    @property
    def total_train_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.num_rollout * self.steps_per_rollout

    def megatron_flags_set(self) -> list[str]:
        """Return the Megatron flags that differ from their defaults."""
        return [flag.cli for flag in flags_of(MegatronArgs) if getattr(self, flag.attribute) != flag.default]

    def as_dict(self) -> dict[str, Any]:
        """Return every argument as plain data, fit for JSON; secrets in URLs are masked."""
        values = {
            flag.attribute: getattr(self, flag.attribute) for group in GROUPS for flag in flags_of(group)
        }
        return printable({**values, "rm_url": self.rm_url, "sglang": self.sglang})


def parse_args(argv: list[str] | None = None) -> Args:
    """Read the command line (default: the process's own) into `Args`.

    Where the command line is wrong, ends the process with status 2 and a message that names the flags.
    """
    return parse(argv, GROUPS, Args)


def format_args(args: Args) -> str:
    """Return the arguments group by group, one a line; secrets are masked."""
    return format_groups(args.as_dict(), GROUPS)


__all__ = ["GROUPS", "Args", "ArgumentsError", "format_args", "parse_args"]
