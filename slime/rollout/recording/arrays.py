"""Rows of numbers, some of them missing, as columns of lists and back; no number becomes a Python object.

Shape letters: R response tokens, K teacher top-k.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Array = npt.NDArray[Any]


def lists(rows: Sequence[Array | None], kind: np.dtype[Any]) -> pa.Array:
    """Return rows [R] as a column of lists."""
    lengths = [0 if row is None else len(row) for row in rows]
    return pa.ListArray.from_arrays(_offsets(lengths), _joined(rows, kind), mask=_missing(rows))


def matrices(rows: Sequence[Array | None], kind: np.dtype[Any]) -> pa.Array:
    """Return rows [R, K] as a column of lists of lists; K may differ between them."""
    shapes = [(0, 0) if row is None else row.shape for row in rows]
    lengths, widths = [shape[0] for shape in shapes], [shape[1] for shape in shapes]
    inner = pa.ListArray.from_arrays(_offsets(np.repeat(widths, lengths)), _joined(rows, kind))
    return pa.ListArray.from_arrays(_offsets(lengths), inner, mask=_missing(rows))


def rows_of_lists(column: pa.ChunkedArray) -> Iterator[Array | None]:
    """Yield the rows of a column of lists, each in memory of its own."""
    whole = column.combine_chunks()
    values, start = whole.flatten().to_numpy(), 0
    for length in _lengths(whole):
        yield None if length is None else values[start : start + length].copy()
        start += length or 0


def rows_of_matrices(column: pa.ChunkedArray, widths: Sequence[int | None]) -> Iterator[Array | None]:
    """Yield the rows [R, K] of a column of lists of lists; `widths` are the rows' K."""
    whole = column.combine_chunks()
    values, start = whole.flatten().flatten().to_numpy(), 0
    for length, width in zip(_lengths(whole), widths, strict=True):
        shape = (length or 0, width or 0)
        stop = start + shape[0] * shape[1]
        yield None if length is None else values[start:stop].copy().reshape(shape)
        start = stop


def _offsets(lengths: Sequence[int] | Array) -> pa.Array:
    return pa.array(np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]), pa.int32())


def _joined(rows: Sequence[Array | None], kind: np.dtype[Any]) -> pa.Array:
    parts = [row.reshape(-1) for row in rows if row is not None]
    return pa.array(np.concatenate(parts) if parts else np.zeros(0, kind))


def _missing(rows: Sequence[Array | None]) -> pa.Array:
    return pa.array([row is None for row in rows], pa.bool_())


def _lengths(column: pa.Array) -> list[int | None]:
    """Return the lengths of a column's lists; None where one is missing."""
    lengths = np.diff(column.offsets.to_numpy()).tolist()
    there = column.is_valid().to_pylist()
    return [length if is_there else None for length, is_there in zip(lengths, there, strict=True)]
