"""Samples as typed columns and back, bit for bit.

A row is a sample. What differs: opened pictures (`multimodal_inputs`) stay out, of `multimodal_train_inputs`
hashes and grids are kept, and in JSON (`metadata`, a prompt of messages) a tuple becomes a list. Shape
letters: R response tokens, K teacher top-k.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from slime.arguments.printing import without_credentials
from slime.rollout.recording.arrays import Array, lists, matrices, rows_of_lists, rows_of_matrices
from slime.rollout.recording.head import RecordingError
from slime.utils.types import Sample, SampleStatus

PLAIN = ("index", "group_index", "response", "response_length", "label")
"""Columns that are fields of a sample as they stand."""
LISTS = {
    "tokens": np.dtype(np.int32),
    "loss_mask": np.dtype(np.int8),
    "rollout_log_probs": np.dtype(np.float64),
}
"""Fields that are lists of numbers; Python's floats are float64."""
VECTORS = {"teacher_log_probs": np.dtype(np.float32), "teacher_tail_mass": np.dtype(np.float32)}
"""Fields that are tensors [R]."""
MATRICES = {"teacher_top_ids": np.dtype(np.int32), "teacher_top_log_probs": np.dtype(np.float32)}
"""Fields that are tensors [R, K]; the column `teacher_top_k` holds K, which R = 0 rows would forget."""

SCHEMA = pa.schema(
    [
        ("index", pa.int64()),
        ("group_index", pa.int64()),
        ("status", pa.string()),
        ("prompt", pa.string()),
        ("prompt_messages", pa.string()),
        ("response", pa.string()),
        ("label", pa.string()),
        ("reward", pa.float64()),
        ("tokens", pa.list_(pa.int32())),
        ("response_length", pa.int32()),
        ("loss_mask", pa.list_(pa.int8())),
        ("rollout_log_probs", pa.list_(pa.float64())),
        ("teacher_log_probs", pa.list_(pa.float32())),
        ("teacher_top_k", pa.int32()),
        ("teacher_top_ids", pa.list_(pa.list_(pa.int32()))),
        ("teacher_top_log_probs", pa.list_(pa.list_(pa.float32()))),
        ("teacher_tail_mass", pa.list_(pa.float32())),
        ("weight_versions", pa.list_(pa.string())),
        ("metadata", pa.string()),
        ("image_hashes", pa.list_(pa.string())),
        ("image_grid_thw", pa.list_(pa.list_(pa.int32()))),
        # above 2 GB in a few hundred rows the offsets of plain binary are too small
        ("image_pngs", pa.list_(pa.large_binary())),
    ]
)
"""The columns; `prompt_messages` and `metadata` are JSON."""
REPEATED = ["status", "prompt", "prompt_messages", "label"]
"""Columns whose values many rows share."""


def to_table(samples: Sequence[Sample], pictures: Mapping[str, bytes], written: set[str]) -> pa.Table:
    """Return the rows of samples.

    Each picture's bytes are in the first row that shows it, null in all others.

    Args:
        samples: scored; their rewards are numbers.
        pictures: content hash -> PNG.
        written: hashes whose bytes an earlier table has; those of this one are added.

    Raises:
        RecordingError: a value is of another kind than `Sample` promises, or cannot be kept.
    """
    columns: dict[str, Any] = {name: [getattr(sample, name) for sample in samples] for name in PLAIN}
    columns["status"] = [sample.status.value for sample in samples]
    columns["prompt"] = [None if isinstance(sample.prompt, list) else sample.prompt for sample in samples]
    columns["prompt_messages"] = [_prompt_json(sample) for sample in samples]
    columns["reward"] = [_reward(sample) for sample in samples]
    for name, kind in LISTS.items():
        columns[name] = lists([_numbers(sample, name, kind) for sample in samples], kind)
    for name, kind in VECTORS.items():
        columns[name] = lists([_tensor(sample, name, kind, 1) for sample in samples], kind)
    for name, kind in MATRICES.items():
        columns[name] = matrices([_tensor(sample, name, kind, 2) for sample in samples], kind)
    columns["teacher_top_k"] = [_top_k(sample) for sample in samples]
    columns["weight_versions"] = [sample.weight_versions for sample in samples]
    columns["metadata"] = [_metadata_json(sample) for sample in samples]
    columns["image_hashes"] = [_train_input(sample, "image_hashes") for sample in samples]
    columns["image_grid_thw"] = [_train_input(sample, "image_grid_thw") for sample in samples]
    columns["image_pngs"] = [_pngs(sample, pictures, written) for sample in samples]
    return pa.table([_column(samples, field, columns[field.name]) for field in SCHEMA], schema=SCHEMA)


def from_table(table: pa.Table, pictures: dict[str, bytes]) -> list[Sample]:
    """Return the samples of rows; the pictures whose bytes these rows hold are added to `pictures`."""
    rows = table.combine_chunks()
    ready = {*LISTS, *VECTORS, *MATRICES}
    plain = {name: rows[name].to_pylist() for name in rows.column_names if name not in ready}
    arrays = {
        name: [None if row is None else row.tolist() for row in rows_of_lists(rows[name])] for name in LISTS
    }
    tensors = {name: [_to_tensor(row) for row in rows_of_lists(rows[name])] for name in VECTORS}
    for name in MATRICES:
        tensors[name] = [_to_tensor(row) for row in rows_of_matrices(rows[name], plain["teacher_top_k"])]
    columns = {**plain, **arrays, **tensors}
    samples = []
    for number in range(len(rows)):
        row = {name: values[number] for name, values in columns.items()}
        shown = zip(row["image_hashes"] or [], row["image_pngs"] or [], strict=True)
        pictures.update({name: png for name, png in shown if png is not None})
        samples.append(_sample(row))
    return samples


def _sample(row: Mapping[str, Any]) -> Sample:
    messages, hashes, grids = row["prompt_messages"], row["image_hashes"], row["image_grid_thw"]
    inputs = {"image_hashes": hashes, "image_grid_thw": [tuple(grid) for grid in grids or []]}
    taken = (*PLAIN, *LISTS, *VECTORS, *MATRICES, "reward", "weight_versions")
    return Sample(
        **{name: row[name] for name in taken},
        status=SampleStatus(row["status"]),
        prompt=row["prompt"] if messages is None else json.loads(messages),
        metadata=json.loads(row["metadata"]),
        multimodal_train_inputs=None if hashes is None else inputs,
    )


def _refused(sample: Sample, why: str, remedy: str = "") -> RecordingError:
    remedy = remedy or "Let the plugin that wrote it leave what slime.utils.types.Sample promises"
    return RecordingError(
        f"sample {sample.index} cannot be recorded: {why}. {remedy}, or drop --save-debug-rollout-data."
    )


def _column(samples: Sequence[Sample], field: pa.Field, values: Any) -> pa.Array:
    """Return a column of the field's type, with the sample named whose value has another."""
    if isinstance(values, pa.Array):
        return values
    try:
        return pa.array(values, field.type)
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        if len(values) > 1:
            parts = zip(samples, values, strict=True)
            return pa.concat_arrays([_column([sample], field, [value]) for sample, value in parts])
        why = f"{field.name} is {values[0]!r:.100}, which is no {field.type} ({error})"
        raise _refused(samples[0], why) from error


def _prompt_json(sample: Sample) -> str | None:
    return _json(sample, "prompt", sample.prompt) if isinstance(sample.prompt, list) else None


def _reward(sample: Sample) -> float | None:
    if sample.reward is None or isinstance(sample.reward, int | float):
        return sample.reward
    raise _refused(sample, f"after post-processing its reward is {sample.reward!r:.100}, no number")


def _numbers(sample: Sample, name: str, kind: np.dtype[Any]) -> Array | None:
    """Return a list of numbers as an array that holds each of them exactly."""
    values = getattr(sample, name)
    if values is None:
        return None
    try:
        given = np.asarray(values)
    except ValueError as error:  # lists of several lengths
        raise _refused(sample, f"{name} is {values!r:.100}, no list of numbers ({error})") from error
    if given.size == 0:
        return np.zeros(0, kind)
    if given.ndim != 1 or given.dtype.kind not in "biuf":
        raise _refused(sample, f"{name} is {values!r:.100}, no list of numbers")
    with np.errstate(invalid="ignore"):
        kept = given.astype(kind)
    if not np.array_equal(kept, given, equal_nan=kind.kind == "f"):
        wrong = int(np.flatnonzero(kept != given)[0])
        raise _refused(sample, f"{name}[{wrong}] is {values[wrong]!r}, which is no {kind}")
    return kept


def _tensor(sample: Sample, name: str, kind: np.dtype[Any], dimensions: int) -> Array | None:
    values = getattr(sample, name)
    if values is None:
        return None
    if not isinstance(values, Tensor) or values.dim() != dimensions:
        raise _refused(sample, f"{name} is {values!r:.100}, no tensor of {dimensions} dimensions")
    array = values.detach().cpu().numpy()
    if array.dtype != kind:
        raise _refused(sample, f"{name} is a tensor of {values.dtype}, and {kind} is needed")
    return array


def _top_k(sample: Sample) -> int | None:
    """Return K."""
    widths = {getattr(sample, name).shape[1] for name in MATRICES if getattr(sample, name) is not None}
    if len(widths) > 1:
        raise _refused(
            sample, f"teacher_top_ids and teacher_top_log_probs have the widths {sorted(widths)}, not one"
        )
    return widths.pop() if widths else None


def _train_input(sample: Sample, name: str) -> list[Any] | None:
    return None if sample.multimodal_train_inputs is None else list(sample.multimodal_train_inputs[name])


def _pngs(sample: Sample, pictures: Mapping[str, bytes], written: set[str]) -> list[bytes | None] | None:
    """Return the bytes of the sample's pictures, null for those that are written already."""
    hashes = _train_input(sample, "image_hashes")
    if hashes is None:
        return None
    column: list[bytes | None] = []
    for name in hashes:
        if name not in pictures:
            raise _refused(sample, f"the bytes of its picture {name[:12]}… are not at hand")
        column.append(None if name in written else pictures[name])
        written.add(name)
    return column


def _metadata_json(sample: Sample) -> str:
    entries = dict(sample.metadata)
    if isinstance(entries.get("error"), str):  # it names the server's address as --rm-url does
        entries["error"] = without_credentials(entries["error"])
    for key, value in entries.items():
        _json(sample, f"metadata[{key!r}]", {key: value})
    return json.dumps(entries)


def _json(sample: Sample, name: str, value: Any) -> str:
    wrong = next(_no_json(value), None)
    if wrong is not None:
        raise _refused(sample, f"{name} is or holds {wrong}, which is no JSON", "Keep it elsewhere")
    return json.dumps(value)


def _no_json(value: Any) -> Iterator[str]:
    """Yield what JSON would refuse, or keep as something else."""
    if isinstance(value, dict):
        yield from (f"the key {key!r}" for key in value if not isinstance(key, str))
        for entry in value.values():
            yield from _no_json(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _no_json(entry)
    elif value is not None and not isinstance(value, str | bool | int | float):
        yield f"a {type(value).__name__}"


def _to_tensor(row: Array | None) -> Tensor | None:
    return None if row is None else torch.from_numpy(row)
