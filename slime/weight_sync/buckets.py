"""A model's weights as a stream of flat buckets, so that no rank ever holds all of them at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from slime.weight_sync.base import Parameters


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Some of the weights, end to end in one piece of memory. Valid until the next bucket is asked for."""

    flat: Tensor
    """uint8 [bytes]."""
    named_tensors: tuple[tuple[str, Tensor], ...]
    """The weights as views into `flat`, each aligned to its own type."""
    last: bool
    """Whether no other bucket follows."""


def fill_buckets(
    parameters: Parameters, max_bytes: int, allocate: Callable[[int], Tensor]
) -> Iterator[Bucket]:
    """Copy `parameters` into buckets of at most `max_bytes`; a larger tensor has one of its own.

    Args:
        parameters: the weights; the next one is asked for when the bucket before has been used.
        max_bytes: size of a bucket.
        allocate: returns so many bytes as a flat uint8 tensor. One is used for all buckets.
    """
    memory = allocate(max_bytes)
    views: list[tuple[str, Tensor]] = []
    size = 0

    def bucket(*, last: bool) -> Bucket:
        return Bucket(flat=memory[:size], named_tensors=tuple(views), last=last)

    for name, tensor in parameters:
        misaligned = size % tensor.element_size() != 0
        if views and (misaligned or size + tensor.nbytes > memory.numel()):
            yield bucket(last=False)
            views, size = [], 0
        if tensor.nbytes > memory.numel():
            del memory  # the larger one takes its place, not one beside it
            memory = allocate(tensor.nbytes)
        place = memory[size : size + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        place.copy_(tensor)
        views.append((name, place))
        size += tensor.nbytes
    if not views:
        raise ValueError("there are no weights to send; the backend yields none.")
    yield bucket(last=True)


def device_memory(device: torch.device) -> Callable[[int], Tensor]:
    """Return an allocator of ordinary memory; what is not written to costs nothing on a CPU."""
    return lambda size: torch.empty(size, dtype=torch.uint8, device=device)
