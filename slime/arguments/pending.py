"""Flags that are declared and whose machinery has not landed. The table shrinks to nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the package's __init__ imports this module
    from slime.arguments import Args

PENDING: tuple[tuple[str, Callable[[Args], bool], str], ...] = (
    (
        "--rollout-top-p below 1",
        lambda args: args.rollout_top_p != 1.0,
        "the correction for sampling from a cut distribution has not landed. Use --rollout-top-p 1.",
    ),
    (
        "--rollout-top-k",
        lambda args: args.rollout_top_k != -1,
        "the correction for sampling from a cut distribution has not landed. Use --rollout-top-k -1.",
    ),
)


def pending(args: Args) -> Iterator[str]:
    """Yield a sentence for each flag that is set and cannot be served yet."""
    for name, is_set, missing in PENDING:
        if is_set(args):
            yield f"not available yet: {name}: {missing}"
