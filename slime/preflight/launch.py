"""What is going to run, as the launcher has resolved it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from slime.arguments import Args
from slime.preflight.weights import Weights, weights_of


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A teacher that is served on this machine."""

    path: str
    gpus: tuple[str, ...]
    engine: str
    port: int


@dataclass(frozen=True)
class Download:
    """What is not here yet."""

    name: str
    folder: Path
    kind: str
    """model or dataset"""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One run on this machine."""

    args: Args
    student_gpus: tuple[str, ...] = ()
    """As `CUDA_VISIBLE_DEVICES` names them; none: the CPU."""
    teacher: Teacher | None = None
    folders: Mapping[str, Path] = field(default_factory=dict)
    """Folders that are written to, by the flag or variable that names them."""
    downloads: tuple[Download, ...] = ()

    def is_coming(self, path: str) -> bool:
        """Tell whether a path lies in a folder that is downloaded later."""
        return any(Path(path).is_relative_to(download.folder) for download in self.downloads)

    @cached_property
    def student(self) -> Weights | None:
        """The student's size; None where nothing tells it."""
        return weights_of(self.args.hf_checkpoint)

    @cached_property
    def taught_by(self) -> Weights | None:
        """The size of a teacher that is served here."""
        return None if self.teacher is None else weights_of(self.teacher.path)

    @cached_property
    def beside(self) -> dict[str, Weights]:
        """The models that the trainer holds beside the student, by flag."""
        named: dict[str, str | None] = {"--opd-teacher-load": self.args.opd_teacher_load}
        if self.args.kl_loss_coef > 0:
            named["--ref-load"] = self.args.ref_load or self.args.hf_checkpoint
        sizes = {flag: weights_of(path) for flag, path in named.items() if path is not None}
        return {flag: size for flag, size in sizes.items() if size is not None}

    @property
    def checkpoints(self) -> dict[str, str]:
        """Every model folder of the run, by what names it."""
        args = self.args
        named = {
            "--hf-checkpoint": args.hf_checkpoint,
            "--ref-load": args.ref_load,
            "--opd-teacher-load": args.opd_teacher_load,
            "SLIME_SCRIPT_TEACHER_MODEL": None if self.teacher is None else self.teacher.path,
        }
        return {name: path for name, path in named.items() if path is not None}
