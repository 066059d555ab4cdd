"""Finds the shipped checkpoints and makes the dataset where it is not there yet.

Importing this module loads neither torch nor transformers.
"""

import os
import tempfile
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

from slime.tiny.geometry import GEOMETRY
from slime.tiny.problems import SPLIT_SIZES, ProblemSet

CHECKPOINTS: Final = ("teacher", "student", "weak", "text_teacher", "text_student")
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


def ensure_dataset(directory: str | os.PathLike[str], problems: ProblemSet = GEOMETRY) -> dict[str, Path]:
    """Return the parquet file of each split (train, validation, test); write them where they are not current.

    Several processes may call this at once: each file appears whole, by a rename.
    """
    directory = Path(directory)
    paths = {split: directory / f"{split}.parquet" for split in SPLIT_SIZES}
    if not all(_stamp(path) == problems.stamp() for path in paths.values()):
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            for split, written in problems.write_splits(Path(scratch)).items():
                written.replace(paths[split])
    return paths


def _stamp(path: Path) -> str | None:
    """Return which generator wrote a file, with which seed; None where none of ours did."""
    if not path.is_file():
        return None
    try:
        metadata = pq.read_schema(path).metadata or {}
    except pa.ArrowInvalid:
        return None
    return metadata.get(b"slime.tiny", b"").decode() or None
