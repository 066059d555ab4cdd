"""Weights on their way to engines, held against the checkpoint that the engines were started from.

An SGLang server ignores a name that it does not know, and dies of a wrong shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from slime.weight_sync.base import Parameters
from slime.weight_sync.store import weight_files

TIED_HEAD = "lm_head.weight"
"""Tied to the embeddings, the head is in some checkpoints and not in others."""


def checked(parameters: Parameters, checkpoint: Path) -> Iterator[tuple[str, Tensor]]:
    """Pass `parameters` on.

    Raises:
        RuntimeError: they are not those of the checkpoint, by name and shape. A missing one is found at the
            end.
    """
    expected = _shapes(checkpoint)
    seen: set[str] = set()
    for name, tensor in parameters:
        shape = expected.get(name, tuple(tensor.shape) if name == TIED_HEAD else None)
        if shape != tuple(tensor.shape):
            known = "does not have" if shape is None else f"has as {list(shape)}"
            raise RuntimeError(
                f"the trainer's weights are not those of {checkpoint}: it yields {name} as "
                f"{list(tensor.shape)}, which the checkpoint {known}. The backend must yield the names and "
                "layouts of the checkpoint's safetensors files."
            )
        seen.add(name)
        yield name, tensor
    missing = sorted(expected.keys() - seen - {TIED_HEAD})
    if missing:
        raise RuntimeError(
            f"the trainer's weights are not those of {checkpoint}: {len(missing)} of its {len(expected)} "
            f"tensors are missing ({', '.join(missing[:3])}). The backend must yield the names of the "
            "checkpoint's safetensors files."
        )


@cache
def _shapes(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of each weight in the checkpoint's files, read from their heads."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in weight_files(checkpoint):
        with safe_open(path, framework="pt") as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return shapes
