"""The engine's side of the process groups over which a trainer broadcasts weights, itself being rank 0.

All that waits for the trainer blocks; call it in a thread.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from slime.engines.update_group import join_update_group

TIMEOUT = timedelta(minutes=5)
"""How long a group's start and each of its broadcasts may take. A trainer that died is then given up."""
TRAINER_RANK = 0
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class GroupPlace:
    """Where a group meets, and this engine's place in it."""

    name: str
    address: str
    port: int
    rank: int
    world_size: int
    backend: str
    """gloo, or nccl on a GPU."""


@dataclass(frozen=True)
class Broadcast:
    """What the trainer sends next: tensors in this order, one by one, or flat as one uint8 tensor."""

    group: str
    names: Sequence[str]
    dtypes: Sequence[str]
    shapes: Sequence[Sequence[int]]
    flat: bool


class UpdateGroups:
    """The groups that this engine is in, by name. Its methods raise ValueError or RuntimeError."""

    def __init__(self, device: torch.device, timeout: timedelta = TIMEOUT):
        self._device = device
        self._timeout = timeout
        self._groups: dict[str, Any] = {}
        self._receiving: dict[str, torch.device] = {}

    def join(self, place: GroupPlace) -> None:
        """Join a group; blocks until all its members have, or the time is out."""
        if place.name in self._groups:
            raise ValueError(f"the group {place.name!r} exists; destroy it first, or use another name.")
        backends = ("gloo", "nccl") if self._device.type == "cuda" else ("gloo",)
        if place.backend not in backends:
            raise ValueError(
                f"the backend {place.backend!r} is not for an engine on {self._device.type}; use "
                f"{' or '.join(backends)}."
            )
        group = join_update_group(
            place.address,
            place.port,
            rank=place.rank,
            world_size=place.world_size,
            name=place.name,
            backend=place.backend,
            timeout=self._timeout,
        )
        self._groups[place.name] = group
        self._receiving[place.name] = self._device if place.backend == "nccl" else torch.device("cpu")

    def receive(self, broadcast: Broadcast) -> dict[str, Tensor]:
        """Take part in a broadcast and return its tensors by name; blocks until the trainer has sent them."""
        group = self._groups.get(broadcast.group)
        if group is None:
            raise ValueError(
                f"the group {broadcast.group!r} does not exist (there are {sorted(self._groups)}); "
                "call /init_weights_update_group first."
            )
        device = self._receiving[broadcast.group]
        layout = _layout(broadcast)
        if broadcast.flat:
            flat = torch.empty(sum(size for _, _, _, size in layout), dtype=torch.uint8, device=device)
            torch.distributed.broadcast(flat, src=TRAINER_RANK, group=group)
            return _cut(flat, layout)
        tensors = {name: torch.empty(shape, dtype=dtype, device=device) for name, dtype, shape, _ in layout}
        for tensor in tensors.values():
            torch.distributed.broadcast(tensor, src=TRAINER_RANK, group=group)
        return tensors

    def leave(self, name: str) -> None:
        """Destroy this engine's part of a group; raise KeyError where there is none."""
        group = self._groups.pop(name)
        torch.distributed.destroy_process_group(group)


Layout = list[tuple[str, torch.dtype, tuple[int, ...], int]]
"""Name, type, shape and bytes of each tensor, in the order in which they are sent."""


def _layout(broadcast: Broadcast) -> Layout:
    layout: Layout = []
    offset = 0
    for name, given, shape in zip(broadcast.names, broadcast.dtypes, broadcast.shapes, strict=True):
        dtype = DTYPES.get(given.removeprefix("torch."))
        if dtype is None:
            raise ValueError(f"{name} is announced as {given!r}; the engine takes {', '.join(DTYPES)}.")
        if broadcast.flat and offset % dtype.itemsize:
            raise ValueError(
                f"{name} ({given}) would begin at byte {offset} of the flat broadcast, no multiple of "
                f"{dtype.itemsize}; send the wider types first."
            )
        size = math.prod(shape) * dtype.itemsize
        layout.append((name, dtype, tuple(shape), size))
        offset += size
    return layout


def _cut(flat: Tensor, layout: Layout) -> dict[str, Tensor]:
    parts = flat.split([size for _, _, _, size in layout])
    return {
        name: part.view(dtype).view(shape)
        for part, (name, dtype, shape, _) in zip(parts, layout, strict=True)
    }
