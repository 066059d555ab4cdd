"""The trainer's side of the online weight updates, in one process: what a real trainer sends, and no more.

A payload of `/update_weights_from_tensor` holds names and where the tensors lie in shared memory; a group of
`/update_weights_from_distributed` is made the way SGLang makes its own.
"""

import base64
import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
import torch.multiprocessing
from torch import Tensor
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.distributed_c10d import (
    Backend,
    GroupName,
    PrefixStore,
    _new_process_group_helper,
    _world,
)

GROUP_SECONDS = 60.0


def flattened(tensors: Mapping[str, Tensor]) -> Tensor:
    """Lay tensors out one after the other as [bytes] uint8."""
    return torch.cat([tensor.contiguous().flatten().view(torch.uint8) for tensor in tensors.values()])


@contextmanager
def payload(tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """Give the base64 payload of `tensors`, all views of one flat shared storage that lives for the block."""
    flat = flattened(tensors).share_memory_()
    views, offset = [], 0
    for name, tensor in tensors.items():
        views.append((name, flat[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)))
        offset += tensor.nbytes
    yield pickled(views)


def pickled(value: Any) -> str:
    """Pickle tensors by reference to files in shared memory, base64."""
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        buffer = io.BytesIO()
        ForkingPickler(buffer).dump(value)
    finally:
        torch.multiprocessing.set_sharing_strategy(before)
    return base64.b64encode(buffer.getvalue()).decode()


def open_store(port: int, world_size: int) -> TCPStore:
    """Open the group's meeting place without waiting for the others."""
    timeout = timedelta(seconds=GROUP_SECONDS)
    return TCPStore("127.0.0.1", port, world_size, is_master=True, timeout=timeout, wait_for_workers=False)


def join_group(store: TCPStore, world_size: int, name: str) -> Any:
    """Join as rank 0; blocks until the engines have joined."""
    group, _ = _new_process_group_helper(
        world_size,
        0,
        [],
        Backend("gloo"),
        PrefixStore(name, store),
        group_name=GroupName(name),
        timeout=timedelta(seconds=GROUP_SECONDS),
    )
    _world.pg_group_ranks[group] = {rank: rank for rank in range(world_size)}
    return group


def described(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Say in an update's body what will be broadcast."""
    return {
        "names": list(tensors),
        "dtypes": [str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()],
        "shapes": [list(tensor.shape) for tensor in tensors.values()],
    }


def broadcast(tensors: Mapping[str, Tensor], group: Any, *, flat: bool) -> None:
    """Send tensors to the group's engines: one by one, or as one flat broadcast."""
    for tensor in [flattened(tensors)] if flat else tensors.values():
        torch.distributed.broadcast(tensor.contiguous(), src=0, group=group)
