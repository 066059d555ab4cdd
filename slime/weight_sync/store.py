"""The folder that holds a run's published weights, in shared memory where that has room.

Used by the driver, so it knows files and no tensors; `disk.py` writes what goes in.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from slime.scratch import ScratchFolder

SHARED_MEMORY = Path("/dev/shm")
PREFIX = "slime-weights-"


def create_weight_folder(
    output_dir: Path, checkpoint: Path, *, one_machine: bool, shared_memory: Path = SHARED_MEMORY
) -> ScratchFolder:
    """Make the folder: in shared memory if one machine runs all and two float32 copies fit there."""
    if one_machine and shared_memory.is_dir() and os.access(shared_memory, os.W_OK):
        folder = ScratchFolder(shared_memory, PREFIX)
        # A bf16 checkpoint may be published in float32, and two versions exist for a moment.
        if shutil.disk_usage(shared_memory).free > 4 * checkpoint_bytes(checkpoint):
            return folder
        folder.close()
    return ScratchFolder(output_dir, PREFIX)


def checkpoint_bytes(checkpoint: Path) -> int:
    """Return the size of the checkpoint's weights on disk."""
    return sum(path.stat().st_size for path in weight_files(checkpoint))


def weight_files(checkpoint: Path) -> list[Path]:
    """Return the checkpoint's safetensors files.

    Raises:
        FileNotFoundError: it has none.
    """
    files = sorted(checkpoint.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(
            f"{checkpoint} holds no *.safetensors file, which --hf-checkpoint needs; convert the checkpoint "
            "with `save_pretrained` of transformers, or check the path."
        )
    return files
