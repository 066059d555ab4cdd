"""Fills a rank's parameters straight from the safetensors files of a checkpoint, reading its slices alone.

No rank ever holds a tensor that is not its own, but for the block that is being copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from slime.backends.megatron.parameters import Named
from slime.backends.megatron.shape import ModelShape
from slime.backends.megatron.weights import Piece

TIED_HEAD = "lm_head.weight"


class Checkpoint:
    """The tensors of a Hugging Face folder, read block by block."""

    def __init__(self, folder: str | Path) -> None:
        """Open every safetensors file of the folder.

        Raises:
            FileNotFoundError: there is none.
        """
        self._folder = Path(folder)
        paths = sorted(self._folder.glob("*.safetensors"))
        if not paths:
            raise FileNotFoundError(
                f"no *.safetensors file in {folder}; --train-backend megatron reads no other format. Convert "
                "the checkpoint with transformers' save_pretrained."
            )
        files = [safe_open(path, framework="pt") for path in paths]
        self._files = {name: file for file in files for name in file.keys()}  # noqa: SIM118 - no mapping

    @property
    def names(self) -> frozenset[str]:
        """The tensors that are there."""
        return frozenset(self._files)

    def size(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return tuple(self._files[name].get_slice(name).get_shape())

    def is_float32(self, name: str) -> bool:
        """Tell whether a tensor is of full precision."""
        return self._files[name].get_slice(name).get_dtype() == "F32"

    def read(self, piece: Piece) -> Tensor:
        """Return a block, laid out like the rows that it fills."""
        lazy = self._files[piece.source].get_slice(piece.source)
        if piece.expert is not None:
            value = lazy[(slice(piece.expert, piece.expert + 1), *piece.block)][0]
        else:
            value = lazy[piece.block] if piece.block else lazy[:]
        return value.T if piece.transposed else value


def publishes_experts(checkpoint: Checkpoint, shape: ModelShape) -> bool:
    """Tell whether fused experts are [experts, in, out], as published, or as transformers 5 saves them.

    Where one of the two tensors of a layer is as wide as it is high, the other one tells.
    """
    hidden, ffn = shape.hidden, shape.expert_ffn
    telling, published = ("gate_up_proj", hidden) if hidden != 2 * ffn else ("down_proj", ffn)
    for name in sorted(checkpoint.names):
        if name.endswith(f"mlp.experts.{telling}"):
            return checkpoint.size(name)[1] == published
    return True


@torch.no_grad()
def load_weights(parameters: Sequence[Named], checkpoint: Checkpoint, *, tied: bool) -> None:
    """Fill all parameters; collective, since every rank must find the checkpoint complete.

    Raises:
        ValueError: a tensor is missing, has another shape than the config says, or belongs to no parameter of
            any rank.
    """
    # A tied head is in some checkpoints and not in others.
    found = differences(parameters, checkpoint, but={TIED_HEAD} if tied else set())
    if found:
        raise ValueError(f"the checkpoint is not what its config.json says: {'; '.join(found)}.")
    for named in parameters:
        fill(named, checkpoint)


def differences(
    parameters: Sequence[Named], checkpoint: Checkpoint, but: AbstractSet[str] = frozenset()
) -> list[str]:
    """Return, the same on every rank, where checkpoint and model differ, five things at most.

    Tensors of `but` may belong to no parameter. Collective.
    """
    problems = [problem for named in parameters for problem in _problems(named, checkpoint)]
    read = {source for named in parameters for source in named.weight.sources}
    everywhere: list[tuple[set[str], list[str]] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, (read, problems))
    found = {problem for of_rank in everywhere if of_rank is not None for problem in of_rank[1]}
    used = {name for of_rank in everywhere if of_rank is not None for name in of_rank[0]}
    unused = checkpoint.names - used - but
    if unused:
        found.add(f"{len(unused)} tensors belong to no parameter ({', '.join(sorted(unused)[:3])})")
    return sorted(found)[:5]


def fill(named: Named, checkpoint: Checkpoint) -> None:
    """Copy a parameter's blocks into it; rows that no block fills (of the vocabulary) are zero."""
    pieces = named.weight.pieces(named.rank, named.ranks)
    target = named.parameter.data
    if sum(target[piece.rows].shape[0] for piece in pieces) < target.shape[0]:
        target.zero_()
    for piece in pieces:
        target[piece.rows].copy_(checkpoint.read(piece))


def _problems(named: Named, checkpoint: Checkpoint) -> list[str]:
    found = []
    for name, size in named.weight.sources.items():
        if name not in checkpoint.names:
            found.append(f"{name} is missing")
        elif checkpoint.size(name) != size:
            found.append(f"{name} is {checkpoint.size(name)} and should be {size}")
    return found
