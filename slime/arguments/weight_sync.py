"""How fresh weights reach the student's engines."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from slime.arguments.devices import visible_gpus
from slime.arguments.flags import flag

if TYPE_CHECKING:  # the package's __init__ imports this module
    from slime.arguments import Args


def _way(args: Args) -> str:
    if args.colocate:
        return "tensor"
    return "distributed" if visible_gpus() else "disk"


@dataclass(frozen=True, kw_only=True)
class WeightSyncArgs:
    """Weight sync"""

    weight_sync: Literal["disk", "tensor", "distributed"] = flag(
        help=(
            "How weights reach the student's engines. disk: a folder that all see; tensor: memory that "
            "trainer and engines share (CUDA-IPC, or shared memory on a CPU); distributed: broadcasts (NCCL, "
            "or gloo on a CPU)."
        ),
        derive=_way,
        derived_from="tensor with --colocate, distributed where there are GPUs, disk otherwise",
    )
    update_weight_buffer_size: int = flag(
        512 * 2**20,
        help="Bytes of weights that are gathered and sent at once; a larger tensor goes alone.",
        at_least=1,
    )
    check_weight_sync: Literal["first", "every", "never"] = flag(
        "first",
        help=(
            "When a prompt's response is compared between every engine and the trainer after a sync: first: "
            "the first weights and those of the first step."
        ),
    )

    def validate(self) -> Iterator[str]:
        """Yield what is wrong inside this group."""
        yield from ()
