"""Weights are held against the checkpoint before an engine sees them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from slime.weight_sync.checked import checked

WEIGHTS = {f"model.layer.{i}": torch.zeros(4, 8) for i in range(3)}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    return tmp_path


def test_the_checkpoints_own_pass(checkpoint: Path) -> None:
    assert dict(checked(WEIGHTS.items(), checkpoint)) == WEIGHTS


def test_the_tied_head_may_be_there_or_not(checkpoint: Path) -> None:
    with_head = WEIGHTS | {"lm_head.weight": torch.zeros(1)}
    assert set(dict(checked(with_head.items(), checkpoint))) == set(with_head)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"module.layer.2": torch.zeros(1)}, r"module\.layer\.2.*does not have"),
        ({"model.layer.2": torch.zeros(8, 4)}, r"layer\.2 as \[8, 4\].*has as \[4, 8\]"),
    ],
)
def test_a_wrong_name_or_shape_is_refused_before_it_is_sent(checkpoint: Path, changed, message: str) -> None:
    sent = []
    with pytest.raises(RuntimeError, match=message):
        sent += [name for name, _ in checked((WEIGHTS | changed).items(), checkpoint)]
    assert "module.layer.2" not in sent


def test_a_missing_one_is_found_at_the_end(checkpoint: Path) -> None:
    with pytest.raises(RuntimeError, match=r"1 of its 3 tensors are missing \(model\.layer\.1\)"):
        list(checked(((name, WEIGHTS[name]) for name in ("model.layer.0", "model.layer.2")), checkpoint))
