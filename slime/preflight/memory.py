"""The host's memory, and the part of it that is shared."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil

from slime.preflight.finding import GIB, TIGHT, Finding, amount
from slime.preflight.launch import Launch
from slime.preflight.needs import Need, engine_bytes, host_needs

CHECK = "memory"
CGROUP = Path("/sys/fs/cgroup")
SHARED_MEMORY = Path("/dev/shm")
SMALL_SHARED_MEMORY = GIB
"""Docker gives 64 MiB unless told otherwise. Ray's object store and NCCL live in it."""


def check_memory(launch: Launch) -> Iterator[Finding]:
    """Hold what the run takes of the host's memory against what is free."""
    yield from judge(list(host_needs(launch)), free_memory())
    yield from judge_shared(launch, shared_memory())


def free_memory(cgroup: Path = CGROUP) -> float:
    """Return what new processes may take: free memory and swap, or what a container's limit leaves."""
    free = psutil.virtual_memory().available + psutil.swap_memory().free
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        used = int((cgroup / "memory.current").read_text())
        cached = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return free  # no limit of this kind
    if limit == "max":
        return free
    return min(free, int(limit) - used + int(cached.get("inactive_file", 0)))


def judge(needs: list[Need], free: float) -> Iterator[Finding]:
    """Yield what is wrong with `free` bytes of memory for these needs."""
    sure = sum(need.size for need in needs if need.sure)
    whole = sum(need.size for need in needs)
    if whole <= TIGHT * free:
        return
    parts = ", ".join(f"{need.label} {amount(need.size)}" for need in needs if need.size)
    yield Finding(
        check=CHECK,
        what=f"{amount(free)} of memory are free, and at least {amount(whole)} are needed: {parts}",
        remedy="end other programs, use a machine (or a container) with more memory, or a smaller model",
        fatal=sure > free,
    )


def shared_memory(folder: Path = SHARED_MEMORY) -> tuple[int, int] | None:
    """Return (total, free) bytes of shared memory; None where there is none."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return None
    return usage.total, usage.free


def judge_shared(launch: Launch, there: tuple[int, int] | None) -> Iterator[Finding]:
    """Yield what is wrong with this much shared memory."""
    larger = "give the container more: docker run --shm-size=16g, or --ipc=host"
    if there is None:
        yield Finding(
            check=CHECK,
            what=f"{SHARED_MEMORY} is not there, and Ray keeps what its processes hand each other there",
            remedy="mount a tmpfs on it",
            fatal=False,
        )
        return
    total, free = there
    args, student = launch.args, launch.student
    if args.weight_sync == "tensor" and not launch.student_gpus and student is not None:
        bucket = min(args.update_weight_buffer_size, engine_bytes(args, student))
        if bucket > free:
            yield Finding(
                check=CHECK,
                what=f"{SHARED_MEMORY} has {amount(free)} free, and a bucket of weights takes "
                f"{amount(bucket)} there (--weight-sync tensor)",
                remedy=f"{larger}; or lower --update-weight-buffer-size",
            )
            return
    if total < SMALL_SHARED_MEMORY and args.ray_address is None:
        yield Finding(
            check=CHECK,
            what=f"{SHARED_MEMORY} has {amount(total)}: Ray's object store goes to a disk, which is slow, "
            "and NCCL may fail",
            remedy=larger,
            fatal=False,
        )
