"""Which waiting jobs come next: in order of arrival, or in deterministic waves."""

import time
from collections import deque
from collections.abc import Iterable
from typing import Protocol

from slime.engines.transformers_engine.errors import InvalidValue
from slime.engines.transformers_engine.job import Job

WAVE_PATIENCE = 60.0
"""Seconds without a new member after which an incomplete wave is refused."""


class WaitingQueue(Protocol):
    """Jobs that have arrived and are not running."""

    def add(self, job: Job) -> None:
        """Take in a new job."""
        ...

    def put_back(self, jobs: Iterable[Job]) -> None:
        """Take back jobs that were running, in their order, before all others."""
        ...

    def take_scoring(self, max_tokens: int) -> list[Job]:
        """Hand out scoring jobs that fit one prefill of `max_tokens`; at least one if any waits."""
        ...

    def take_generating(self, free: int, running: int) -> list[Job]:
        """Hand out up to `free` generating jobs to join the `running` ones."""
        ...

    def drop(self, jobs: Iterable[Job]) -> None:
        """Forget jobs that were cancelled."""
        ...

    def jobs(self) -> list[Job]:
        """All waiting jobs."""
        ...

    def __len__(self) -> int:
        """Number of waiting jobs; any thread may ask."""
        ...

    def runnable(self, running: int) -> bool:
        """Tell whether a step could take a job now."""
        ...

    def expire(self) -> list[Job]:
        """Drop and return jobs that wait for others in vain, with their error set."""
        ...


class ArrivalQueue:
    """First come, first served; scoring jobs go in batches of similar length."""

    def __init__(self) -> None:
        self._scoring: deque[Job] = deque()
        self._generating: deque[Job] = deque()

    def add(self, job: Job) -> None:
        """Take in a new job."""
        (self._scoring if job.scoring else self._generating).append(job)

    def put_back(self, jobs: Iterable[Job]) -> None:
        """Take back jobs that were running, before all others."""
        self._generating.extendleft(reversed(list(jobs)))

    def take_scoring(self, max_tokens: int) -> list[Job]:
        """Hand out the oldest scoring jobs whose padded batch stays within `max_tokens`."""
        taken: list[Job] = []
        longest = 0
        while self._scoring:
            longest = max(longest, self._scoring[0].prompt.length)
            if taken and longest * (len(taken) + 1) > max_tokens:
                break
            taken.append(self._scoring.popleft())
        return taken

    def take_generating(self, free: int, running: int) -> list[Job]:
        """Hand out the oldest `free` generating jobs."""
        return [self._generating.popleft() for _ in range(min(free, len(self._generating)))]

    def drop(self, jobs: Iterable[Job]) -> None:
        """Forget jobs."""
        gone = set(jobs)
        self._scoring = deque(job for job in self._scoring if job not in gone)
        self._generating = deque(job for job in self._generating if job not in gone)

    def jobs(self) -> list[Job]:
        """All waiting jobs."""
        return [*self._scoring, *self._generating]

    def __len__(self) -> int:
        return len(self._scoring) + len(self._generating)

    def runnable(self, running: int) -> bool:
        """Any waiting job can be taken."""
        return bool(self._scoring or self._generating)

    def expire(self) -> list[Job]:
        """Nothing waits for others."""
        return []


class WaveQueue:
    """One wave at a time, complete and in its order; every other job alone: timing decides no batch."""

    def __init__(self, patience: float = WAVE_PATIENCE) -> None:
        self._alone: deque[Job] = deque()
        self._gathering: dict[str, list[Job]] = {}
        self._last_arrival: dict[str, float] = {}
        self._complete: deque[list[Job]] = deque()
        self._current: deque[Job] = deque()
        self._patience = patience

    def add(self, job: Job) -> None:
        """Take in a new job; the last of a wave makes it ready."""
        wave = job.params.wave
        if wave is None or job.scoring:
            self._alone.append(job)
            return
        members = self._gathering.setdefault(wave.name, [])
        members.append(job)
        self._last_arrival[wave.name] = time.monotonic()
        if len(members) >= wave.size:
            self._complete.append(sorted(self._gathering.pop(wave.name), key=lambda j: (_order(j), j.rid)))
            del self._last_arrival[wave.name]

    def put_back(self, jobs: Iterable[Job]) -> None:
        """Take back running jobs of the current wave."""
        self._current.extendleft(reversed(list(jobs)))

    def take_scoring(self, max_tokens: int) -> list[Job]:
        """Hand out one scoring job."""
        for job in self._alone:
            if job.scoring:
                self._alone.remove(job)
                return [job]
        return []

    def take_generating(self, free: int, running: int) -> list[Job]:
        """Hand out the current wave's next jobs; the next wave, or a lone job, begins when nothing runs."""
        if not self._current and not running:
            if self._complete:
                self._current.extend(self._complete.popleft())
            else:
                lone = next((job for job in self._alone if not job.scoring), None)
                if lone is not None:
                    self._alone.remove(lone)
                    self._current.append(lone)
        return [self._current.popleft() for _ in range(min(free, len(self._current)))]

    def drop(self, jobs: Iterable[Job]) -> None:
        """Forget jobs; a wave that loses a member can no longer become complete and expires."""
        gone = set(jobs)
        self._alone = deque(job for job in self._alone if job not in gone)
        self._current = deque(job for job in self._current if job not in gone)
        kept = ([job for job in wave if job not in gone] for wave in self._complete)
        self._complete = deque(wave for wave in kept if wave)
        for name, members in list(self._gathering.items()):
            self._gathering[name] = [job for job in members if job not in gone]

    def jobs(self) -> list[Job]:
        """All waiting jobs."""
        waiting = [*self._alone, *self._current]
        for wave in (*self._complete, *self._gathering.values()):
            waiting.extend(wave)
        return waiting

    def __len__(self) -> int:
        waves = [*list(self._complete), *list(self._gathering.values())]
        return len(self._alone) + len(self._current) + sum(map(len, waves))

    def runnable(self, running: int) -> bool:
        """Incomplete waves are not runnable."""
        if any(job.scoring for job in self._alone) or self._current:
            return True
        return not running and bool(self._complete or self._alone)

    def expire(self) -> list[Job]:
        """Drop the waves whose missing members did not come in time."""
        now = time.monotonic()
        late = [name for name, last in self._last_arrival.items() if now - last > self._patience]
        expired: list[Job] = []
        for name in late:
            del self._last_arrival[name]
            members = self._gathering.pop(name)
            for job in members:
                assert job.params.wave is not None
                job.error = InvalidValue(
                    f"wave {name!r}: {len(members)} of {job.params.wave.size} requests arrived, then none "
                    f"for {self._patience:g} s. Keep wave_size requests in flight, or send smaller waves."
                )
            expired += members
        return expired


def _order(job: Job) -> int:
    assert job.params.wave is not None
    return job.params.wave.order
