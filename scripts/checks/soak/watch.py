"""How much memory and how many files each process of a run holds, over its life."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import psutil

from scripts.checks.soak.job import Job, command_line

ROLES = {
    "launcher": r"^bash .*run_opd_vlm_geo3k\.sh",
    "driver": r"-m slime\.train\b",
    "trainer": r"ray::TrainActor",
    "rollouts": r"ray::RolloutActor",
    "teacher": r"-m slime\.engines\.transformers_engine .*tiny/checkpoints/teacher\b",
    "engine": r"-m slime\.engines\.transformers_engine .*tiny/checkpoints/student\b",
}
"""Role -> what its command line shows."""
WARM_UP = 10
"""Rollouts of a process's life that do not count: caches fill."""


@dataclass
class Life:
    """One process, from sample to sample."""

    role: str
    rollouts: list[int] = field(default_factory=list)
    megabytes: list[float] = field(default_factory=list)
    files: list[int] = field(default_factory=list)


class Watch:
    """Samples all processes of a job."""

    def __init__(self) -> None:
        self.lives: dict[tuple[int, float], Life] = {}

    def sample(self, job: Job, rollout: int) -> None:
        """Note what each process holds after `rollout` rollouts."""
        for process in job.processes().values():
            try:
                role = role_of(command_line(process))
                if role is None:
                    continue
                life = self.lives.setdefault((process.pid, process.create_time()), Life(role))
                megabytes, files = process.memory_info().rss / 2**20, process.num_fds()
            except psutil.NoSuchProcess:  # it has just ended
                continue
            life.rollouts.append(rollout)
            life.megabytes.append(megabytes)
            life.files.append(files)

    def longest(self) -> Iterator[tuple[str, Growth]]:
        """Yield each role's process that lived through most rollouts, where that was long enough."""
        for role in ROLES:
            lives = [life for life in self.lives.values() if life.role == role]
            grown = [growth for growth in map(growth_of, lives) if growth is not None]
            if grown:
                yield role, max(grown, key=lambda growth: growth.rollouts)


@dataclass(frozen=True)
class Growth:
    """What a process held after its warm-up, and at its end: medians of the first and the last quarter."""

    rollouts: int
    first_megabytes: float
    last_megabytes: float
    first_files: float
    last_files: float


def growth_of(life: Life) -> Growth | None:
    """Return how a process grew; None where it lived for too few rollouts to say."""
    warm = [number for number, rollout in enumerate(life.rollouts) if rollout - life.rollouts[0] >= WARM_UP]
    if len(warm) < 8:
        return None
    quarter = len(warm) // 4
    first, last = warm[:quarter], warm[-quarter:]
    return Growth(
        rollouts=life.rollouts[-1] - life.rollouts[0],
        first_megabytes=median(life.megabytes[number] for number in first),
        last_megabytes=median(life.megabytes[number] for number in last),
        first_files=median(life.files[number] for number in first),
        last_files=median(life.files[number] for number in last),
    )


def role_of(command: str) -> str | None:
    """Return what a process is, by its command line; None for those that only belong to another."""
    if "supervisor" in command:
        return None
    return next((role for role, pattern in ROLES.items() if re.search(pattern, command)), None)


def shared_things() -> set[str]:
    """Return what lies in shared memory, and what runs of ours have put into the temporary folders."""
    temporary = {Path(tempfile.gettempdir()), Path("/tmp")}
    ours = [path for folder in temporary for path in folder.glob("slime-*")]
    return {str(path) for path in (*Path("/dev/shm").iterdir(), *ours)}
