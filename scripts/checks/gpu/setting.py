"""Where the checks run, and how large they are."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from slime.arguments import Args
from slime.backends.fsdp.backend import FsdpBackend
from slime.engines.process import free_port

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all checks are told."""

    device: torch.device
    tiny: bool
    """Sizes for a CPU: all but the kernels of a GPU is run through."""
    scratch: Path
    """A folder of this run, where checkpoints may be left for the next check."""

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    @property
    def name(self) -> str:
        """How rows call the device."""
        return "GPU" if self.on_gpu else "CPU again"


@contextmanager
def backend_on(device: torch.device, args: Args, masked_ids: tuple[int, ...] = ()) -> Iterator[FsdpBackend]:
    """Give a training backend on `device`, the only rank of a process group of its own.

    `create_backend` takes a GPU wherever there is one; here the CPU's turn comes beside it.
    """
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        init_method=f"tcp://127.0.0.1:{free_port()}",
        rank=0,
        world_size=1,
    )
    try:
        backend = FsdpBackend(args, 0, 1, device, masked_ids)
        yield backend
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def gpu_id() -> str:
    """Return the GPU that this process uses, as CUDA_VISIBLE_DEVICES names it."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
