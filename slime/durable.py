"""Files and folders that are there whole or not at all, after a crash and after a power failure too.

What is written gets a name that nobody takes for complete, is flushed to the disk, and is renamed.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial"
REPLACED = ".replaced"
"""Ends of the names of what is being written, and of what is being removed."""
LOCK_NAME = ".lock"
logger = logging.getLogger(__name__)


class FolderInUseError(RuntimeError):
    """Another process writes into a folder."""


def begin_folder(path: Path) -> Path:
    """Return an empty folder beside `path` in which it is to be written; `finish_folder` gives it the name.

    What an earlier attempt left of it is removed.
    """
    partial = _hidden(path, PARTIAL)
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    return partial


def finish_folder(partial: Path, path: Path) -> None:
    """Give a written folder its name; what had it before is removed."""
    sync_tree(partial)
    if path.exists():
        remove_folder(path)
    partial.rename(path)
    _sync(path.parent)


def remove_folder(path: Path) -> None:
    """Remove a folder, which is never seen half removed under its name."""
    doomed = _hidden(path, REPLACED)
    if doomed.exists():
        shutil.rmtree(doomed)
    path.rename(doomed)
    shutil.rmtree(doomed)


def remove_leftovers(parent: Path) -> None:
    """Remove what a process that was killed was writing or removing in `parent`."""
    for ending in (PARTIAL, REPLACED):
        for path in parent.glob(f".*{ending}"):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def write_file(path: Path, content: str) -> None:
    """Write a text file, or replace it at once."""
    partial = _hidden(path, PARTIAL)
    partial.write_text(content, encoding="utf-8")
    _sync(partial)
    os.replace(partial, path)
    _sync(path.parent)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes that ask for it out of a folder until the block ends, or this process does.

    Raises:
        FolderInUseError: another process has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_NAME).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FolderInUseError(
                f"{folder} belongs to a run that is not over, and two would write the same files. Wait for "
                "it, end it, or use another folder (--output-dir; with a launcher SLIME_SCRIPT_OUTPUT_DIR)."
            ) from None
        except OSError:  # a file system without locks, which guards nothing
            logger.warning("%s cannot be locked against a second run", folder)
        yield


def sync_tree(folder: Path) -> None:
    """Flush a folder and all that is below it to the disk."""
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            _sync(Path(place) / name)
        _sync(Path(place))


def _hidden(path: Path, ending: str) -> Path:
    return path.with_name(f".{path.name}{ending}")


def _sync(path: Path) -> None:
    """Flush a file, or the names in a folder."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
