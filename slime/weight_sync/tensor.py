"""Weights to engines on the same machine through memory that both see: handing it over copies nothing.

On a CPU that is shared memory, filled by training rank 0. On GPUs, which training ranks and engines share,
each rank fills a bucket on its own GPU, and the engine's rank on that GPU opens it by its CUDA-IPC handle.
"""

from __future__ import annotations

import base64
import io
import shutil
from collections.abc import Callable, Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor
from torch.multiprocessing import reductions

from slime.engines.control import EngineControl
from slime.engines.errors import EngineError
from slime.weight_sync.base import EngineMember, Parameters, drain
from slime.weight_sync.buckets import Bucket, device_memory, fill_buckets
from slime.weight_sync.store import SHARED_MEMORY

SHARED_BY_NAME = "file_system"
"""How a server that is no child of ours finds our memory. By torch's default it would ask us for an open
file, which only relatives may: a real SGLang server dies of it."""

DEVICE_ARGUMENT = 6
"""Place of the GPU's number among the arguments of torch's function that opens a handle."""


class TensorSender:
    """Implements `WeightSender` through shared memory or CUDA-IPC."""

    needs_session = True

    def __init__(self, *, leads: bool, device: torch.device, bucket_bytes: int) -> None:
        """`leads` is true on training rank 0 alone, which speaks to the engines."""
        self._leads = leads
        self._device = device
        self._bucket_bytes = bucket_bytes
        torch.multiprocessing.set_sharing_strategy(SHARED_BY_NAME)

    async def send(
        self, parameters: Parameters, engines: Sequence[EngineMember], control: EngineControl, version: str
    ) -> int:
        """Fill bucket after bucket and let every engine copy it into its model."""
        if self._device.type == "cpu" and not self._leads:
            drain(parameters)
            return 0
        total = 0
        failure: EngineError | None = None
        for bucket in fill_buckets(parameters, self._size(), self._memory()):
            total += bucket.flat.numel()
            payloads = self._payloads(bucket, engines)
            if self._leads and failure is None:
                try:
                    await control.update_weights_from_tensor(payloads, version if bucket.last else None)
                except EngineError as error:
                    failure = error  # the other ranks are still to come to their end
            self._wait_for_all()
        if failure is not None:
            raise failure
        return total

    def drain(self, parameters: Parameters) -> None:
        """Fill the buckets that are left, and let the other ranks hand over theirs to nobody."""
        if self._device.type == "cpu":
            drain(parameters)
            return
        for bucket in fill_buckets(parameters, self._size(), self._memory()):
            self._payloads(bucket, ())
            self._wait_for_all()

    def _size(self) -> int:
        """Return the size of a bucket: shared memory may be small, and is never filled."""
        if self._device.type != "cpu":
            return self._bucket_bytes
        return min(self._bucket_bytes, shutil.disk_usage(SHARED_MEMORY).free // 2)

    def _memory(self) -> Callable[[int], Tensor]:
        return shared_memory if self._device.type == "cpu" else device_memory(self._device)

    def _payloads(self, bucket: Bucket, engines: Sequence[EngineMember]) -> list[list[str]]:
        """Return for each engine what each of its ranks is told: where its bucket is."""
        if self._device.type == "cpu":
            return [[serialized(bucket.named_tensors) for _ in range(engine.num_gpus)] for engine in engines]
        # The engines' GPUs are the training ranks', in the same order. Handles that nobody opens would keep
        # the bucket's memory for good.
        own = serialized(bucket.named_tensors) if engines else ""
        everyone: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(everyone, own)
        payloads, first = [], 0
        for engine in engines:
            payloads.append(everyone[first : first + engine.num_gpus])
            first += engine.num_gpus
        return payloads

    def _wait_for_all(self) -> None:
        """Keep every rank's bucket as it is until all engines have copied theirs."""
        if self._device.type != "cpu":
            dist.barrier()


class _Pickler(ForkingPickler):
    """Names a GPU by its UUID, as SGLang does among its own: Ray shows every rank its GPU as number 0."""

    def reducer_override(self, tensor: Any) -> Any:
        if not (isinstance(tensor, Tensor) and tensor.is_cuda):
            return NotImplemented
        reduced: Any = reductions.reduce_tensor(tensor)
        rebuild, arguments = reduced
        device = arguments[DEVICE_ARGUMENT]
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        return rebuild, (*arguments[:DEVICE_ARGUMENT], uuid, *arguments[DEVICE_ARGUMENT + 1 :])


def shared_memory(size: int) -> Tensor:
    """Return `size` bytes, uint8, that other processes can open; what is not written to costs nothing.

    Raises:
        RuntimeError: there is not so much. Writing to it would end the process without a word.
    """
    free = shutil.disk_usage(SHARED_MEMORY).free
    if size > free:
        raise RuntimeError(
            f"{size:,} bytes of weights are to be shared at once, and {SHARED_MEMORY} has {free:,} free. "
            "Give it more (docker run --shm-size), or use --weight-sync disk."
        )
    storage = torch.UntypedStorage._new_shared(size)  # pyright: ignore[reportPrivateUsage]
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def serialized(named_tensors: Sequence[tuple[str, Tensor]]) -> str:
    """Return the list of (name, tensor) as SGLang takes it: pickled handles of memory, in base64.

    For one reader: torch counts those who have the memory open, one for each pickling, and removes its name
    when the last has closed it. Two readers of one pickling close it once too often.
    """
    buffer = io.BytesIO()
    _Pickler(buffer, -1).dump(list(named_tensors))
    return base64.b64encode(buffer.getvalue()).decode("ascii")
