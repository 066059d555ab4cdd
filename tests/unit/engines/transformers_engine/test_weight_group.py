"""Groups that cannot be joined and broadcasts that cannot be laid out end in a message."""

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch

from slime.engines.process import free_port
from slime.engines.transformers_engine.weight_group import Broadcast, GroupPlace, UpdateGroups

CPU = torch.device("cpu")


def place(name: str, *, rank: int = 0, world_size: int = 1) -> GroupPlace:
    return GroupPlace(name, "127.0.0.1", free_port(), rank, world_size, "gloo")


def announced(**changes: Any) -> Broadcast:
    given: dict[str, Any] = {
        "group": "lone", "names": ["a", "b"], "dtypes": ["bfloat16", "float32"], "shapes": [[2, 3], []],
        "flat": True,
    }  # fmt: skip
    return Broadcast(**given | changes)


@pytest.fixture
def groups() -> Iterator[UpdateGroups]:
    """A group of one, whose broadcasts end at once."""
    groups = UpdateGroups(CPU)
    groups.join(place("lone"))
    yield groups
    groups.leave("lone")


@pytest.mark.parametrize("flat", [True, False])
def test_tensors_have_the_announced_types_and_shapes(groups: UpdateGroups, flat: bool) -> None:
    received = groups.receive(announced(flat=flat))
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in received.items()} == {
        "a": (torch.bfloat16, (2, 3)),
        "b": (torch.float32, ()),
    }


def test_what_cannot_be_received_is_refused(groups: UpdateGroups) -> None:
    for changes, message in (
        ({"group": "other"}, "'other' does not exist"),
        ({"dtypes": ["bfloat16", "int8"]}, "b is announced as 'int8'"),
        ({"shapes": [[3], []]}, "byte 6"),
    ):
        with pytest.raises(ValueError, match=message):
            groups.receive(announced(**changes))


def test_a_name_is_joined_once_and_left_once(groups: UpdateGroups) -> None:
    with pytest.raises(ValueError, match="'lone' exists"):
        groups.join(place("lone"))
    groups.join(place("again"))
    groups.leave("again")
    groups.join(place("again"))
    groups.leave("again")
    with pytest.raises(KeyError):
        groups.leave("again")


def test_a_trainer_that_never_comes_is_given_up() -> None:
    with pytest.raises(RuntimeError):
        UpdateGroups(CPU, timedelta(seconds=1)).join(place("absent", rank=1, world_size=2))
