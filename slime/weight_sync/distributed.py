"""Weights to engines anywhere by broadcast: NCCL between GPUs, gloo between CPUs.

Training rank 0 and every rank of every engine form a process group. It is made anew when an engine's server
was, because a new process is in no group.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import _abort_process_group  # pyright: ignore[reportPrivateUsage]

from slime.engines.control import EngineControl
from slime.engines.errors import EngineError
from slime.engines.process import free_port
from slime.engines.update_group import in_own_thread, join_update_group
from slime.weight_sync.base import EngineMember, Parameters, drain
from slime.weight_sync.buckets import Bucket, device_memory, fill_buckets

GROUP_PREFIX = "slime-weights"
GROUP_TIMEOUT = timedelta(minutes=10)


class DistributedSender:
    """Implements `WeightSender` by broadcasts from training rank 0."""

    needs_session = True

    def __init__(self, *, leads: bool, device: torch.device, bucket_bytes: int, address: str) -> None:
        """`address` is this machine's, as the engines reach it."""
        self._leads = leads
        self._device = device
        self._bucket_bytes = bucket_bytes
        self._address = address
        self._members: tuple[EngineMember, ...] = ()
        self._group: ProcessGroup | None = None
        self._groups = 0
        self._token = secrets.token_hex(4)
        """Tells this run's groups from those of another, which the same engines may still remember."""

    async def send(
        self, parameters: Parameters, engines: Sequence[EngineMember], control: EngineControl, version: str
    ) -> int:
        """Broadcast bucket after bucket; every engine copies it into its model."""
        if not self._leads:
            drain(parameters)
            return 0
        if tuple(engines) != self._members:
            await self._meet(engines, control)
        total = 0
        for bucket in fill_buckets(parameters, self._bucket_bytes, device_memory(self._device)):
            total += bucket.flat.numel()
            await asyncio.gather(
                control.update_weights_from_distributed(
                    names=[name for name, _ in bucket.named_tensors],
                    dtypes=[str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket.named_tensors],
                    shapes=[tuple(tensor.shape) for _, tensor in bucket.named_tensors],
                    group=self._name,
                    version=version if bucket.last else None,
                ),
                in_own_thread(self._broadcast, bucket),
            )
        return total

    def drain(self, parameters: Parameters) -> None:
        """Gather what is left, and give up the group, which has lost a member."""
        self._leave(broken=True)
        drain(parameters)

    def _leave(self, *, broken: bool) -> None:
        """Leave the group. In a broken one an NCCL broadcast may still wait for who never comes."""
        group, self._group, self._members = self._group, None, ()
        if group is None:
            return
        if broken and self._device.type == "cuda":
            _abort_process_group(group)
        else:
            dist.destroy_process_group(group)

    @property
    def _name(self) -> str:
        return f"{GROUP_PREFIX}-{self._token}-{self._groups}"

    async def _meet(self, engines: Sequence[EngineMember], control: EngineControl) -> None:
        """Leave the group that there is, and form one with the engines as they are now."""
        if self._group is not None:
            with suppress(EngineError):  # a new server does not know it
                await control.destroy_weights_update_group(self._name)
            self._leave(broken=False)
        self._groups += 1
        offsets = [1 + sum(engine.num_gpus for engine in engines[:number]) for number in range(len(engines))]
        world_size = 1 + sum(engine.num_gpus for engine in engines)
        port = free_port(self._address)
        backend = "nccl" if self._device.type == "cuda" else "gloo"
        _, self._group = await asyncio.gather(
            control.init_weights_update_group(
                address=self._address,
                port=port,
                offsets=offsets,
                world_size=world_size,
                name=self._name,
                backend=backend,
            ),
            in_own_thread(join_as_first, self._address, port, world_size, self._name, backend),
        )
        self._members = tuple(engines)

    def _broadcast(self, bucket: Bucket) -> None:
        dist.broadcast(bucket.flat, src=0, group=self._group)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def join_as_first(address: str, port: int, world_size: int, name: str, backend: str) -> ProcessGroup:
    """Open a group at this side and be its rank 0."""
    return join_update_group(
        address, port, rank=0, world_size=world_size, name=name, backend=backend, timeout=GROUP_TIMEOUT
    )
