"""The trainer's side of the online weight updates, in one process: what a real trainer sends, and no more."""

import base64
import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
import torch.multiprocessing
from torch import Tensor


def flattened(tensors: Mapping[str, Tensor]) -> Tensor:
    """Lay tensors out one after the other as [bytes] uint8."""
    return torch.cat([tensor.contiguous().flatten().view(torch.uint8) for tensor in tensors.values()])


@contextmanager
def payload(tensors: Mapping[str, Tensor], protocol: int | None = None) -> Iterator[str]:
    """Give the base64 payload of `tensors`, all views of one flat shared storage that lives for the block."""
    flat = flattened(tensors).share_memory_()
    views, offset = [], 0
    for name, tensor in tensors.items():
        views.append((name, flat[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)))
        offset += tensor.nbytes
    yield pickled(views, protocol)


def pickled(value: Any, protocol: int | None = None, strategy: str = "file_system") -> str:
    """Pickle tensors by reference to their shared memory, base64; torch's `strategy` says how it is found."""
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy(strategy)
    try:
        buffer = io.BytesIO()
        ForkingPickler(buffer, protocol).dump(value)
    finally:
        torch.multiprocessing.set_sharing_strategy(before)
    return base64.b64encode(buffer.getvalue()).decode()


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
