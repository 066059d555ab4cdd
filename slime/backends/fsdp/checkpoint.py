"""Model and optimizer on disk in torch's distributed format, which any number of ranks may read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save


def save_sharded(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Write each rank's shards and the number of steps taken below `path`. Collective."""
    save(_state(model, optimizer, steps), checkpoint_id=path)


def load_sharded(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Read what `save_sharded` wrote into model and optimizer; return the number of steps taken. Collective.

    Raises:
        FileNotFoundError: no checkpoint lies at `path`.
    """
    if not (path / ".metadata").is_file():
        raise FileNotFoundError(
            f"no training checkpoint at {path}: its .metadata file is not there. --load takes a folder that "
            "--save wrote."
        )
    state = _state(model, optimizer, 0)
    load(state, checkpoint_id=path)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    return int(state["steps"])


def _state(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> dict[str, Any]:
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
        "steps": torch.tensor(steps),
    }
