"""Published weights: complete or absent, and named as the checkpoint's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file

from slime.weight_sync.disk import DiskSender, write_weights


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"model.layer.{i}": torch.randn(4, 8, generator=generator) for i in range(5)}


@pytest.fixture
def checkpoint(tmp_path: Path, weights: dict[str, torch.Tensor]) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    save_file({name: tensor.bfloat16() for name, tensor in weights.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "model.safetensors.index.json").write_text("stale")
    return folder


def test_one_file_with_the_companions_of_the_checkpoint(tmp_path, checkpoint, weights):
    target = tmp_path / "version-3"
    size = write_weights(iter(weights.items()), target, checkpoint=checkpoint, writes=True)
    assert size == 5 * 4 * 8 * 4
    assert sorted(path.name for path in target.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "model.safetensors",
    ]
    read = load_file(target / "model.safetensors")
    assert all(torch.equal(read[name], tensor) for name, tensor in weights.items())


def test_shards_over_the_limit_come_with_an_index(tmp_path, checkpoint, weights):
    target = tmp_path / "v"
    write_weights(iter(weights.items()), target, checkpoint=checkpoint, writes=True, max_shard_bytes=2 * 128)
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 5 * 128
    assert set(index["weight_map"]) == set(weights)
    assert set(index["weight_map"].values()) == {f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)}
    for name, file_name in index["weight_map"].items():
        assert torch.equal(load_file(target / file_name)[name], weights[name])


def test_the_config_says_in_which_precision_the_weights_are(tmp_path, checkpoint, weights):
    config = {"dtype": "bfloat16", "text_config": {"dtype": "bfloat16", "layers": 2}, "tie": True}
    (checkpoint / "config.json").write_text(json.dumps(config))
    write_weights(iter(weights.items()), tmp_path / "v", checkpoint=checkpoint, writes=True)
    written = json.loads((tmp_path / "v" / "config.json").read_text())
    assert written == {"dtype": "float32", "text_config": {"dtype": "float32", "layers": 2}, "tie": True}
    assert json.loads((checkpoint / "config.json").read_text()) == config


def test_views_of_one_storage_and_gradients_can_be_written(tmp_path, checkpoint, weights):
    stacked = torch.stack(list(weights.values())).requires_grad_()
    views = ((name, stacked[i]) for i, name in enumerate(weights))
    write_weights(views, tmp_path / "v", checkpoint=checkpoint, writes=True)
    read = load_file(tmp_path / "v" / "model.safetensors")
    assert all(torch.equal(read[name], tensor) for name, tensor in weights.items())


def test_a_rank_that_does_not_write_still_goes_through_all_tensors(tmp_path, checkpoint, weights):
    parameters = iter(weights.items())
    assert write_weights(parameters, tmp_path / "v", checkpoint=checkpoint, writes=False) == 0
    assert next(parameters, None) is None
    assert not (tmp_path / "v").exists()


def test_a_failure_in_the_middle_leaves_nothing(tmp_path, checkpoint, weights):
    def parameters():
        yield from list(weights.items())[:3]
        raise ConnectionError("a rank is gone")

    with pytest.raises(ConnectionError):
        write_weights(parameters(), tmp_path / "v", checkpoint=checkpoint, writes=True, max_shard_bytes=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_version_is_written_once(tmp_path, checkpoint, weights):
    write_weights(iter(weights.items()), tmp_path / "v", checkpoint=checkpoint, writes=True)
    with pytest.raises(FileExistsError):
        write_weights(iter(weights.items()), tmp_path / "v", checkpoint=checkpoint, writes=True)


class Control:
    """Notes what an engine is told to load, and whether it was there by then."""

    def __init__(self) -> None:
        self.loaded: list[tuple[str, str]] = []

    async def update_weights_from_disk(self, path: str, version: str) -> None:
        assert (Path(path) / "model.safetensors").exists()
        self.loaded.append((Path(path).name, version))


async def test_every_version_is_loaded_and_only_the_newest_stays(tmp_path, checkpoint, weights):
    folder, control = tmp_path / "weights", Control()
    folder.mkdir()
    sender = DiskSender(folder, checkpoint, leads=True)
    for version in ("0", "1", "1"):  # the last for an engine that was started anew
        size = await sender.send(iter(weights.items()), [], cast(Any, control), version)
        assert size == 5 * 4 * 8 * 4
        assert [path.name for path in folder.iterdir()] == [f"version-{version}"]
    assert control.loaded == [("version-0", "0"), ("version-1", "1"), ("version-1", "1")]
