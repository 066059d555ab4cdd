"""Rules that grade a response against its label. Light on purpose: no torch, no servers.

A rule is `async rule(args, sample, **kwargs) -> float`. `--rm-type` names one of `RULES` or a dotted path.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

# binds the *function* to the package attribute, so that the dotted path `slime.rollout.rm_hub.math_rm` is a
# rule, while `from slime.rollout.rm_hub.math_rm import compute_math_reward` still finds the module
from slime.rollout.rm_hub.math_rm import math_rm
from slime.utils.misc import load_function

if TYPE_CHECKING:  # the sample's module imports torch
    from slime.utils.types import Sample

Rule = Callable[..., Awaitable[float]]

RULES: dict[str, Rule] = {"math": math_rm}


def rule_named(rm_type: str) -> Rule:
    """Return the rule of a `--rm-type`.

    Raises:
        ValueError: there is no such rule.
    """
    if rm_type in RULES:
        return RULES[rm_type]
    if "." in rm_type:
        return load_function(rm_type, "--rm-type")
    raise ValueError(
        f"--rm-type {rm_type!r} is not known; use one of {', '.join(RULES)}, or a dotted path of your own "
        "rule."
    )


async def async_rm(args: Any, sample: Sample, **kwargs: Any) -> float:
    """Grade a sample by `--rm-type`."""
    return await rule_named(args.rm_type)(args, sample, **kwargs)


__all__ = ["RULES", "Rule", "async_rm", "math_rm", "rule_named"]
