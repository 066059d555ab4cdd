"""How large a model is: by the headers of its weight files, or, where it is not here yet, by its name."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

HEADER_LIMIT = 100 * 2**20
_BILLIONS = re.compile(r"(?<![A-Za-z\d.])(\d+(?:\.\d+)?)B(?![A-Za-z])")


class WeightFileError(ValueError):
    """A weight file cannot be one, or is not whole."""


@dataclass(frozen=True)
class Weights:
    """A checkpoint in numbers."""

    parameters: int
    stored: int
    """Bytes of its weight files."""
    vision: int = 0
    """Of the parameters, those of the vision tower."""
    exact: bool = True
    """False: guessed by the model's name, in 2 bytes a parameter."""


@cache
def weights_of(checkpoint: str) -> Weights | None:
    """Return the size of a folder or hub name; None where neither files nor name tell it."""
    folder = Path(checkpoint)
    try:
        files = sorted(folder.glob("*.safetensors"))
        headers = [read_header(path) for path in files]
    except WeightFileError:
        return None  # the check of checkpoints says so
    if not headers:
        return _by_name(folder.name)
    tensors = {name: prod(entry["shape"]) for header in headers for name, entry in header.items()}
    return Weights(
        parameters=sum(tensors.values()),
        stored=sum(path.stat().st_size for path in files),
        vision=sum(count for name, count in tensors.items() if "visual." in name),
    )


def _by_name(name: str) -> Weights | None:
    match = _BILLIONS.search(name)
    if match is None:
        return None
    parameters = int(float(match[1]) * 1e9)
    return Weights(parameters=parameters, stored=2 * parameters, exact=False)


def read_header(path: Path) -> dict[str, Any]:
    """Return the entries of a safetensors file, without its metadata, after checking that the file is whole.

    Raises:
        WeightFileError: it is no such file, or not whole.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(HEADER_LIMIT, size - 8):
            raise WeightFileError(f"{path} is no safetensors file, or was cut off: it has {size} bytes")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
            shapes = [entry["shape"] for entry in header.values()]
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise WeightFileError(f"{path} has no header of a safetensors file ({error!r})") from error
    if size != end or not all(isinstance(shape, list) for shape in shapes):
        raise WeightFileError(f"{path} has {size} bytes and its header speaks of {end}")
    return header
