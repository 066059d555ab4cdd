"""Random checkpoints in the scratch folder, and whether disk and GPU have room for what is done with them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import torch

from scripts.benchmarks.training.published import checkpoint_bytes
from scripts.checks.gpu.setting import Setting
from slime.engines.process import PROJECT_ROOT

GIB = 2**30
BYTES_A_WEIGHT = 16
"""While it is trained: weight, gradient and both moments, float32."""
STEP_BYTES = 5 * GIB
"""What a step needs besides, at least: gathered layers, activations, a chunk of logits."""
LOADED_COPIES = 4
"""In the host's memory, in checkpoints: the plain way loads float32, and holds a file's content beside it."""
PARKED_COPIES = 12
"""Likewise of float32 weights and moments, whose pinned memory torch rounds up to powers of two."""


def random_checkpoint(setting: Setting, size: str) -> Path:
    """Return a random checkpoint of a published shape below the scratch folder, made where it is not there.

    A process of its own draws the weights: it takes its share of the GPU's memory with it.

    Raises:
        subprocess.CalledProcessError: it could not; its own words are on stderr.
    """
    folder = setting.scratch / f"random-{size}"
    if not (folder / "config.json").is_file():
        command = [sys.executable, "-m", "scripts.benchmarks.training.published", size]
        command += ["--device", str(setting.device), "--out", str(folder)]
        subprocess.run(command, check=True, env=dict(os.environ) | {"PYTHONPATH": str(PROJECT_ROOT)})
    return folder


def lacking(setting: Setting, size: str, *, copies: int = 1, served: bool = False) -> str:
    """Return why a model of this size cannot be trained here; nothing where it can.

    Args:
        setting: scratch folder and device.
        size: of the random model.
        copies: how many checkpoints of it are on disk at the same time.
        served: an engine holds it beside the trainer.
    """
    on_disk = checkpoint_bytes(size)
    free_disk = shutil.disk_usage(setting.scratch).free
    needed_disk = int(1.1 * copies * on_disk)
    if free_disk < needed_disk:
        return (
            f"too little disk: {needed_disk / GIB:.1f} GiB are needed, {free_disk / GIB:.1f} are free in "
            f"{setting.scratch}; --scratch names another folder"
        )
    needed_host = (PARKED_COPIES if served else LOADED_COPIES) * on_disk
    free_host = psutil.virtual_memory().available
    if free_host < needed_host:
        return (
            f"too little memory of the host: {needed_host / GIB:.0f} GiB are needed, "
            f"{free_host / GIB:.0f} are free"
        )
    if not setting.on_gpu or size == "tiny":
        return ""
    needed = BYTES_A_WEIGHT * on_disk // 2 + STEP_BYTES + (2 * on_disk if served else 0)
    free, total = torch.cuda.mem_get_info(setting.device)
    if free < needed:
        return (
            f"too little memory: about {needed / GIB:.0f} GiB are needed, {free / GIB:.0f} of "
            f"{total / GIB:.0f} are free"
        )
    return ""
