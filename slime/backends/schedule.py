"""What changes along a run, as a pure function of how far it is: decays, and the learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Decay = Literal["constant", "linear", "cosine"]


def decayed(first: float, last: float, style: Decay, done: float) -> float:
    """Return the value after the share `done` of the way from `first` to `last`; beyond 1 it stays `last`."""
    if style == "constant":
        return first
    done = min(1.0, done)
    left = 1 - done if style == "linear" else (1 + math.cos(math.pi * done)) / 2
    return last + (first - last) * left


@dataclass(frozen=True, kw_only=True)
class LearningRate:
    """Linear warm-up, then constant, linear or cosine decay to `min_lr` at `total_steps`."""

    lr: float
    min_lr: float = 0.0
    style: Decay = "constant"
    warmup_steps: int = 0
    total_steps: int

    def at(self, step: int) -> float:
        """Return the learning rate of optimizer step `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return decayed(self.lr, self.min_lr, self.style, done)
