"""Weights in flat buckets: all of them, unchanged, never more than one bucket at a time."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from slime.weight_sync.buckets import device_memory, fill_buckets

CPU = device_memory(torch.device("cpu"))


def weights(*sizes: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"w{i}": torch.randn(size, generator=generator).to(dtype) for i, size in enumerate(sizes)}


@pytest.mark.parametrize(
    ("max_bytes", "buckets"),
    [
        (1000, [["w0", "w1", "w2", "w3"]]),
        (80, [["w0", "w1"], ["w2", "w3"]]),
        (1, [["w0"], ["w1"], ["w2"], ["w3"]]),
    ],
)
def test_all_weights_come_once_and_unchanged(max_bytes: int, buckets: list[list[str]]) -> None:
    sent = weights(10, 10, 5, 15)
    seen: dict[str, Tensor] = {}
    names, lasts = [], []
    for bucket in fill_buckets(sent.items(), max_bytes, CPU):
        names.append([name for name, _ in bucket.named_tensors])
        lasts.append(bucket.last)
        seen |= {name: tensor.clone() for name, tensor in bucket.named_tensors}
        assert bucket.flat.numel() == sum(tensor.nbytes for _, tensor in bucket.named_tensors)
        joined = torch.cat([tensor.flatten().view(torch.uint8) for _, tensor in bucket.named_tensors])
        assert torch.equal(bucket.flat, joined)
    assert names == buckets
    assert lasts == [False] * (len(buckets) - 1) + [True]
    assert all(torch.equal(seen[name], tensor) for name, tensor in sent.items())


def test_a_type_that_would_lie_askew_begins_a_new_bucket() -> None:
    odd = {
        "a": torch.ones(3, dtype=torch.bfloat16),
        "b": torch.ones(2),
        "c": torch.ones(1, dtype=torch.bfloat16),
    }
    names = [[name for name, _ in bucket.named_tensors] for bucket in fill_buckets(odd.items(), 1000, CPU)]
    assert names == [["a"], ["b", "c"]]


def test_a_tensor_is_gone_when_the_next_but_one_is_asked_for() -> None:
    """Gathered weights do not pile up: the stream keeps a bucket, not the model."""
    alive: list[weakref.ref[Tensor]] = []

    def gathered() -> Iterator[tuple[str, Tensor]]:
        for number in range(6):
            tensor = torch.full((4,), float(number))
            alive.append(weakref.ref(tensor))
            yield f"w{number}", tensor
            del tensor
            assert sum(ref() is not None for ref in alive) <= 1

    for _ in fill_buckets(gathered(), 32, CPU):
        pass
    assert len(alive) == 6


def test_one_piece_of_memory_serves_all_buckets() -> None:
    sizes: list[int] = []

    def allocate(size: int) -> Tensor:
        sizes.append(size)
        return CPU(size)

    assert sum(1 for _ in fill_buckets(weights(5, 5, 40, 5).items(), 40, allocate)) == 3
    assert sizes == [40, 160]


def test_no_weights_are_an_error() -> None:
    with pytest.raises(ValueError, match="no weights"):
        next(fill_buckets([], 10, CPU))
