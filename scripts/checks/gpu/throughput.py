"""A training step at published shapes, ours beside the plain way: tokens per second and peak memory.

Both are the ways of `scripts/benchmarks/trainer.py`, one after the other, each in a process of its own:
bfloat16 with float32 weights and optimizer, gradient checkpointing on.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

from scripts.benchmarks.training.processes import NoRoomError, worker
from scripts.benchmarks.training.published import SHAPES
from scripts.benchmarks.training.report import Record
from scripts.benchmarks.training.workload import Machine, Shape
from scripts.checks.gpu.result import Row, failed, measured, relative_gap, skipped, within
from scripts.checks.gpu.room import GIB, lacking, random_checkpoint
from scripts.checks.gpu.setting import Setting

CHECK = "training step"
SIZES = ("2B", "4B")
LABELS = {"ours": "ours", "plain": "plain (padded rows, all logits)"}
ROUNDS = 2
"""Counted steps of each way, after one that warms up and makes the optimizer's state."""
SAME_STEP = 0.05
"""How far the two ways' first steps may be apart: bfloat16 rounds at other places."""


def run(setting: Setting) -> Iterator[Row]:
    """Measure each size."""
    for size in ("tiny",) if setting.tiny else SIZES:
        yield from _measure(setting, size)


def step_shape(size: str) -> Shape:
    """Return the step's workload: 23 thousand tokens with pictures of 196; a few for a CPU."""
    if size == "tiny":
        return Shape(vocabulary=SHAPES[size].vocabulary, prompts=1, samples=4, longest=48, side=64)
    vocabulary = SHAPES[size].vocabulary
    return Shape(vocabulary=vocabulary, prompts=8, samples=4, longest=2048, side=448, micro_batches=8)


def _measure(setting: Setting, size: str) -> Iterator[Row]:
    refusal = lacking(setting, size)
    if refusal:
        yield skipped(CHECK, size, refusal)
        return
    model = random_checkpoint(setting, size)
    steps: dict[str, list[Record]] = {}
    for way, label in LABELS.items():
        try:
            steps[way] = _steps(way, model, step_shape(size), setting)
            yield from _figures(setting, size, label, steps[way])
        except NoRoomError as error:
            say = failed if way == "ours" else measured  # of the plain way it is a finding
            yield say(CHECK, f"{size}: {label}", f"out of memory: {error}")
        except RuntimeError as error:
            yield failed(CHECK, f"{size}: {label}", str(error))
    shutil.rmtree(model)
    if len(steps) == len(LABELS):
        yield from _compared(size, steps["ours"], steps["plain"])


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
    shown = f"{faster:.1f} times as fast, 1/{smaller:.1f} of the peak above the start"
    return [*rows, measured(CHECK, f"{size}: ours against plain", shown)]
