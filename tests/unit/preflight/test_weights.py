"""The size of a model, by its files or by its name."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from slime.preflight.weights import WeightFileError, Weights, read_header, weights_of
from slime.tiny.paths import checkpoint_path
from tests.fakes.launches import write_model


def test_headers_tell_what_the_tensors_are() -> None:
    path = checkpoint_path("student")
    tensors = load_file(path / "model.safetensors")
    assert weights_of(str(path)) == Weights(
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        stored=(path / "model.safetensors").stat().st_size,
        vision=sum(tensor.numel() for name, tensor in tensors.items() if "visual" in name),
    )
    assert {name: entry["shape"] for name, entry in read_header(path / "model.safetensors").items()} == {
        name: list(tensor.shape) for name, tensor in tensors.items()
    }


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("Qwen/Qwen3-VL-4B-Thinking", 4),
        ("/models/Qwen3-VL-30B-A3B-Instruct", 30),
        ("some/model-0.6B", 0.6),
        ("Qwen3-VL-235B-A22B", 235),
        ("a/base", None),
        ("a/3Bit", None),
    ],
)
def test_a_name_tells_the_size_where_there_are_no_files(name: str, billions: float | None) -> None:
    weights = weights_of(name)
    if billions is None:
        assert weights is None
    else:
        assert weights == Weights(int(billions * 1e9), 2 * int(billions * 1e9), exact=False)


def test_a_file_that_is_not_whole_is_told(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model", {"a": [10, 10]}) / "model.safetensors"
    assert read_header(path)["a"]["shape"] == [10, 10]
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size - 1)
    with pytest.raises(WeightFileError, match=f"has {size - 1} bytes and its header speaks of {size}"):
        read_header(path)
    with path.open("r+b") as file:
        file.truncate(20)
    with pytest.raises(WeightFileError, match="was cut off: it has 20 bytes"):
        read_header(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 8,
        b"version https://git-lfs",
        b"\x02" + b"\0" * 7 + b"[]",
        b"\x08" + b"\0" * 7 + b'{"a": 1}',
    ],
)
def test_what_is_no_weight_file_is_told(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(WeightFileError):
        read_header(path)
