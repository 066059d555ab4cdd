"""Where a run stands, as a folder: the trainer's state, the position in the data, and what the summary needs.

A checkpoint is `<--save>/rollout-000010/`; `latest` beside it names the newest. It is written under another
name and renamed when all of it is on the disk, and it lists its files: one that lacks a part is never taken
for whole. Which state the trainer keeps in its folder is the backend's business.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slime.durable import begin_folder, finish_folder, remove_folder, remove_leftovers, write_file

if TYPE_CHECKING:
    from slime.arguments import Args

LATEST_FILE = "latest"
STATE_FILE = "state.json"
NAME = re.compile(r"rollout-(\d{6,})")
NOT_THE_MODEL = frozenset(
    ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache", "architectures")
)
"""Entries of a config.json that may change while the model is the same."""
SHOWN = 3
"""Differences that an error lists."""


class CheckpointError(RuntimeError):
    """A checkpoint is not there, not whole, or of another run; nothing has been trained."""


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
    started: float = field(default_factory=time.monotonic, compare=False)
    """When the run would have begun, by this process's clock, had it never stood still."""

    @property
    def wall_seconds(self) -> float:
        """How long the run has taken, in all its processes."""
        return time.monotonic() - self.started

    def advance(self, tokens: int, data: dict[str, Any]) -> None:
        """Count one more rollout, in which the student sampled `tokens` tokens; `data` is the position of the
        next."""
        self.rollout_id += 1
        self.student_tokens += tokens
        self.data = data

    def saw_student(self, accuracy: float, rollout_id: int) -> None:
        """Remember an evaluation of the student: the first, before any rollout, and the latest."""
        if rollout_id == 0:
            self.student_before = accuracy
        else:
            self.student_after = accuracy


@dataclass(frozen=True, kw_only=True)
class Maker:
    """Which run a checkpoint is of."""

    train_backend: str
    num_train_ranks: int
    model: Mapping[str, Any]
    """The student's config.json, flat; what does not say which model it is left out."""


@dataclass(frozen=True, kw_only=True)
class ResumePoint:
    """Where a run begins: a new state, or that of a checkpoint."""

    state: RunState
    checkpoint: Path | None = None
    maker: Maker | None = None
    note: str | None = None
    """What is odd about the checkpoint that was found."""


# ---- writing ----


def begin_checkpoint(save: Path, rollout_id: int) -> Path:
    """Return an empty folder to write the checkpoint into, of a name that nobody takes for complete.

    What a killed process left half written or half removed goes.
    """
    remove_leftovers(save)
    return begin_folder(_path(save, rollout_id))


def finish_checkpoint(partial: Path, state: RunState, maker: Maker) -> Path:
    """Add the driver's state, give the folder its name, and let `latest` name it; return the folder."""
    kept = {name: value for name, value in asdict(state).items() if name != "started"}
    written = kept | {
        "wall_seconds": state.wall_seconds,
        "maker": asdict(maker),
        "files": {str(path.relative_to(partial)): path.stat().st_size for path in _files(partial)},
    }
    write_file(partial / STATE_FILE, json.dumps(written, indent=1))
    path = _path(partial.parent, state.rollout_id)
    finish_folder(partial, path)
    write_file(path.parent / LATEST_FILE, path.name)
    return path


def keep_newest(newest: Path, count: int) -> None:
    """Remove the checkpoints that came before the `count` newest; 0 keeps all.

    Those of later rollouts than `newest` are of a run that was taken up at an earlier one, and stay.
    """
    before = [path for path in checkpoints_in(newest.parent) if _rollout_id(path) <= _rollout_id(newest)]
    for path in before[count:] if count else ():
        remove_folder(path)


def maker_of(args: Args) -> Maker:
    """Return what a checkpoint of this run is known by; `--hf-checkpoint` is a folder."""
    config = json.loads((Path(args.hf_checkpoint) / "config.json").read_text(encoding="utf-8"))
    return Maker(
        train_backend=args.train_backend,
        num_train_ranks=args.num_train_ranks,
        model=dict(_flat(config)),
    )


# ---- finding and reading ----


def resume_point(load: str | None) -> ResumePoint:
    """Return where the run begins: at the checkpoint that `--load` names, or anew.

    Raises:
        CheckpointError: `--load` names no checkpoint, or none that is whole.
    """
    if load is None:
        return ResumePoint(state=RunState())
    checkpoint, note = find_checkpoint(Path(load))
    state, maker = read_state(checkpoint)
    return ResumePoint(state=state, checkpoint=checkpoint, maker=maker, note=note)


def find_checkpoint(load: Path) -> tuple[Path, str | None]:
    """Return the checkpoint that `--load` names: itself one, or a folder whose `latest` names it.

    Where that one is not whole it is the newest whole one before it, and the second value says so.

    Raises:
        CheckpointError: there is none.
    """
    if (load / STATE_FILE).exists():
        problem = damage(load)
        if problem is not None:
            raise CheckpointError(f"--load {load}: {problem}. Give --load another checkpoint.")
        return load, None
    named = _named_by_marker(load)
    found = checkpoints_in(load)
    if named is not None:
        # What is beyond it was left by a run that was taken up at an earlier rollout: the last resort.
        number = _rollout_id(named)
        older = [path for path in found if _rollout_id(path) < number]
        found = [named, *older, *(path for path in found if _rollout_id(path) > number)]
    problems = []
    for path in found:
        problem = damage(path)
        if problem is None:
            return path, _passed_over(load, path, named, problems)
        problems.append(f"{path.name}: {problem}")
    if problems:
        raise CheckpointError(
            f"--load {load}: none of its checkpoints is whole ({'; '.join(problems)}). Bring one back from a "
            "copy, or drop --load to begin anew."
        )
    raise CheckpointError(
        f"--load {load}: neither a checkpoint (a folder with {STATE_FILE}) nor a folder of checkpoints with "
        f"{LATEST_FILE}. Give what an earlier run got as --save, or drop --load."
    )


def newest_checkpoint(save: str | None, load: str | None) -> Path | None:
    """Return the checkpoint that a run would go on from: its own newest, or what it began with; None without
    either."""
    for folder in (save, load):
        with suppress(CheckpointError):
            if folder is not None:
                return find_checkpoint(Path(folder))[0]
    return None


def checkpoints_in(save: Path) -> list[Path]:
    """Return the checkpoints of a folder, whole or not, that of the last rollout first."""
    found = [path for path in save.glob("rollout-*") if NAME.fullmatch(path.name)]
    return sorted(found, key=_rollout_id, reverse=True)


def damage(checkpoint: Path) -> str | None:
    """Say what a checkpoint lacks, or None: it is whole, as far as the sizes of its files tell."""
    try:
        files = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return f"its {STATE_FILE} is not there"
    except (ValueError, KeyError, TypeError) as error:
        return f"its {STATE_FILE} cannot be read ({error!r})"
    for name, size in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"its file {name} is not there"
        if path.stat().st_size != size:
            return f"its file {name} has {path.stat().st_size} bytes and was written with {size}"
    return None


def read_state(checkpoint: Path) -> tuple[RunState, Maker]:
    """Return the driver's state of a whole checkpoint, and which run it is of.

    Raises:
        CheckpointError: another version of this project wrote it.
    """
    written = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    names = {each.name for each in fields(RunState)} - {"started"}
    missing = sorted((names | {"wall_seconds", "maker"}) - written.keys())
    if missing:
        raise CheckpointError(
            f"{checkpoint / STATE_FILE} has no {', '.join(missing)}: another version of this project wrote "
            "it. Resume with that version."
        )
    state = RunState(**{name: written[name] for name in names})
    state.started -= written["wall_seconds"]
    return state, Maker(**written["maker"])


def require_same_run(args: Args, point: ResumePoint) -> None:
    """Check that a checkpoint is one of this run's backend and model; `--hf-checkpoint` is a folder.

    Raises:
        CheckpointError: it is not.
    """
    if point.maker is None:
        return
    theirs, ours = point.maker, maker_of(args)
    if theirs.train_backend != ours.train_backend:
        raise CheckpointError(
            f"--load: {point.checkpoint} was saved with --train-backend {theirs.train_backend}, and this run "
            f"has {ours.train_backend}, which cannot read it. Use --train-backend {theirs.train_backend}."
        )
    absent = "nothing"
    differences = [
        f"{name} is {theirs.model.get(name, absent)} there and {ours.model.get(name, absent)} here"
        for name in sorted({*theirs.model, *ours.model})
        if theirs.model.get(name, absent) != ours.model.get(name, absent)
    ]
    if differences:
        more = f" and {len(differences) - SHOWN} more" if len(differences) > SHOWN else ""
        raise CheckpointError(
            f"--load: {point.checkpoint} is of another model than --hf-checkpoint {args.hf_checkpoint}: "
            f"{'; '.join(differences[:SHOWN])}{more}. Use the model that the run began with, or drop --load."
        )


def describe(args: Args, point: ResumePoint) -> Iterator[str]:
    """Yield what to tell whoever resumes: from where, and what is not as it was."""
    if point.note is not None:
        yield point.note
    if point.checkpoint is None or point.maker is None:
        return
    done = point.state.rollout_id
    yield f"Resuming from {point.checkpoint} (rollout {done} of {args.num_rollout})."
    if point.maker.num_train_ranks != args.num_train_ranks:
        yield (
            f"It was written by {point.maker.num_train_ranks} training ranks and is read by "
            f"{args.num_train_ranks}: weights and optimizer are spread anew, random numbers seeded anew."
        )
    if done >= args.num_rollout:
        yield f"All {done} rollouts of this run are done; a larger --num-rollout goes on with it."


def _path(save: Path, rollout_id: int) -> Path:
    return save / f"rollout-{rollout_id:06d}"


def _rollout_id(path: Path) -> int:
    match = NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def _named_by_marker(load: Path) -> Path | None:
    marker = load / LATEST_FILE
    name = marker.read_text(encoding="utf-8").strip() if marker.is_file() else ""
    return load / name if NAME.fullmatch(name) else None


def _passed_over(load: Path, found: Path, named: Path | None, problems: list[str]) -> str | None:
    if named == found:
        return None
    why = f"{LATEST_FILE} is not there" if named is None else f"{LATEST_FILE} names {named.name}"
    damaged = "".join(f"; {problem}" for problem in problems)
    return f"--load {load}: {why}{damaged}. The newest whole checkpoint is {found.name}."


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the entries of a nested config under dotted names."""
    for name, value in config.items():
        if name in NOT_THE_MODEL:
            continue
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
