"""Weights to the engines through a folder: written by training rank 0, read by `/update_weights_from_disk`.

A version is written under a temporary name and renamed when complete, so an engine never reads half of one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from slime.engines.control import EngineControl
from slime.weight_sync.base import EngineMember, Parameters, drain

INDEX_NAME = "model.safetensors.index.json"
MAX_SHARD_BYTES = 4 * 2**30
DTYPE_KEYS = ("dtype", "torch_dtype")
WEIGHT_SUFFIXES = frozenset({".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack"})


class DiskSender:
    """Implements `WeightSender` through a folder that training ranks and engines see."""

    needs_session = False

    def __init__(self, folder: Path, checkpoint: Path, *, leads: bool) -> None:
        """`folder` holds the newest version and the one being written; `checkpoint` lends config and
        tokenizer."""
        self._folder = folder
        self._checkpoint = checkpoint
        self._leads = leads

    async def send(
        self, parameters: Parameters, engines: Sequence[EngineMember], control: EngineControl, version: str
    ) -> int:
        """Write the folder and let every engine read it."""
        target = self._folder / f"version-{version}"
        if self._leads:  # it may be there already, written for an engine that has been started anew since
            shutil.rmtree(target, ignore_errors=True)
        size = write_weights(parameters, target, checkpoint=self._checkpoint, writes=self._leads)
        if self._leads:
            await control.update_weights_from_disk(str(target), version)
            self._retire_all_but(target)
        return size

    def drain(self, parameters: Parameters) -> None:
        """Gather what is left; nothing of it is kept."""
        drain(parameters)

    def _retire_all_but(self, current: Path) -> None:
        for path in self._folder.iterdir():
            if path.is_dir() and path != current:
                shutil.rmtree(path)


def write_weights(
    parameters: Parameters,
    target: Path,
    *,
    checkpoint: Path,
    writes: bool,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> int:
    """Stream `parameters` into a Hugging Face folder `target` beside the files of `checkpoint`; return the
    bytes.

    `target` is there whole or not at all. Gathering is collective, so every rank calls this and goes through
    all `parameters`; only the one that `writes` touches the disk.

    Raises:
        FileExistsError: `target` is there already.
    """
    partial = target.with_name(f".{target.name}.partial")
    if writes and target.exists():
        raise FileExistsError(f"{target} exists; a version of the weights is published once.")
    if writes:
        partial.mkdir(parents=True)
    try:
        total = fill_folder(
            parameters, partial, checkpoint=checkpoint, writes=writes, max_shard_bytes=max_shard_bytes
        )
        if writes:
            partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return total


def fill_folder(
    parameters: Parameters,
    folder: Path,
    *,
    checkpoint: Path,
    writes: bool,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> int:
    """Write `parameters` and the files of `checkpoint` that are no weights into an empty folder; return the
    bytes of the weights. Collective as `write_weights` is; at most one shard is in memory.

    The config says in which precision the weights are, which need not be the checkpoint's.
    """
    if not writes:
        drain(parameters)
        return 0
    copy_companions(checkpoint, folder)
    shards, total, dtype = [], 0, None
    for number, shard in enumerate(_shards(parameters, max_shard_bytes)):
        save_file(shard, folder / f"shard-{number}", metadata={"format": "pt"})
        shards.append(list(shard))
        total += sum(tensor.nbytes for tensor in shard.values())
        dtype = next(iter(shard.values())).dtype
    _name_shards(folder, shards, total)
    if dtype is not None:
        _say_dtype(folder / "config.json", str(dtype).removeprefix("torch."))
    return total


def copy_companions(checkpoint: Path, target: Path) -> None:
    """Copy config, tokenizer, processor and chat template: every file of `checkpoint` that is not weights."""
    for path in sorted(checkpoint.iterdir()):
        if path.is_file() and path.suffix not in WEIGHT_SUFFIXES and not path.name.endswith(".index.json"):
            shutil.copyfile(path, target / path.name)


def _say_dtype(path: Path, dtype: str) -> None:
    """Let the config, and those in it of the parts, name `dtype` wherever they name a precision."""
    if not path.is_file():
        return

    def renamed(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: dtype if name in DTYPE_KEYS else renamed(inner) for name, inner in value.items()}

    config = json.loads(path.read_text(encoding="utf-8"))
    if renamed(config) != config:
        path.write_text(json.dumps(renamed(config), indent=2) + "\n", encoding="utf-8")


def _shards(parameters: Parameters, max_bytes: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in parameters:
        tensor = tensor.detach().cpu().contiguous()
        if shard and size + tensor.nbytes > max_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    if shard:
        yield shard


def _name_shards(folder: Path, shards: list[list[str]], total: int) -> None:
    """Give the shards the names that loaders look for, with an index where there is more than one."""
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / "model.safetensors")
        return
    weight_map = {}
    for number, names in enumerate(shards):
        file_name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{number}").rename(folder / file_name)
        weight_map.update(dict.fromkeys(names, file_name))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=1))
