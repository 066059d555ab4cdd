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
from slime.backends.megatron.loading import Checkpoint, differences
from slime.backends.megatron.optimizer_state import KINDS, OptimizerState
from slime.backends.megatron.parameters import Named
from slime.durable import sync_tree

STEPS_FILE = "steps.json"
MAX_FILE_BYTES = 2 * 2**30


def save_sharded(path: Path, exporter: Exporter, state: OptimizerState, steps: int) -> None:
    """Write weights, Adam's means and the number of steps taken below `path`. Collective; all ranks write."""
    for kind in KINDS:
        _write(path / kind, exporter.export(torch.float32, partial(state.read, kind)))
    dist.barrier()
    if dist.get_rank() == 0:  # says that the rest is complete
        (path / STEPS_FILE).write_text(json.dumps({"steps": steps}), encoding="utf-8")
        sync_tree(path)
    dist.barrier()


def load_sharded(path: Path, parameters: Sequence[Named], state: OptimizerState) -> int:
    """Read what `save_sharded` wrote under any parallelism; return the number of steps taken. Collective.

    Raises:
        FileNotFoundError: no checkpoint lies at `path`.
        ValueError: it is another model's.
    """
    if not (path / STEPS_FILE).is_file():
        raise FileNotFoundError(
            f"no training checkpoint of --train-backend megatron at {path}: its {STEPS_FILE} is not there. "
            "--load takes a folder that --save wrote with the same backend."
        )
    steps = int(json.loads((path / STEPS_FILE).read_text(encoding="utf-8"))["steps"])
    for kind in KINDS:
        checkpoint = Checkpoint(path / kind)
        found = differences(parameters, checkpoint)
        if found:
            raise ValueError(
                f"the checkpoint at {path} is not of the model that --hf-checkpoint names: "
                f"{'; '.join(found)}. Give --load a run of this model."
            )
        for named in parameters:
            state.write(kind, named, _read(named, checkpoint), steps)
    return steps


def load_masters(parameters: Sequence[Named], checkpoint: Checkpoint, state: OptimizerState) -> None:
    """Give the optimizer what the model's own precision has rounded away of float32 weights."""
    for named in parameters:
        if any(checkpoint.is_float32(source) for source in named.weight.sources):
            state.write("master", named, _read(named, checkpoint), steps=0)


def _read(named: Named, checkpoint: Checkpoint) -> Tensor:
    """Return this rank's slice of a parameter's state, float32; rows that stand for no token are zero."""
    value = torch.zeros(named.parameter.shape, dtype=torch.float32)
    for piece in named.weight.pieces(named.rank, named.ranks):
        value[piece.rows].copy_(checkpoint.read(piece))
    return value.to(named.parameter.device)


def _write(folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Stream tensors into files of a bounded size. Every rank goes through all and writes its share."""
    folder.mkdir(parents=True, exist_ok=True)
    rank, loads = dist.get_rank(), [0] * dist.get_world_size()
    held: dict[str, Tensor] = {}
    files = size = 0
    for name, tensor in tensors:
        writer = loads.index(min(loads))  # the same on every rank
        loads[writer] += tensor.nbytes
        if writer != rank:
            continue
        if held and size + tensor.nbytes > MAX_FILE_BYTES:
            save_file(held, folder / f"{rank:05d}-{files:05d}.safetensors")
            held, size, files = {}, 0, files + 1
        held[name] = tensor.cpu().contiguous()
        size += tensor.nbytes
    if held:
        save_file(held, folder / f"{rank:05d}-{files:05d}.safetensors")
