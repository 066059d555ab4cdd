"""Rows with their file and number, out of parquet, jsonl, folders of them, or a hub data set.

A local path wins over a hub name. `PATH@SPLIT` picks a split of a folder or of a hub data set (train by
default), and `PATH@[FROM:TO]` a slice of the rows; both may be given: `owner/name@test@[0:100]`. Knows
nothing of prompts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from slime.data.errors import BadRow, DataError

SUFFIXES = (".parquet", ".jsonl")
_SLICE = re.compile(r"^(?P<path>.+)@\[(?P<start>-?\d*):(?P<stop>-?\d*)\]$")
_SPLIT = re.compile(r"^(?P<path>.+)@(?P<split>[\w.-]+)$", re.ASCII)
_HUB_NAME = re.compile(r"^[\w.-]+/[\w.-]+$", re.ASCII)


class Shard(Protocol):
    """The rows of one file."""

    @property
    def name(self) -> str: ...

    @property
    def columns(self) -> Sequence[str] | None:
        """The columns of the file; None where each row has its own (jsonl)."""
        ...

    def __len__(self) -> int: ...

    def number(self, index: int) -> int:
        """Return the row's number as a user finds it in the file, from 1."""
        ...

    def get(self, index: int, columns: Sequence[str]) -> dict[str, Any]:
        """Return the named columns that the row has, as Python values.

        Raises:
            BadRow: the row cannot be read at all.
        """
        ...

    def count(self, index: int, column: str) -> int | None:
        """Return how many entries a value has (null: 0, no list: 1); None where the row lacks the column."""
        ...


class ArrowShard:
    """Rows of a parquet file or of a hub data set."""

    def __init__(self, name: str, table: pa.Table, columns: Sequence[str]) -> None:
        """Take the table of what is needed, and the names of all columns that the file has."""
        self.name = name
        self.columns = tuple(columns)
        self._table = table

    def __len__(self) -> int:
        return self._table.num_rows

    def number(self, index: int) -> int:
        return index + 1

    def get(self, index: int, columns: Sequence[str]) -> dict[str, Any]:
        try:
            return {
                column: self._table[column][index].as_py()
                for column in columns
                if column in self._table.column_names
            }
        except (
            ValueError,
            OverflowError,
            pa.ArrowException,
        ) as error:  # text that is no UTF-8, dates out of range
            raise BadRow(self.name, self.number(index), f"cannot be read: {error}") from error

    def count(self, index: int, column: str) -> int | None:
        value = self._table[column][index]
        if not value.is_valid:
            return 0
        return (
            len(value)
            if isinstance(value, pa.ListScalar | pa.LargeListScalar | pa.FixedSizeListScalar)
            else 1
        )


class JsonShard:
    """Lines of a jsonl file; blank ones are left out, broken ones are bad when they are asked for."""

    columns = None

    def __init__(self, name: str, lines: Sequence[bytes]) -> None:
        self.name = name
        self._rows = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]

    def __len__(self) -> int:
        return len(self._rows)

    def number(self, index: int) -> int:
        return self._rows[index][0]

    def get(self, index: int, columns: Sequence[str]) -> dict[str, Any]:
        number, line = self._rows[index]
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise BadRow(self.name, number, f"no JSON: {error}") from error
        if not isinstance(row, dict):
            raise BadRow(self.name, number, f"a {type(row).__name__}, not an object with columns.")
        return {column: row[column] for column in columns if column in row}

    def count(self, index: int, column: str) -> int | None:
        row = self.get(index, [column])
        if column not in row:
            return None
        if row[column] is None:
            return 0
        return len(row[column]) if isinstance(row[column], list) else 1


@dataclass(frozen=True)
class RowRef:
    """Where a row is."""

    shard: Shard
    index: int

    @property
    def file(self) -> str:
        return self.shard.name

    @property
    def number(self) -> int:
        return self.shard.number(self.index)

    def get(self, columns: Sequence[str]) -> dict[str, Any]:
        return self.shard.get(self.index, columns)

    def bad(self, why: str) -> BadRow:
        """Return the error that names this row."""
        return BadRow(self.file, self.number, why)


def read_rows(source: str, columns: Sequence[str]) -> list[RowRef]:
    """Return the rows of `source`; only `columns` are read where the format allows it.

    Raises:
        DataError: nothing is there, it cannot be read, or it holds no row.
    """
    path, split, (start, stop) = parse_source(source)
    if Path(path).exists():
        shards = list(_local_shards(Path(path), split, columns))
    else:
        shards = [_hub_shard(path, split or "train", columns)]
    rows = [RowRef(shard, index) for shard in shards for index in range(len(shard))][start:stop]
    if not rows:
        raise DataError(f"{source} holds no rows.")
    return rows


def parse_source(source: str) -> tuple[str, str | None, tuple[int | None, int | None]]:
    """Split `PATH[@SPLIT][@[FROM:TO]]`; an existing path that has an @ in it is taken whole."""
    bounds: tuple[int | None, int | None] = (None, None)
    if not Path(source).exists() and (sliced := _SLICE.match(source)):
        source = sliced["path"]
        bounds = (
            int(sliced["start"]) if sliced["start"] else None,
            int(sliced["stop"]) if sliced["stop"] else None,
        )
    if not Path(source).exists() and (parts := _SPLIT.match(source)):
        return parts["path"], parts["split"], bounds
    return source, None, bounds


def data_folder(source: str) -> Path | None:
    """Return the folder that relative picture paths of `source` start from; None for a hub data set."""
    path = Path(parse_source(source)[0])
    if not path.exists():
        return None
    return path if path.is_dir() else path.parent


def _local_shards(path: Path, split: str | None, columns: Sequence[str]) -> Iterator[Shard]:
    if path.is_file():
        if split is not None:
            raise DataError(
                f"{path} is a file, and @{split} picks a split of a folder or hub data set; drop @{split}."
            )
        yield _file_shard(path, columns)
        return
    files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and not _hidden(file, path))
    if not files:
        raise DataError(f"{path} holds no {' or '.join(SUFFIXES)} file.")
    chosen = [file for file in files if _is_split(file.relative_to(path), split or "train")]
    if not chosen and (split is not None or len(files) > 1):
        names = ", ".join(str(file.relative_to(path)) for file in files[:8])
        raise DataError(
            f"{path} has no file of the split {split or 'train'!r}; it has {names}. "
            "Name a file, or a split as FOLDER@SPLIT (files SPLIT.parquet, SPLIT-*.parquet or SPLIT/*)."
        )
    for file in chosen or files:
        yield _file_shard(file, columns)


def _hidden(file: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(root).parts)


def _is_split(file: Path, split: str) -> bool:
    """Tell whether a file of a folder belongs to a split, by the hub's habits of naming."""
    return split in file.parts[:-1] or re.match(rf"{re.escape(split)}([-_.]|$)", file.stem) is not None


def _file_shard(path: Path, columns: Sequence[str]) -> Shard:
    try:
        if path.suffix == ".jsonl":
            return JsonShard(str(path), path.read_bytes().splitlines())
        if path.suffix == ".parquet":
            there = pq.read_schema(path).names
            needed = [column for column in columns if column in there]
            return ArrowShard(str(path), pq.read_table(path, columns=needed), there)
    except (OSError, pa.ArrowException, ValueError) as error:
        raise DataError(f"{path} cannot be read as {path.suffix[1:]}: {error}") from error
    raise DataError(f"{path} is no data file; {' and '.join(SUFFIXES)} are read.")


def _hub_shard(name: str, split: str, columns: Sequence[str]) -> Shard:
    """Load a data set from the hub (or its local cache), pictures left encoded."""
    if not _HUB_NAME.match(name) or Path(name).suffix in SUFFIXES:
        raise DataError(f"{name} is not there, and is no hub name (owner/name) either.")
    from datasets import load_dataset  # seconds to import; local files do not need it
    from datasets.exceptions import DatasetsError

    try:
        # The "arrow" format hands out the table itself: pictures stay encoded.
        table = cast(pa.Table, load_dataset(name, split=split).with_format("arrow")[:])
    except (OSError, ValueError, RuntimeError, KeyError, DatasetsError) as error:
        raise DataError(
            f"{name} is no local path, and the hub data set cannot be loaded (split {split!r}): {error}"
        ) from error
    needed = table.select([column for column in columns if column in table.column_names])
    return ArrowShard(f"{name}@{split}", needed, table.column_names)
