"""The random generators of a training rank: seeded, written down, and set back.

Nothing of ours draws from them, dropout being 0; a model's own code may.
"""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

RANDOM_FOLDER = "random"
logger = logging.getLogger(__name__)


def seed_rank(seed: int, rank: int, steps: int = 0) -> None:
    """Seed the generators of Python, NumPy and torch by the run's seed, the rank and the steps taken."""
    drawn = random.Random(f"{seed}/{rank}/{steps}").getrandbits(32)
    random.seed(drawn)
    np.random.seed(drawn)
    torch.manual_seed(drawn)  # the GPUs' too


def save_random_state(folder: Path, rank: int, trackers: Mapping[str, Tensor] | None = None) -> None:
    """Write this rank's generators, and those that a library holds beside them, to its file in `folder`."""
    version, words, next_gauss = random.getstate()
    numbers: Any = np.random.get_state()
    kind, keys, position, has_gauss, gauss = numbers
    state: dict[str, Any] = {
        "python": (version, list(words), next_gauss),
        "numpy": (str(kind), torch.from_numpy(keys.astype(np.int64)), int(position), has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "trackers": dict(trackers or {}),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    folder.mkdir(parents=True, exist_ok=True)
    with _file(folder, rank).open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def load_random_state(
    folder: Path, rank: int, world_size: int, *, seed: int, steps: int
) -> dict[str, Tensor] | None:
    """Set this rank's generators as `save_random_state` found them; return those of the library.

    Other ranks than these wrote other states: under another number of ranks all are seeded anew, which the
    log says, and None is returned.
    """
    written = len(list(folder.glob("rank-*.pt")))
    if written != world_size:
        seed_rank(seed, rank, steps)
        logger.warning(
            "the checkpoint has the random generators of %d ranks and there are %d: seeded anew from --seed "
            "%d, rank %d and step %d.",
            *(written, world_size, seed, rank, steps),
        )
        return None
    state = torch.load(_file(folder, rank), map_location="cpu", weights_only=True)
    version, words, next_gauss = state["python"]
    random.setstate((version, tuple(words), next_gauss))
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
    return state["trackers"]


def _file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.pt"
