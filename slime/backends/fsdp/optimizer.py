"""AdamW over sharded parameters, and the norm of a gradient that lies in pieces."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm


def build_adamw(
    model: nn.Module, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> torch.optim.AdamW:
    """Return AdamW for the trainable parameters; vectors (norms, biases) do not decay.

    On a GPU it is the fused kernel: the other one holds a further copy of all weights while it steps, which a
    4B model with its optimizer has no room for in 80 GB.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    fused = trained[0].device.type == "cuda"
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=fused, foreach=not fused)


def local_gradients(model: nn.Module) -> list[Tensor]:
    """Return this rank's pieces of all gradients; changing them changes the gradients."""
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]


def global_norm(pieces: list[Tensor], device: torch.device) -> Tensor:
    """Return the 2-norm over all pieces of all ranks. Collective."""
    local = get_total_norm([piece for piece in pieces if piece.numel()])
    square = local.to(device, torch.float64).square()
    dist.all_reduce(square)
    return square.sqrt()


def clip_by_norm(pieces: list[Tensor], norm: float, limit: float) -> None:
    """Scale all pieces so that the global norm is at most `limit`; 0 does not clip."""
    if limit > 0 and norm > limit:
        for piece in pieces:
            piece.mul_(limit / norm)
