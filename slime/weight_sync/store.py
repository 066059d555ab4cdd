"""The folder that holds a run's published weights, in shared memory where that has room.

Used by the driver, so it knows files and no tensors; `disk.py` writes what goes in.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

SHARED_MEMORY = Path("/dev/shm")
PREFIX = "slime-weights-"
LOCK_NAME = ".lock"


class WeightStore:
    """The folder of a run's published weights: at most the newest version and the one being written.

    A lock held for the life of the run marks the folder as in use; `close` removes it, and the next run on
    this machine removes what a killed run left behind.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.current: Path | None = None
        self._lock = (root / LOCK_NAME).open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

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
        parent = output_dir
        if one_machine and shared_memory.is_dir() and os.access(shared_memory, os.W_OK):
            _remove_abandoned(shared_memory)
            # A bf16 checkpoint may be published in float32, and two versions exist for a moment.
            if shutil.disk_usage(shared_memory).free > 4 * checkpoint_bytes(checkpoint):
                parent = shared_memory
        parent.mkdir(parents=True, exist_ok=True)
        return cls(Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=parent)))

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
        self._lock.close()
        shutil.rmtree(self.root, ignore_errors=True)

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
    files = sorted(checkpoint.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(
            f"{checkpoint} holds no *.safetensors file, which --hf-checkpoint needs; convert the checkpoint "
            "with "
            "`save_pretrained` of transformers, or check the path."
        )
    return files


def _remove_abandoned(parent: Path) -> None:
    """Remove folders of runs that were killed: their lock is free. Those of other users are left alone."""
    for root in parent.glob(f"{PREFIX}*"):
        with (
            suppress(FileNotFoundError, PermissionError, BlockingIOError),
            (root / LOCK_NAME).open("r+") as lock,
        ):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(root, ignore_errors=True)
