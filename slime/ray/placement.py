"""Who gets which GPUs: teacher, training ranks, generating engines. Pure arithmetic on the standard library.

The launcher evaluates the output of `python -m slime.ray.placement --shell`: no other place knows how a
machine is split. It looks at no hardware and starts nothing.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Engine = Literal["sglang", "transformers"]
TeacherSite = Literal["here", "elsewhere", "none"]
"""Where the teacher is served: on this machine, on another one, or nowhere (the task's reward alone)."""

TENSOR_PARALLEL_SIZES = (1, 2, 4, 8)
"""What the heads of the Qwen3-VL models can be divided by."""
_TP_TEXT = ", ".join(map(str, TENSOR_PARALLEL_SIZES))


class PlacementError(ValueError):
    """The GPUs cannot be split as asked; the message names the variable or flag to change."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """One machine's split. GPU ids are those of `CUDA_VISIBLE_DEVICES`; an empty tuple stands for none."""

    num_gpus: int
    teacher_gpus: tuple[str, ...]
    """Outside Ray's share. Empty on a CPU and where no teacher runs here."""
    teacher_engine: Engine
    teacher_site: TeacherSite
    actor_gpus: tuple[str, ...]
    """One training rank each. On a CPU there is one rank all the same."""
    rollout_gpus: tuple[str, ...]
    """Equal to `actor_gpus` where training and generation share one GPU."""
    gpus_per_engine: int
    """Tensor parallel size of each of the student's engines."""
    engine: Engine
    colocated: bool = False
    """Whether training and generation take turns on the student's GPUs."""
    idle_gpus: tuple[str, ...] = ()

    @property
    def teacher_tp(self) -> int:
        """Tensor parallel size of the teacher."""
        return max(1, len(self.teacher_gpus))

    @property
    def student_gpus(self) -> tuple[str, ...]:
        """What Ray may see: training and generation, each GPU once."""
        return tuple(dict.fromkeys(self.actor_gpus + self.rollout_gpus))

    @property
    def num_engines(self) -> int:
        """Engines that generate for the student."""
        return max(1, len(self.rollout_gpus) // self.gpus_per_engine)

    @property
    def engine_gpus(self) -> tuple[tuple[str, ...], ...]:
        """The GPUs of each of the student's engines."""
        size = self.gpus_per_engine
        return tuple(
            self.rollout_gpus[first : first + size] for first in range(0, len(self.rollout_gpus), size)
        )

    @property
    def shared(self) -> bool:
        """Whether training and generation live on the same GPUs."""
        return bool(self.actor_gpus) and self.actor_gpus == self.rollout_gpus

    @property
    def weight_sync(self) -> str:
        """How weights reach the engines (`--weight-sync`)."""
        if self.colocated:
            return "tensor"
        # two ranks of one broadcast cannot have one GPU
        return "distributed" if self.num_gpus and not self.shared else "disk"

    @property
    def small_models(self) -> bool:
        """Whether the models must be small by default, because one GPU holds all of them."""
        return self.num_gpus == 1

    def describe(self) -> str:
        """Return the split as a few lines for people."""
        if self.num_gpus == 0:
            lines = ["No GPU: everything runs on the CPU."]
            if self.teacher_site != "none":
                elsewhere = self.teacher_site == "elsewhere"
                teacher = "a server elsewhere" if elsewhere else f"one {self.teacher_engine} server"
                lines.append(f"  teacher   {teacher}")
            turns = ", taking turns" if self.colocated else ""
            return "\n".join([*lines, f"  student   one training rank, one {self.engine} engine{turns}"])
        lines = [f"{self.num_gpus} GPU{'s' if self.num_gpus > 1 else ''}:"]
        if self.teacher_site == "elsewhere":
            lines.append("  teacher   a server elsewhere; all GPUs here are the student's")
        elif self.teacher_site == "here":
            lines.append(
                f"  teacher   {_listed(self.teacher_gpus)}: {self.teacher_engine}, --tp {self.teacher_tp}"
            )
        student = _listed(self.student_gpus)
        if self.colocated:
            lines.append(f"  student   {student}: trains and generates on all of them by turns (--colocate)")
        elif self.shared:
            lines.append(f"  student   {student}: trains and generates on it")
        else:
            lines.append(
                f"  student   {student}: trains on {_listed(self.actor_gpus)}, generates on "
                f"{_listed(self.rollout_gpus)}"
            )
        count = f"{self.num_engines} {self.engine} engine{'s' if self.num_engines > 1 else ''}"
        places = " | ".join(map(_listed, self.engine_gpus))
        lines.append(f"  engines   {places}: {count}, --tp {self.gpus_per_engine}")
        if self.idle_gpus:
            lines.append(f"  idle      {_listed(self.idle_gpus)}")
        return "\n".join(lines)

    def shell_variables(self) -> dict[str, str]:
        """Return what the launcher evaluates, by variable name."""
        return {
            "NUM_GPUS": str(self.num_gpus),
            "TEACHER_GPUS": ",".join(self.teacher_gpus),
            "TEACHER_TP": str(self.teacher_tp),
            "TEACHER_ENGINE": self.teacher_engine,
            "STUDENT_GPUS": ",".join(self.student_gpus),
            "ACTOR_GPUS": ",".join(self.actor_gpus),
            "ROLLOUT_GPUS": ",".join(self.rollout_gpus),
            "NUM_ACTOR_GPUS": str(len(self.actor_gpus)),
            "NUM_ROLLOUT_GPUS": str(len(self.rollout_gpus)),
            "NUM_ENGINES": str(self.num_engines),
            "GPUS_PER_ENGINE": str(self.gpus_per_engine),
            "ENGINE": self.engine,
            "COLOCATED": str(int(self.colocated)),
            "WEIGHT_SYNC": self.weight_sync,
            "SMALL_MODELS": str(int(self.small_models)),
            "PLACEMENT": self.describe(),
        }


def plan_placement(
    num_gpus: int,
    *,
    num_gpus_teacher: int | None = None,
    num_gpus_student: int | None = None,
    teacher_site: TeacherSite = "here",
    gpus_per_engine: int = 1,
    engine: Engine | None = None,
    colocate: bool | None = None,
    gpu_ids: Sequence[str] | None = None,
) -> Placement:
    """Split `num_gpus` GPUs between the teacher, the student's training and the student's generation.

    Half of the GPUs (a tensor parallel size, at most 8) are those of a teacher served here, from the first
    one on. On the rest training and generation take turns (`colocate`), or half of them train and half
    generate. None: they take turns unless the teacher shares their only GPU. `gpu_ids` names the GPUs of the
    machine, by default 0, 1, 2, …

    Raises:
        PlacementError: the numbers do not fit together.
    """
    ids = tuple(gpu_ids) if gpu_ids is not None else tuple(str(i) for i in range(num_gpus))
    if num_gpus < 0:
        raise PlacementError(f"SLIME_SCRIPT_NUM_GPUS is {num_gpus}; give 0 (CPU) or more.")
    if num_gpus > len(ids):
        raise PlacementError(
            f"SLIME_SCRIPT_NUM_GPUS is {num_gpus} and only {len(ids)} GPUs are visible ({_listed(ids)}); "
            "lower it, or make more visible by CUDA_VISIBLE_DEVICES."
        )
    ids = ids[:num_gpus]
    if num_gpus == 0:
        return _on_cpu(num_gpus_teacher, num_gpus_student, teacher_site, engine, colocate=bool(colocate))
    teacher, student = _split(num_gpus, num_gpus_teacher, num_gpus_student, teacher_site)
    student_start = 0 if teacher + student > num_gpus else teacher
    student_ids = ids[student_start : student_start + student]
    student_variable = "SLIME_SCRIPT_NUM_GPUS" + ("" if teacher_site == "none" else "_STUDENT")
    alone = num_gpus == 1 and teacher_site == "here"
    colocated = not alone if colocate is None else colocate
    actor_ids, rollout_ids, student_engine = _divide_student(
        student_ids, gpus_per_engine, engine, student_variable, colocated=colocated
    )
    return Placement(
        num_gpus=num_gpus,
        teacher_gpus=ids[:teacher],
        # SGLang reserves most of a GPU's memory; on the one shared GPU the light engine leaves room.
        teacher_engine="transformers" if alone else "sglang",
        teacher_site=teacher_site,
        actor_gpus=actor_ids,
        rollout_gpus=rollout_ids,
        gpus_per_engine=gpus_per_engine,
        engine=student_engine,
        colocated=colocated,
        idle_gpus=ids[student_start + student :],
    )


def _on_cpu(
    teacher: int | None,
    student: int | None,
    teacher_site: TeacherSite,
    engine: Engine | None,
    *,
    colocate: bool,
) -> Placement:
    for name, value in (("TEACHER", teacher), ("STUDENT", student)):
        if value:
            raise PlacementError(
                f"SLIME_SCRIPT_NUM_GPUS_{name} is {value} and there is no GPU; unset it to run on the CPU."
            )
    if colocate and engine == "sglang":
        raise PlacementError(
            "SLIME_SCRIPT_COLOCATE is 1 and SLIME_SCRIPT_ENGINE is sglang: without a GPU an SGLang server "
            "dies when it is asked to release memory. Unset either."
        )
    return Placement(
        num_gpus=0,
        teacher_gpus=(),
        teacher_engine=engine or "transformers",
        teacher_site=teacher_site,
        actor_gpus=(),
        rollout_gpus=(),
        gpus_per_engine=1,
        engine=engine or "transformers",
        colocated=colocate,
    )


def _split(
    num_gpus: int, teacher: int | None, student: int | None, teacher_site: TeacherSite
) -> tuple[int, int]:
    """Return how many GPUs teacher and student get; only one shared GPU counts for both."""
    if teacher_site == "none" and teacher:
        raise PlacementError(
            f"SLIME_SCRIPT_NUM_GPUS_TEACHER is {teacher} and this run has no teacher; unset it."
        )
    if teacher_site != "here":
        if teacher:
            raise PlacementError(
                f"SLIME_SCRIPT_NUM_GPUS_TEACHER is {teacher} and SLIME_SCRIPT_TEACHER_URL names a teacher "
                "that runs elsewhere; unset one of them."
            )
        teacher, student = 0, num_gpus if student is None else student
    elif num_gpus == 1:
        teacher, student = 1 if teacher is None else teacher, 1 if student is None else student
    elif teacher is None:
        room = num_gpus // 2 if student is None else num_gpus - student
        teacher = max((size for size in TENSOR_PARALLEL_SIZES if size <= room), default=0)
    student = num_gpus - teacher if student is None else student
    shared = num_gpus == 1 and teacher_site == "here"
    if teacher_site == "here" and teacher not in TENSOR_PARALLEL_SIZES:
        raise PlacementError(
            f"The teacher would get {teacher} of {num_gpus} GPUs, and its tensor parallel size must be one "
            f"of {_TP_TEXT}; set SLIME_SCRIPT_NUM_GPUS_TEACHER to one of these (and "
            "SLIME_SCRIPT_NUM_GPUS_STUDENT to at most the rest), or name a teacher elsewhere by "
            "SLIME_SCRIPT_TEACHER_URL."
        )
    if student < 1 or max(teacher, student) > num_gpus or (teacher + student > num_gpus and not shared):
        raise PlacementError(
            f"Teacher {teacher} + student {student} GPUs do not fit into {num_gpus}: the student needs at "
            f"least 1 and the sum may be at most {num_gpus}. Change SLIME_SCRIPT_NUM_GPUS_TEACHER or "
            "SLIME_SCRIPT_NUM_GPUS_STUDENT."
        )
    return teacher, student


def _divide_student(
    ids: tuple[str, ...], gpus_per_engine: int, engine: Engine | None, variable: str, *, colocated: bool
) -> tuple[tuple[str, ...], tuple[str, ...], Engine]:
    """Return the GPUs that train, those that generate, and the engine that generates.

    `variable` is what users change to give the student more or fewer.
    """
    if gpus_per_engine not in TENSOR_PARALLEL_SIZES:
        raise PlacementError(
            f"--rollout-num-gpus-per-engine is {gpus_per_engine}; it must be one of {_TP_TEXT}."
        )
    if colocated:
        if len(ids) % gpus_per_engine:
            raise PlacementError(
                f"--rollout-num-gpus-per-engine is {gpus_per_engine} and the student has {len(ids)} GPUs, "
                f"which it does not divide; change it or {variable}."
            )
        return ids, ids, engine or "sglang"
    if len(ids) == 1:
        if engine == "sglang":
            raise PlacementError(
                "The student has one GPU and SLIME_SCRIPT_ENGINE is sglang; training and an SGLang engine "
                "on one GPU must take turns. Set SLIME_SCRIPT_COLOCATE=1, unset SLIME_SCRIPT_ENGINE, or give "
                "the student 2 GPUs."
            )
        if gpus_per_engine > 1:
            raise PlacementError(
                f"--rollout-num-gpus-per-engine is {gpus_per_engine} and the student has one GPU; drop it."
            )
        return ids, ids, "transformers"
    half = len(ids) // 2
    actor_ids, rollout_ids = ids[:half], ids[half:]
    if len(rollout_ids) % gpus_per_engine:
        raise PlacementError(
            f"--rollout-num-gpus-per-engine is {gpus_per_engine} and {len(rollout_ids)} GPUs generate, which "
            f"it does not divide; change it or {variable}."
        )
    return actor_ids, rollout_ids, engine or "sglang"


def _listed(ids: Sequence[str]) -> str:
    """Return the ids as people write them: `0-3` for a run of numbers, else `0, 2, 5`."""
    if len(ids) > 1 and all(i.isdigit() for i in ids):
        numbers = [int(i) for i in ids]
        if numbers == list(range(numbers[0], numbers[0] + len(numbers))):
            return f"{numbers[0]}-{numbers[-1]}"
    return ", ".join(ids) if ids else "none"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m slime.ray.placement", description="Print who gets which GPUs."
    )
    parser.add_argument("--num-gpus", type=int, help="GPUs to use; default: as many as --gpu-ids names")
    parser.add_argument("--gpu-ids", help="comma-separated visible GPUs, as in CUDA_VISIBLE_DEVICES")
    parser.add_argument("--num-gpus-teacher", type=int)
    parser.add_argument("--num-gpus-student", type=int)
    parser.add_argument(
        "--teacher", choices=("here", "elsewhere", "none"), default="here", help="where the teacher is served"
    )
    parser.add_argument("--rollout-num-gpus-per-engine", type=int, default=1)
    parser.add_argument("--engine", choices=("sglang", "transformers"))
    parser.add_argument(
        "--colocate", choices=("0", "1"), help="whether training and generation take turns; default: see plan"
    )
    parser.add_argument("--shell", action="store_true", help="print shell assignments instead of sentences")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print the split; return 2 and a sentence on stderr where there is none."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.num_gpus is None and options.gpu_ids is None:
        parser.error("give --num-gpus, --gpu-ids or both")
    gpu_ids = None if options.gpu_ids is None else [i for i in options.gpu_ids.split(",") if i]
    try:
        placement = plan_placement(
            len(gpu_ids or ()) if options.num_gpus is None else options.num_gpus,
            num_gpus_teacher=options.num_gpus_teacher,
            num_gpus_student=options.num_gpus_student,
            teacher_site=options.teacher,
            gpus_per_engine=options.rollout_num_gpus_per_engine,
            engine=options.engine,
            colocate=None if options.colocate is None else options.colocate == "1",
            gpu_ids=gpu_ids,
        )
    except PlacementError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    if options.shell:
        variables = placement.shell_variables()
        text = "\n".join(f"{name}={shlex.quote(value)}" for name, value in variables.items())
    else:
        text = placement.describe()
    sys.stdout.write(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
