"""The disks: is there room for what the run will write?"""

from __future__ import annotations

import os
import shutil
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from slime.arguments.recording import recording_template
from slime.checkpoints import checkpoints_in
from slime.preflight.finding import TIGHT, Finding, amount
from slime.preflight.launch import Launch
from slime.preflight.memory import shared_memory
from slime.preflight.needs import BYTES, Need, engine_bytes, state_bytes
from slime.preflight.weights import weights_of

CHECK = "disk"
LOGS = 2**28
"""Metrics, TensorBoard, logs and the time line of a long run, about."""
NAME_ERROR = 0.9
"""A model's name rounds its size."""
TOKEN_BYTES = 16
"""Of a recorded response token: its id and its log-probs under student and teacher."""


class Written(NamedTuple):
    """Something that is written below a folder."""

    need: Need
    folder: Path


def check_disk(launch: Launch) -> Iterator[Finding]:
    """Add up what goes to each filesystem and hold it against what is free there."""
    together: dict[int, list[Written]] = defaultdict(list)
    for written in all_written(launch):
        together[os.stat(nearest(written.folder)).st_dev].append(written)
    for parts in together.values():
        yield from judge(parts, shutil.disk_usage(nearest(parts[0].folder)).free)


def nearest(folder: Path) -> Path:
    """Return the folder, or what there is of the way to it."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


def all_written(launch: Launch) -> Iterator[Written]:
    """Yield all that the run will write, and what is downloaded for it."""
    args, student = launch.args, launch.student
    output = Path(args.output_dir)
    yield Written(Need("logs and metrics", LOGS, sure=False), output)
    for download in launch.downloads:
        size = weights_of(str(download.folder)) if download.kind == "model" else None
        if size is not None:
            yield Written(Need(f"the download of {download.name}", NAME_ERROR * size.stored), download.folder)
    if args.save_debug_rollout_data is not None:
        tokens = args.num_rollout * args.samples_per_rollout * args.rollout_max_response_len
        size = tokens * (TOKEN_BYTES + 8 * args.opd_top_k)
        folder = Path(recording_template(args.save_debug_rollout_data)).parent
        yield Written(Need("recorded rollouts, if all responses are long", size, sure=False), folder)
    if student is None:
        return
    if args.save is not None:
        folder = Path(args.save)
        there = len(checkpoints_in(folder))  # of an earlier run, which this one goes on with
        count = max(1, checkpoints_at_once(args.num_rollout, args.save_interval, args.save_keep) - there)
        label = f"{count} checkpoints" if count > 1 else "a checkpoint"
        yield Written(Need(label, count * state_bytes(args, student)), folder)
        if args.save_hf_interval is not None:
            count = saves(args.num_rollout, args.save_hf_interval)
            size = count * BYTES[args.precision] * student.parameters
            yield Written(
                Need("an exported model" if count == 1 else f"{count} exported models", size), folder
            )
    shared = shared_memory()
    # The folder of weights is in shared memory where that has room (slime.weight_sync.store).
    if (
        args.weight_sync == "disk"
        and not args.replays
        and (shared is None or shared[1] <= 4 * student.stored)
    ):
        yield Written(Need("two versions of the weights", 2 * engine_bytes(args, student)), output)


def saves(rollouts: int, interval: int | None) -> int:
    """Return how often a run writes what it writes every `interval` rollouts and after the last; None or 0:
    then alone."""
    return -(-rollouts // interval) if interval else 1


def checkpoints_at_once(rollouts: int, interval: int | None, keep: int) -> int:
    """Return how many checkpoints lie there at most; a new one is whole before the oldest goes."""
    count = saves(rollouts, interval)
    return min(count, keep + 1) if keep else count


def judge(parts: list[Written], free: int) -> Iterator[Finding]:
    """Yield what is wrong with `free` bytes on one filesystem for all that is written to it."""
    needs = [written.need for written in parts]
    whole = sum(need.size for need in needs)
    if whole <= TIGHT * free:
        return
    largest = max(parts, key=lambda written: written.need.size)
    listed = ", ".join(
        f"{need.label} {amount(need.size)}" for need in sorted(needs, key=lambda need: -need.size)
    )
    yield Finding(
        check=CHECK,
        what=f"the disk of {largest.folder} has {amount(free)} free, and {amount(whole)} are needed: "
        f"{listed}",
        remedy="make room, keep fewer checkpoints (--save-keep, --save-interval), or name folders on another "
        "disk: SLIME_SCRIPT_OUTPUT_DIR, SLIME_SCRIPT_MODEL_DIR, --save",
        fatal=sum(need.size for need in needs if need.sure) > free,
    )
