"""Where a run stands, as a folder: the trainer's state, the position in the data, and what the summary needs.

A checkpoint is `<--save>/rollout-000010/`, complete once `latest` names it. Which state the trainer keeps in
its folder is the backend's business.
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

LATEST_FILE = "latest"
STATE_FILE = "state.json"


@dataclass(kw_only=True)
class RunState:
    """The driver's own state between two rollouts."""

    rollout_id: int = 0
    """The next rollout."""
    student_tokens: int = 0
    student_before: float | None = None
    student_after: float | None = None
    teacher: float | None = None
    data: dict[str, Any] = field(default_factory=dict)
    """What the rollout manager's `state_dict` gave."""

    def advance(self, tokens: int) -> None:
        """Count one more rollout, in which the student sampled `tokens` tokens."""
        self.rollout_id += 1
        self.student_tokens += tokens

    def saw_student(self, accuracy: float, rollout_id: int) -> None:
        """Remember an evaluation of the student: the first, before any rollout, and the latest."""
        if rollout_id == 0:
            self.student_before = accuracy
        else:
            self.student_after = accuracy


def local_model(name: str) -> Path:
    """Return the folder of a Hugging Face model; a hub name is downloaded, or found in the hub's cache.

    Raises:
        FileNotFoundError: neither a folder nor, for all that the hub answers, a model there.
    """
    if Path(name).is_dir():
        return Path(name).resolve()
    from huggingface_hub import snapshot_download  # a second to import, and most runs name a folder
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name))
    except (HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError) as error:
        raise FileNotFoundError(
            f"--hf-checkpoint {name} is no folder here and no model that the Hugging Face hub gives us "
            f"({error})."
        ) from error


def resume_point(load: str | None) -> tuple[RunState, Path | None]:
    """Return where the run begins: the state of the checkpoint that `--load` names and its folder, or a new
    one.

    Raises:
        FileNotFoundError: `--load` names no checkpoint.
    """
    if load is None:
        return RunState(), None
    checkpoint = find_checkpoint(Path(load))
    return read_state(checkpoint), checkpoint


def begin_checkpoint(save: Path, rollout_id: int) -> Path:
    """Return an empty folder to write the checkpoint into, of a name that nobody takes for complete."""
    path = save / f".rollout-{rollout_id:06d}.partial"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def finish_checkpoint(partial: Path, state: RunState) -> Path:
    """Add the driver's state, give the folder its name, and let `latest` name it; return the folder."""
    (partial / STATE_FILE).write_text(json.dumps(asdict(state), indent=1), encoding="utf-8")
    path = partial.parent / f"rollout-{state.rollout_id:06d}"
    shutil.rmtree(path, ignore_errors=True)
    partial.rename(path)
    marker = partial.parent / f".{LATEST_FILE}.partial"
    marker.write_text(path.name, encoding="utf-8")
    os.replace(marker, partial.parent / LATEST_FILE)
    return path


def find_checkpoint(load: Path) -> Path:
    """Return the checkpoint that `--load` names: itself one, or a folder whose `latest` names it.

    Raises:
        FileNotFoundError: there is none.
    """
    if (load / STATE_FILE).is_file():
        return load
    marker = load / LATEST_FILE
    if marker.is_file():
        path = load / marker.read_text(encoding="utf-8").strip()
        if (path / STATE_FILE).is_file():
            return path
    raise FileNotFoundError(
        f"--load {load}: neither a checkpoint (a folder with {STATE_FILE}) nor a folder of checkpoints with "
        f"{LATEST_FILE}. Give what an earlier run got as --save, or drop --load."
    )


def newest_checkpoint(save: str | None, load: str | None) -> Path | None:
    """Return the checkpoint that a run would go on from: its own newest, or what it began with; None without
    either."""
    for folder in (save, load):
        with suppress(FileNotFoundError):
            if folder is not None:
                return find_checkpoint(Path(folder))
    return None


def read_state(checkpoint: Path) -> RunState:
    """Return the driver's state of a checkpoint."""
    return RunState(**json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8")))
