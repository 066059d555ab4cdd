"""What AdamW keeps of each parameter, as tensors of the parameter's shape, whoever holds which part of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor, nn

from slime.backends.megatron.optimizer import Stepper
from slime.backends.megatron.parameters import Named

Kind = Literal["master", "exp_avg", "exp_avg_sq"]
KINDS: tuple[Kind, ...] = ("master", "exp_avg", "exp_avg_sq")
"""The float32 weight that is stepped, and Adam's two means."""


@dataclass(frozen=True)
class _Slot:
    """Where the state of a parameter is."""

    part: Any
    """The optimizer."""
    main: Tensor | None
    """What it steps: the parameter, its float32 copy, or this rank's share of that; None: nothing of it."""
    share: slice
    """Of the flat parameter, that `main` is."""
    group: dist.ProcessGroup | None
    """The ranks that hold the shares; None: `main` is whole."""


class OptimizerState:
    """Reads and writes the state of a rank's parameters."""

    def __init__(self, stepper: Stepper, parameters: Sequence[Named]) -> None:
        """Find the state of each parameter."""
        self._slots = {
            named.name: _slot(stepper.parts, named.parameter)
            for named in parameters
            if named.parameter.requires_grad
        }

    @torch.no_grad()
    def read(self, kind: Kind, named: Named) -> Tensor:
        """Return a parameter's state, float32 of its shape; zeros where it is not trained.

        Collective over the ranks that share it.
        """
        slot = self._slots.get(named.name)
        if slot is None:
            return named.parameter.float() if kind == "master" else torch.zeros_like(named.parameter).float()
        whole = torch.zeros(named.parameter.numel(), dtype=torch.float32, device=named.parameter.device)
        if slot.main is not None:
            value = slot.main if kind == "master" else slot.part.optimizer.state[slot.main].get(kind)
            if value is not None:  # else no step has been taken yet
                whole[slot.share] = value.detach().flatten().float()
        if slot.group is not None and slot.group.size() > 1:
            dist.all_reduce(whole, group=slot.group)
        return whole.view(named.parameter.shape)

    @torch.no_grad()
    def write(self, kind: Kind, named: Named, value: Tensor, steps: int) -> None:
        """Set a parameter's state to `value`, of its shape, after `steps` steps."""
        if kind == "master":
            named.parameter.data.copy_(value)
        slot = self._slots.get(named.name)
        if slot is None or slot.main is None:
            return
        mine = value.flatten()[slot.share].view(slot.main.shape)
        if kind == "master":
            slot.main.data.copy_(mine)
            return
        state = slot.part.optimizer.state[slot.main]
        state[kind] = mine.to(slot.main.device, torch.float32).clone()
        # torch counts steps beside each parameter, the fused optimizers once for a group of them.
        if isinstance(slot.part.optimizer, torch.optim.AdamW):
            fused = slot.part.optimizer.param_groups[0]["fused"]
            state["step"] = torch.tensor(float(steps), device=slot.main.device if fused else "cpu")
        else:
            for group in slot.part.optimizer.param_groups:
                group["step"] = steps


def _slot(parts: Sequence[Any], parameter: nn.Parameter) -> _Slot:
    """Find a parameter among the optimizers: experts that are not on every rank have the second."""
    is_expert = not getattr(parameter, "allreduce", True)
    part = parts[1] if is_expert else parts[0]
    if not isinstance(part, DistributedOptimizer):
        return _Slot(part, getattr(parameter, "main_param", parameter), slice(None), None)
    place = part.model_param_group_index_map.get(parameter)
    if place is None:
        return _Slot(part, None, slice(0, 0), part.data_parallel_group)
    group, order = place
    share = part._get_model_param_range_map(parameter)["param"]  # Megatron has no public name for it
    main = part.optimizer.param_groups[group]["params"][order]
    return _Slot(part, main, slice(share.start, share.end), part.data_parallel_group)
