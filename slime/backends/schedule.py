"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class LearningRate:
    """Linear warm-up, then constant, linear or cosine decay to `min_lr` at `total_steps`."""

    lr: float
    min_lr: float = 0.0
    style: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    total_steps: int

    def at(self, step: int) -> float:
        """Return the learning rate of optimizer step `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        if self.style == "constant":
            return self.lr
        done = min(1.0, (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps))
        left = 1 - done if self.style == "linear" else (1 + math.cos(math.pi * done)) / 2
        return self.min_lr + (self.lr - self.min_lr) * left
