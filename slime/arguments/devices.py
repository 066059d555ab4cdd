"""How many GPUs this process sees: the one fact of the machine that a default depends on."""

from __future__ import annotations

from functools import cache


@cache
def visible_gpus() -> int:
    """Return the number of CUDA devices that this process may use."""
    import torch  # seconds to import, and only a default that is not given needs it

    return torch.cuda.device_count()
