"""One rollout as one parquet file: whole or not at all, each picture once, every page with a checksum."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from slime.rollout.recording.columns import REPEATED, SCHEMA, from_table, to_table
from slime.rollout.recording.head import Head, RecordingError, unreadable
from slime.utils.types import Sample

WRITER: dict[str, Any] = {
    "compression": "zstd",
    "compression_level": 1,
    "use_dictionary": REPEATED,
    "write_page_checksum": True,
}
ROWS_AT_ONCE = 256
"""Samples that are columns in memory at once: a row group."""


@dataclass(frozen=True, slots=True)
class Recording:
    """What a file holds."""

    head: Head
    samples: list[Sample]
    pictures: dict[str, bytes]
    """Content hash -> PNG."""


def write_rollout(path: Path, head: Head, samples: Sequence[Sample], pictures: Mapping[str, bytes]) -> None:
    """Write a scored rollout to `path`, in the place of what is there; under another name until it is whole.

    Raises:
        RecordingError: a sample holds what cannot be kept.
        OSError: the folder or the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    written: set[str] = set()
    try:
        with pq.ParquetWriter(partial, SCHEMA.with_metadata(head.to_metadata()), **WRITER) as writer:
            for start in range(0, len(samples), ROWS_AT_ONCE):
                writer.write_table(to_table(samples[start : start + ROWS_AT_ONCE], pictures, written))
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def read_rollout(path: Path) -> Recording:
    """Return what `write_rollout` wrote.

    Raises:
        RecordingError: there is no such file, or it is damaged, of another format, or no recorded rollout.
    """
    if not path.is_file():
        raise RecordingError(f"there is no recorded rollout {path}.")
    samples: list[Sample] = []
    pictures: dict[str, bytes] = {}
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            schema = file.schema_arrow
            head = Head.from_metadata(path, schema.metadata or {})
            if not schema.equals(SCHEMA):
                raise RecordingError(f"{path} has other columns than a recorded rollout; record anew.")
            for number in range(file.num_row_groups):
                samples += from_table(file.read_row_group(number), pictures)
    except (OSError, pa.ArrowException) as error:
        raise unreadable(path, error) from error
    return Recording(head, samples, pictures)
