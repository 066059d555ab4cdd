"""A training step at published shapes, ours beside the plain way: tokens per second and peak memory.

Both are the ways of `scripts/benchmarks/trainer.py`, one after the other, each in a process of its own: bfloat16
with float32 weights and optimizer, gradient checkpointing on.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch

from scripts.benchmarks.training.processes import NoRoomError, worker
from scripts.benchmarks.training.published import SHAPES, checkpoint_bytes
from scripts.benchmarks.training.report import Record
from scripts.benchmarks.training.workload import Machine, Shape
from scripts.checks.gpu.engine import random_checkpoint
from scripts.checks.gpu.result import Row, failed, measured, relative_gap, skipped, within
from scripts.checks.gpu.setting import Setting

CHECK = "training step"
SIZES = ("2B", "4B")
LABELS = {"ours": "ours", "plain": "plain (padded rows, all logits)"}
ROUNDS = 2
"""Counted steps of each way, after one that warms up and makes the optimizer's state."""
BYTES_A_WEIGHT = 16
"""Weight, gradient and both moments, float32."""
WORKING_BYTES = 5 * 2**30
"""What a step needs besides, at least: gathered layers, activations, a chunk of logits."""
SAME_STEP = 0.05
"""How far the two ways' first steps may be apart: bfloat16 rounds at other places."""
GIB = 2**30


def run(setting: Setting) -> list[Row]:
    """Measure each size."""
    rows: list[Row] = []
    for size in ("tiny",) if setting.tiny else SIZES:
        rows += _measure(setting, size)
    return rows


def step_shape(size: str) -> Shape:
    """Return the step's workload: 23 thousand tokens with pictures of 196; a few for a CPU."""
    if size == "tiny":
        return Shape(vocabulary=SHAPES[size].vocabulary, prompts=1, samples=4, longest=48, side=64)
    vocabulary = SHAPES[size].vocabulary
    return Shape(vocabulary=vocabulary, prompts=8, samples=4, longest=2048, side=448, micro_batches=8)


def _measure(setting: Setting, size: str) -> list[Row]:
    refusal = _lacking(setting, size)
    if refusal:
        return [skipped(CHECK, size, refusal)]
    model = random_checkpoint(setting, size)
    rows: list[Row] = []
    steps: dict[str, list[Record]] = {}
    for way, label in LABELS.items():
        try:
            steps[way] = _steps(way, model, step_shape(size), setting)
            rows += _figures(setting, size, label, steps[way])
        except NoRoomError as error:  # of the plain way this is a finding
            say = failed if way == "ours" else does_not_fit
            rows.append(say(CHECK, f"{size}: {label}", f"out of memory: {error}"))
        except RuntimeError as error:
            rows.append(failed(CHECK, f"{size}: {label}", str(error)))
    shutil.rmtree(model)
    return [*rows, *_compared(size, steps["ours"], steps["plain"])] if len(steps) == len(LABELS) else rows


def does_not_fit(check: str, what: str, why: str) -> Row:
    return measured(check, what, why)


def _lacking(setting: Setting, size: str) -> str:
    """Return why this size cannot be measured here; nothing where it can."""
    on_disk = checkpoint_bytes(size)
    free_disk = shutil.disk_usage(setting.scratch).free
    if free_disk < 1.2 * on_disk:
        return f"{on_disk / GIB:.1f} GiB for a checkpoint, and {setting.scratch} has {free_disk / GIB:.1f} free"
    if not setting.on_gpu:
        return ""
    needed = BYTES_A_WEIGHT * on_disk // 2 + WORKING_BYTES
    free, total = torch.cuda.mem_get_info(setting.device)
    if free < needed:
        return (
            f"too little memory: about {needed / GIB:.0f} GiB are needed, {free / GIB:.0f} of "
            f"{total / GIB:.0f} are free"
        )
    return ""


def _steps(way: str, model: Path, shape: Shape, setting: Setting) -> list[Record]:
    machine = Machine(device=setting.device.type, dtype="bfloat16", gradient_checkpointing=True)
    with worker(way, model, shape, machine, threads=1) as process:
        return [process.turn() for _ in range(1 + ROUNDS)]


def _figures(setting: Setting, size: str, label: str, records: Sequence[Record]) -> list[Row]:
    """Return speed and memory of the counted steps."""
    tokens = step_shape(size).tokens
    speed = tokens / median(record["wall"] for record in records[1:])
    peak = max(record["peak_bytes"] for record in records[1:]) / GIB
    rows = [
        measured(CHECK, f"{size}: {label}, tokens per second of {tokens:,} a step", f"{speed:,.0f}"),
        measured(CHECK, f"{size}: {label}, peak memory of a step above its start, GiB", f"{peak:.2f}"),
    ]
    if setting.on_gpu:
        whole = max(record["total_bytes"] for record in records) / GIB
        rows.append(measured(CHECK, f"{size}: {label}, peak memory in all, GiB", f"{whole:.1f}"))
    return rows


def _compared(size: str, ours: Sequence[Record], plain: Sequence[Record]) -> list[Row]:
    """Return whether both ways took the same first step, and how far they are apart in cost."""
    rows = [
        within(
            CHECK,
            f"{size}: {name.replace('_', ' ')} of the first step, ours against plain, relative gap",
            relative_gap(ours[0]["values"][name], value),
            SAME_STEP,
        )
        for name, value in plain[0]["values"].items()
    ]
    faster = median(r["wall"] for r in plain[1:]) / median(r["wall"] for r in ours[1:])
    smaller = max(r["peak_bytes"] for r in plain[1:]) / max(r["peak_bytes"] for r in ours[1:])
    shown = f"{faster:.1f} × as fast, 1/{smaller:.1f} of the peak above the start"
    return [*rows, measured(CHECK, f"{size}: ours against plain", shown)]
