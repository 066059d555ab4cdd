"""Finds the shipped checkpoints and makes the dataset where it is not there yet.

Importing this module loads neither torch nor transformers.
"""

import os
import tempfile
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

from slime.tiny.geometry import SPLIT_SIZES, write_splits
from slime.tiny.geometry import stamp as current_stamp

CHECKPOINTS: Final = ("teacher", "student", "weak")
_SHIPPED: Final = Path(__file__).parent / "checkpoints"


def checkpoint_path(name: str) -> Path:
    """Return the folder of a shipped checkpoint; ValueError for an unknown name."""
    if name not in CHECKPOINTS:
        raise ValueError(f"no tiny checkpoint is called {name!r}: use one of {', '.join(CHECKPOINTS)}")
    path = _SHIPPED / name
    if not (path / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"the tiny checkpoint {path} is missing: it ships with the package, so reinstall that, "
            f"or make it with `python -m slime.tiny --retrain --only {name} --out {_SHIPPED}`"
        )
    return path


def ensure_dataset(directory: str | os.PathLike[str]) -> dict[str, Path]:
    """Return the parquet file of each split (train, validation, test); write them where they are not current.

    Several processes may call this at once: each file appears whole, by a rename.
    """
    directory = Path(directory)
    paths = {split: directory / f"{split}.parquet" for split in SPLIT_SIZES}
    if not all(_is_current(path) for path in paths.values()):
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            for split, written in write_splits(Path(scratch)).items():
                written.replace(paths[split])
    return paths


def _is_current(path: Path) -> bool:
    """Tell whether a file was written by this version of the generator with its default seed."""
    if not path.is_file():
        return False
    try:
        metadata = pq.read_schema(path).metadata
    except pa.ArrowInvalid:
        return False
    return (metadata or {}).get(b"slime.tiny") == current_stamp().encode()
