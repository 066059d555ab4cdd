"""What a client's turn costs its own process: wall and CPU seconds, lateness of its event loop, memory."""

from __future__ import annotations

import asyncio
import gc
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

TICK_SECONDS = 0.005
"""How often the loop is asked to be punctual: 200 times a second costs well under a percent of a core."""
STATUS = Path("/proc/self/status")
CLEAR_PEAK = "5"


@dataclass(slots=True)
class Cost:
    """Filled when the turn is over."""

    wall: float = 0.0
    """Seconds."""
    cpu: float = 0.0
    """Seconds of all threads of the process."""
    peak_bytes: int = 0
    """Most resident memory, the workload's own included, above what was resident before the first turn."""
    lags: list[float] = field(default_factory=list)
    """Seconds that each tick came late."""
    own_lags: list[float] = field(default_factory=list)
    """The part of each lag in which the loop's thread computed; the rest it waited for a core."""


def resident_bytes() -> int:
    """Return how much memory the process has resident."""
    return _memory("VmRSS")


@contextmanager
def measured(resident: int) -> Iterator[Cost]:
    """Measure the block; garbage of before is collected first. `resident` is what memory is counted from."""
    gc.collect()
    cost = Cost()
    Path("/proc/self/clear_refs").write_text(CLEAR_PEAK)
    wall, cpu = time.perf_counter(), time.process_time()
    yield cost
    cost.cpu = time.process_time() - cpu
    cost.wall = time.perf_counter() - wall
    cost.peak_bytes = _memory("VmHWM") - resident


async def tick(cost: Cost) -> None:
    """Note how late the loop wakes us, until cancelled."""
    loop = asyncio.get_running_loop()
    while True:
        due, cpu = loop.time() + TICK_SECONDS, time.thread_time()
        await asyncio.sleep(TICK_SECONDS)
        lag = max(0.0, loop.time() - due)
        cost.lags.append(lag)
        cost.own_lags.append(min(lag, time.thread_time() - cpu))


def _memory(name: str) -> int:
    """Return a value of /proc/self/status in bytes."""
    match = re.search(rf"^{name}:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)
    if match is None:
        raise RuntimeError(f"{STATUS} has no {name}; the benchmark needs Linux.")
    return int(match.group(1)) * 1024
