"""Folders in shared places (shared memory, the temporary folder) that live no longer than the run.

A lock marks a folder as in use. The run removes its own at the end; what a killed run left behind, the next
run on the machine removes.
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

LOCK_NAME = ".lock"


class ScratchFolder:
    """A new folder `<parent>/<prefix><pid>-…`, locked until it is closed."""

    def __init__(self, parent: Path, prefix: str) -> None:
        parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(parent, prefix)
        # Another run that starts at this moment removes what bears the prefix and is not locked.
        hidden = Path(tempfile.mkdtemp(prefix=f".{prefix}{os.getpid()}-", dir=parent))
        self._lock = (hidden / LOCK_NAME).open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.path = hidden.rename(hidden.with_name(hidden.name.removeprefix(".")))

    def close(self) -> None:
        """Remove the folder. A second call does nothing."""
        self._lock.close()
        shutil.rmtree(self.path, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _remove_abandoned(parent: Path, prefix: str) -> None:
    """Remove folders of runs that were killed: their lock is free. Those of other users are left alone."""
    for folder in parent.glob(f"{prefix}*"):
        with (
            suppress(FileNotFoundError, NotADirectoryError, PermissionError, BlockingIOError),
            (folder / LOCK_NAME).open("r+") as lock,
        ):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
