"""The folder that holds a run's published weights, in shared memory where that has room.

Used by the driver, so it knows files and no tensors; `disk.py` writes what goes in.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Self

from slime.scratch import ScratchFolder

SHARED_MEMORY = Path("/dev/shm")
PREFIX = "slime-weights-"


class WeightStore:
    """The folder of a run's published weights: at most the newest version and the one being written."""

    def __init__(self, folder: ScratchFolder) -> None:
        self.root = folder.path
        self.current: Path | None = None
        self._folder = folder

    @classmethod
    def create(
        cls,
        output_dir: Path,
        checkpoint: Path,
        *,
        one_machine: bool,
        shared_memory: Path = SHARED_MEMORY,
    ) -> Self:
        """Make the folder: in shared memory if one machine runs all and two float32 copies fit there."""
        if one_machine and shared_memory.is_dir() and os.access(shared_memory, os.W_OK):
            folder = ScratchFolder(shared_memory, PREFIX)
            # A bf16 checkpoint may be published in float32, and two versions exist for a moment.
            if shutil.disk_usage(shared_memory).free > 4 * checkpoint_bytes(checkpoint):
                return cls(folder)
            folder.close()
        return cls(ScratchFolder(output_dir, PREFIX))

    def path_for(self, version: str) -> Path:
        """Return where `version` is to be written."""
        return self.root / f"version-{version}"

    def retire_all_but(self, version: str) -> None:
        """Remove every version but this one, which the engines have loaded."""
        self.current = self.path_for(version)
        for path in self.root.iterdir():
            if path.is_dir() and path != self.current:
                shutil.rmtree(path)

    def close(self) -> None:
        """Remove the folder. A second call does nothing."""
        self._folder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def checkpoint_bytes(checkpoint: Path) -> int:
    """Return the size of the checkpoint's weights on disk."""
    return sum(path.stat().st_size for path in weight_files(checkpoint))


def weight_files(checkpoint: Path) -> list[Path]:
    """Return the checkpoint's safetensors files.

    Raises:
        FileNotFoundError: it has none.
    """
    files = sorted(checkpoint.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(
            f"{checkpoint} holds no *.safetensors file, which --hf-checkpoint needs; convert the checkpoint "
            "with `save_pretrained` of transformers, or check the path."
        )
    return files
