"""Which columns of a data set flags name, and what a row says in those of text. Reads no picture."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from slime.arguments.data import DataArgs
from slime.data.reader import RowRef, Shard


def columns_of(args: DataArgs) -> list[str]:
    """Return all columns that flags name."""
    wanted = (args.input_key, args.label_key, args.multimodal_keys.get("image"), args.metadata_key)
    return list(dict.fromkeys(column for column in wanted if column))


def column_problems(shard: Shard, args: DataArgs) -> Iterator[tuple[str, str]]:
    """Yield (what, remedy) for every column that a flag names and a file lacks in all its rows."""
    if shard.columns is None:
        return
    flags = {
        "--input-key": args.input_key,
        "--label-key": args.label_key,
        "--multimodal-keys": args.multimodal_keys.get("image"),
    }
    for flag, column in flags.items():
        if column is not None and column not in shard.columns:
            yield (
                f"{shard.name} has no column {column!r}, which {flag} names; it has "
                f"{', '.join(shard.columns)}",
                f"Set {flag}"
                + (" ('{}' for text alone)." if flag == "--multimodal-keys" else " to the right one."),
            )


def read_text(row: RowRef, args: DataArgs) -> tuple[Any, str | None, dict[str, Any]]:
    """Return (prompt, label, metadata) of a row.

    Raises:
        BadRow: one of them is missing or of no use.
    """
    picture = args.multimodal_keys.get("image")
    values = row.get([column for column in columns_of(args) if column != picture])
    prompt = _present(row, values, args.input_key, "--input-key")
    label = None if args.label_key is None else _present(row, values, args.label_key, "--label-key")
    if label is not None and (isinstance(label, bool) or not isinstance(label, str | int | float)):
        raise row.bad(f"the label in column {args.label_key!r} is a {type(label).__name__}; text is needed.")
    if isinstance(label, float) and not math.isfinite(label):  # how tables write that nothing is there
        raise row.bad(f"the label in column {args.label_key!r} is {label}; text is needed.")
    metadata = values.get(args.metadata_key)
    if metadata is not None and not isinstance(metadata, dict):
        raise row.bad(f"column {args.metadata_key!r} is a {type(metadata).__name__}; an object is needed.")
    return prompt, None if label is None else str(label), metadata or {}


def _present(row: RowRef, values: Mapping[str, Any], column: str, flag: str) -> Any:
    """Return a value that must be there."""
    if column not in values:
        raise row.bad(f"no column {column!r} ({flag}).")
    if values[column] is None:
        raise row.bad(f"column {column!r} ({flag}) is empty.")
    return values[column]
