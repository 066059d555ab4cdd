"""Lets megatron-core 0.16 train on a CPU: what it asks of CUDA is answered by the CPU.

Its code allocates on "cuda", reads the current device and compares type names. Inside `cpu_as_cuda()` those
calls end on the CPU. Nothing else changes, and outside of it nothing does. Importing this module where there
is a GPU is an error: there the shim would put tensors into the wrong memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode

if torch.cuda.is_available():
    raise RuntimeError(
        "slime.backends.megatron.device_shim was imported on a machine with a GPU; it stands in for CUDA "
        "where there is none, and nothing may need it here."
    )

CPU = torch.device("cpu")


class _CudaIsCpu(TorchFunctionMode):
    """Sends what asks for a CUDA device to the CPU."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # Megatron's optimizers know a parameter's kind by names like "torch.cuda.FloatTensor" alone.
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], CPU, *args[2:])
        return func(*args, **kwargs)


@contextmanager
def cpu_as_cuda() -> Iterator[None]:
    """Answer CUDA calls of this thread on the CPU until the block ends.

    The hook on tensor functions belongs to one thread: enter it in each call that runs Megatron's code, not
    once for all.
    """
    replaced: tuple[tuple[Any, str, Callable[..., Any]], ...] = (
        (torch.cuda, "current_device", lambda: CPU),
        (torch.cuda, "synchronize", lambda *_, **__: None),
        # Recomputation keeps the generators' states; dropout is 0 on a CPU, so none is ever drawn from.
        (torch.cuda.random, "get_rng_state", lambda *_, **__: torch.empty(0, dtype=torch.uint8)),
    )
    with ExitStack() as stack:
        for owner, name, answer in replaced:
            stack.enter_context(patch.object(owner, name, answer))
        stack.enter_context(_CudaIsCpu())
        yield


def _is_cuda(device: object) -> bool:
    return device is not None and str(device).startswith("cuda")
