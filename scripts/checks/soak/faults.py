"""The faults: real signals to real processes of a run, whatever they are doing."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from scripts.checks.soak.job import Job
from scripts.checks.soak.watch import role_of

HANG_SECONDS = 10.0


@dataclass(frozen=True)
class Fault:
    """What is done to which process."""

    name: str
    role: str
    signals: tuple[int, ...]
    ends_run: bool = False
    """Whether the launcher ends with it, and must be started anew."""
    ready: Callable[[Job], bool] = lambda job: True
    """Whether it is the moment."""

    def inject(self, job: Job) -> bool:
        """Do it; return whether the process was there."""
        job.wait_until(lambda: self.ready(job) or job.status() is not None, f"the moment for {self.name}")
        process = job.find(lambda command: role_of(command) == self.role)
        if process is None:
            return False
        for number, following in zip(self.signals, (*self.signals[1:], None), strict=True):
            process.send_signal(number)
            if following is not None:
                time.sleep(HANG_SECONDS)
        return True


def saving(job: Job) -> bool:
    """Tell whether a checkpoint is being written."""
    return any(job.checkpoints.glob(".rollout-*.partial"))


HANG = (signal.SIGSTOP, signal.SIGCONT)
KILL = (signal.SIGKILL,)
FAULTS = (
    Fault("teacher killed", "teacher", KILL),
    Fault("teacher hangs", "teacher", HANG),
    Fault("engine killed", "engine", KILL),
    Fault("engine hangs", "engine", HANG),
    Fault("trainer killed", "trainer", KILL, ends_run=True),
    Fault("trainer killed while it saves", "trainer", KILL, ends_run=True, ready=saving),
    Fault("rollout actor killed", "rollouts", KILL, ends_run=True),
    Fault("driver killed", "driver", KILL, ends_run=True),
    Fault("SIGTERM to the launcher", "launcher", (signal.SIGTERM,), ends_run=True),
)


def plan(number: int, rollouts: int, seed: int) -> list[tuple[int, Fault]]:
    """Return `number` faults and after which rollout each comes, every kind before one comes twice."""
    draw = random.Random(seed)
    kinds: list[Fault] = []
    while len(kinds) < number:
        kinds += draw.sample(FAULTS, len(FAULTS))
    moments = sorted(draw.sample(range(2, rollouts - 1), number))
    return list(zip(moments, kinds[:number], strict=True))
