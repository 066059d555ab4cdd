"""What a step costs its own process: wall and CPU seconds, and the most anonymous memory above its start."""

from __future__ import annotations

import ctypes
import gc
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

STATUS = Path("/proc/self/status")
CLEAR_PEAK = "5"


def measured(step: Callable[[], dict[str, float]]) -> dict[str, Any]:
    """Run a step and return its cost beside what it returned.

    Garbage and free heap of before go back to the system first, so that the step has to ask for all it needs.
    The kernel keeps the peak of all resident memory; what of it are pages of files is taken off.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    level = memory("RssAnon")
    Path("/proc/self/clear_refs").write_text(CLEAR_PEAK)
    wall, cpu = time.perf_counter(), time.process_time()
    values = step()
    cpu = time.process_time() - cpu
    wall = time.perf_counter() - wall
    files = memory("RssFile") + memory("RssShmem")
    return {"wall": wall, "cpu": cpu, "peak_bytes": memory("VmHWM") - files - level, "values": values}


def measured_on_gpu(step: Callable[[], dict[str, float]], device: torch.device) -> dict[str, Any]:
    """Run a step and return its cost like `measured`; memory is the GPU's.

    `peak_bytes` is above the step's start, `total_bytes` that of all tensors at the peak.
    """
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    level = torch.cuda.memory_allocated(device)
    wall, cpu = time.perf_counter(), time.process_time()
    values = step()
    torch.cuda.synchronize(device)
    cpu = time.process_time() - cpu
    wall = time.perf_counter() - wall
    total = torch.cuda.max_memory_allocated(device)
    return {"wall": wall, "cpu": cpu, "peak_bytes": total - level, "total_bytes": total, "values": values}


def memory(name: str) -> int:
    """Return a value of /proc/self/status in bytes."""
    match = re.search(rf"^{name}:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)
    if match is None:
        raise RuntimeError(f"{STATUS} has no {name}; the benchmark needs Linux.")
    return int(match.group(1)) * 1024
