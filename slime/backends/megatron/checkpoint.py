"""Model and optimizer on disk in the checkpoint layout of Hugging Face, which any parallelism may read.

Megatron's own format cannot bring the optimizer state of experts to another number of ranks without
TransformerEngine. Here the float32 weights and both of Adam's means are folders of safetensors with the names
and shapes of the model's checkpoint: each rank reads its slices by the table that loads the model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from slime.backends.megatron.export import Exporter
from slime.backends.megatron.loading import Checkpoint
from slime.backends.megatron.optimizer_state import KINDS, OptimizerState
from slime.backends.megatron.parameters import Named
from slime.durable import sync_tree

STEPS_FILE = "steps.json"
MAX_FILE_BYTES = 2 * 2**30


def save_sharded(path: Path, exporter: Exporter, state: OptimizerState, steps: int) -> None:
    """Write weights, Adam's means and the number of steps taken below `path`. Collective; rank 0 writes."""
    for kind in KINDS:
        _write(path / kind, exporter.export(torch.float32, partial(state.read, kind)))
    if dist.get_rank() == 0:
        (path / STEPS_FILE).write_text(json.dumps({"steps": steps}), encoding="utf-8")
        sync_tree(path)
    dist.barrier()


def load_sharded(path: Path, parameters: Sequence[Named], state: OptimizerState) -> int:
    """Read what `save_sharded` wrote under any parallelism; return the number of steps taken.

    Raises:
        FileNotFoundError: no checkpoint lies at `path`.
    """
    if not (path / STEPS_FILE).is_file():
        raise FileNotFoundError(
            f"no training checkpoint of --train-backend megatron at {path}: its {STEPS_FILE} is not there. "
            "--load takes a folder that --save wrote with the same backend."
        )
    steps = int(json.loads((path / STEPS_FILE).read_text(encoding="utf-8"))["steps"])
    for kind in KINDS:
        checkpoint = Checkpoint(path / kind)
        for named in parameters:
            state.write(kind, named, _read(named, checkpoint), steps)
    return steps


def _read(named: Named, checkpoint: Checkpoint) -> Tensor:
    """Return this rank's slice of a parameter's state, float32; rows that stand for no token are zero."""
    value = torch.zeros(named.parameter.shape, dtype=torch.float32)
    for piece in named.weight.pieces(named.rank, named.ranks):
        value[piece.rows].copy_(checkpoint.read(piece))
    return value.to(named.parameter.device)


def _write(folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Stream tensors into files of a bounded size; every rank goes through all of them."""
    writes = dist.get_rank() == 0
    if writes:
        folder.mkdir(parents=True)
    held: dict[str, Tensor] = {}
    files = size = 0
    for name, tensor in tensors:
        if not writes:
            continue
        if held and size + tensor.nbytes > MAX_FILE_BYTES:
            save_file(held, folder / f"{files:05d}.safetensors")
            held, size, files = {}, 0, files + 1
        held[name] = tensor.cpu().contiguous()
        size += tensor.nbytes
    if writes:
        save_file(held, folder / f"{files:05d}.safetensors")
