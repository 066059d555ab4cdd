"""The GPUs: are those there that the split gives out, are they free, and does the model fit on them?"""

from __future__ import annotations

import subprocess
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from slime.preflight.finding import GIB, TIGHT, Finding, amount
from slime.preflight.launch import Launch
from slime.preflight.needs import Need, gpu_needs
from slime.ray.resources import plan_resources

CHECK = "GPUs"
QUERY = ("index", "uuid", "name", "memory.total", "memory.used", "driver_version")
IN_USE = 2 * GIB
"""A display or a monitor takes some hundred MiB; more is somebody's program."""
OLDEST_DRIVER = 580
"""The first for CUDA 13, which torch of requirements/gpu.txt is built for."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU as the driver knows it; memory in bytes."""

    index: str
    uuid: str
    name: str
    total: int
    used: int
    driver: str

    def is_called(self, gpu: str) -> bool:
        """Tell whether `CUDA_VISIBLE_DEVICES` names it so; a UUID may be cut short there."""
        return gpu == self.index or (gpu.startswith("GPU-") and self.uuid.startswith(gpu))


class DriverError(RuntimeError):
    """The driver did not say which GPUs there are."""


def query_gpus() -> list[Gpu]:
    """Ask the driver.

    Raises:
        DriverError: there is none, or it says nothing that can be read.
    """
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except FileNotFoundError as error:
        raise DriverError("there is no nvidia-smi here") from error
    except (OSError, subprocess.SubprocessError) as error:
        raise DriverError(f"nvidia-smi failed ({error})") from error
    return [_gpu(line) for line in answer.splitlines() if line.strip()]


def _gpu(line: str) -> Gpu:
    try:
        index, uuid, name, total, used, driver = (part.strip() for part in line.split(","))
        return Gpu(
            index=index,
            uuid=uuid,
            name=name,
            total=int(total) * 2**20,
            used=int(used) * 2**20,
            driver=driver,
        )
    except ValueError as error:
        raise DriverError(f"nvidia-smi says {line!r}, which is not {', '.join(QUERY)}") from error


def check_gpus(launch: Launch) -> Iterator[Finding]:
    """Look at the split, and at every GPU that it gives out."""
    try:
        plan_resources(launch.args, len(launch.student_gpus) * launch.args.actor_num_nodes)
    except ValueError as error:
        yield Finding(check=CHECK, what=str(error), remedy="change what the message names")
    asked = list(dict.fromkeys((*_teachers(launch), *launch.student_gpus)))
    if not asked:
        return
    try:
        there = query_gpus()
    except DriverError as error:
        yield Finding(
            check=CHECK,
            what=f"{error}, and the run is given {len(asked)} GPUs ({', '.join(asked)})",
            remedy="install or repair NVIDIA's driver, or run on the CPU by SLIME_SCRIPT_NUM_GPUS=0",
        )
        return
    yield from _driver(there)
    needs: dict[str, list[Need]] = defaultdict(list)
    for gpu, need in gpu_needs(launch):
        needs[gpu].append(need)
    for gpu in asked:
        if not gpu.startswith("MIG-"):  # a slice, whose memory is not the GPU's
            yield from _look_at(gpu, there, needs[gpu])


def _teachers(launch: Launch) -> tuple[str, ...]:
    return () if launch.teacher is None else launch.teacher.gpus


def _driver(there: Sequence[Gpu]) -> Iterator[Finding]:
    for driver in {gpu.driver for gpu in there}:
        release = driver.partition(".")[0]
        if release.isdigit() and int(release) < OLDEST_DRIVER:
            yield Finding(
                check=CHECK,
                what=f"the driver is {driver}, and CUDA 13, which the pinned torch is built for, came with "
                f"{OLDEST_DRIVER}",
                remedy="update the driver, or install CUDA's forward compatibility package",
                fatal=False,
            )


def _look_at(gpu: str, there: Sequence[Gpu], needs: Sequence[Need]) -> Iterator[Finding]:
    found = next((each for each in there if each.is_called(gpu)), None)
    if found is None:
        names = ", ".join(each.index for each in there) or "none"
        yield Finding(
            check=CHECK,
            what=f"GPU {gpu} is not there; the driver lists {names}",
            remedy="name those that are by CUDA_VISIBLE_DEVICES, or lower SLIME_SCRIPT_NUM_GPUS",
        )
        return
    needed = sum(need.size for need in needs)
    parts = ", ".join(f"{need.label} {amount(need.size)}" for need in needs)
    if needed > found.total * TIGHT:
        yield Finding(
            check=CHECK,
            what=f"GPU {gpu} ({found.name}) has {amount(found.total)}, and at least {amount(needed)} are "
            f"needed: {parts}, activations not counted",
            remedy="a smaller model, or more GPUs for it (SLIME_SCRIPT_NUM_GPUS_TEACHER, _NUM_GPUS_STUDENT)",
            fatal=needed > found.total,
        )
    elif found.used > IN_USE:
        free = found.total - found.used
        yield Finding(
            check=CHECK,
            what=f"GPU {gpu} ({found.name}) is in use: {amount(found.used)} of {amount(found.total)} are "
            f"taken, and at least {amount(needed)} are needed",
            remedy="end what uses it (nvidia-smi lists it), or choose others by CUDA_VISIBLE_DEVICES",
            fatal=needed > free,
        )
