"""What the head of a recorded rollout says: which one it is, who sampled it under which flags, how it went.

It is the schema metadata of the parquet file, each entry JSON under a key that begins with `slime.`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

FORMAT = 1
"""Changes with the columns or their meaning."""
PREFIX = "slime."
FORMAT_KEY = PREFIX + "format"


class RecordingError(ValueError):
    """A rollout cannot be recorded, or a recorded one found, read or used; the message names the file."""


@dataclass(frozen=True, kw_only=True)
class Head:
    """What is known of a recorded rollout as a whole."""

    rollout_id: int
    student: str
    """The checkpoint that the run began with."""
    model: dict[str, Any]
    """Its `ModelFacts`: tokens and pictures mean something to a model of these alone."""
    arguments: dict[str, Any]
    """The run's, as `Args.as_dict` gives them: without secrets."""
    metrics: dict[str, float]
    """The rollout's own."""
    data_position: dict[str, Any]
    """What `RolloutManager.state_dict` gave after the rollout."""

    def to_metadata(self) -> dict[str, str]:
        """Return the schema metadata."""
        entries = {"format": FORMAT, **{field: getattr(self, field) for field in _fields()}}
        return {PREFIX + name: json.dumps(value) for name, value in entries.items()}

    @classmethod
    def from_metadata(cls, path: Path, metadata: Mapping[bytes, bytes]) -> Self:
        """Read the schema metadata of the file at `path`.

        Raises:
            RecordingError: it is no recorded rollout, or one of another format.
        """
        entries = {key.decode("utf-8", "replace"): value for key, value in metadata.items()}
        if FORMAT_KEY not in entries:
            raise RecordingError(
                f"{path} is a parquet file and no recorded rollout: its schema metadata has no {FORMAT_KEY}. "
                "Give --load-debug-rollout-data what an earlier run got as --save-debug-rollout-data."
            )
        version = entries[FORMAT_KEY].decode("utf-8", "replace")
        if version != str(FORMAT):
            raise RecordingError(
                f"{path} is a recorded rollout of format {version}, and format {FORMAT} is read here. Replay "
                "it by the version of slime that wrote it, or record anew."
            )
        try:
            return cls(**{field: json.loads(entries[PREFIX + field]) for field in _fields()})
        except (KeyError, ValueError) as error:
            raise unreadable(path, error) from error


def _fields() -> list[str]:
    return [field.name for field in dataclasses.fields(Head)]


def read_head(path: Path) -> Head:
    """Return the head of a recorded rollout; the rows stay unread.

    Raises:
        RecordingError: there is none, or it cannot be read.
    """
    if not path.is_file():
        raise RecordingError(f"there is no recorded rollout {path}.")
    try:
        metadata = pq.read_schema(path).metadata
    except (OSError, pa.ArrowException) as error:
        raise unreadable(path, error) from error
    return Head.from_metadata(path, metadata or {})


def unreadable(path: Path, error: Exception) -> RecordingError:
    """Return the error that says that the file is damaged."""
    return RecordingError(
        f"{path} cannot be read as a recorded rollout; it is cut off or damaged ({error}). Copy it again "
        "from where it was recorded, or record anew."
    )
