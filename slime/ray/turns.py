"""Training and generation on the same GPUs: they take turns, and this knows whose turn it is. Pure.

     generation ── engines give all memory back, trainers take theirs ──► training
         ▲                                                                   │
         │                                          trainers put the optimizer away,
    trainers put the model away,                     engines take memory for weights
    engines take memory for caches                                           │
         └──────────────────────────────── sync ◄────────────────────────────┘

A server that is asked in another order dies (SGLang asserts that it is idle, and knows no tag that was not
released), or generates with weights that were never written.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Protocol

from slime.engines.control import MemoryTag

ALL_TAGS: tuple[MemoryTag, ...] = ("kv_cache", "weights", "cuda_graph")
WEIGHTS: tuple[MemoryTag, ...] = ("weights",)
CACHES: tuple[MemoryTag, ...] = ("kv_cache", "cuda_graph")


class Turn(StrEnum):
    """Whose memory is on the GPUs."""

    GENERATION = "generation"
    """The engines' alone."""
    TRAINING = "training"
    """The trainers' alone."""
    SYNC = "sync"
    """The trainers' model, and the engines' weights."""


class Sleepers(Protocol):
    """What is asked of the engines."""

    def release_memory(self, tags: Sequence[MemoryTag]) -> None: ...
    def resume_memory(self, tags: Sequence[MemoryTag]) -> None: ...


class Offloaders(Protocol):
    """What is asked of the trainers; their memory goes to the host and comes back."""

    def onload(self) -> None: ...
    def offload_optimizer(self) -> None: ...
    def offload(self) -> None: ...


class Turns:
    """The turns of engines and trainers. It begins with generation: the trainers' memory is on the host."""

    def __init__(self, engines: Sleepers, trainers: Offloaders) -> None:
        self._engines = engines
        self._trainers = trainers
        self.turn = Turn.GENERATION

    def to_training(self) -> None:
        """Let the trainers have the GPUs. The engines must be idle."""
        if self.turn is Turn.TRAINING:
            return
        self._leave(Turn.GENERATION, "train")
        self._engines.release_memory(ALL_TAGS)
        self._trainers.onload()
        self.turn = Turn.TRAINING

    def to_sync(self) -> None:
        """Make room for the engines' weights beside the trainers' model."""
        if self.turn is Turn.SYNC:
            return
        self.to_training()
        self._trainers.offload_optimizer()
        self._engines.resume_memory(WEIGHTS)
        self.turn = Turn.SYNC

    def to_generation(self) -> None:
        """Let the engines have the GPUs; their weights have just been written."""
        self._leave(Turn.SYNC, "generate")
        self._trainers.offload()
        self._engines.resume_memory(CACHES)
        self.turn = Turn.GENERATION

    def to_the_end(self) -> None:
        """Let the trainers have the GPUs, whosesoever turn it is: the engines have been ended."""
        self._trainers.onload()
        self.turn = Turn.TRAINING

    def _leave(self, turn: Turn, purpose: str) -> None:
        if self.turn is not turn:
            raise RuntimeError(
                f"it is the turn of {self.turn} on the shared GPUs; to {purpose} it must be that of {turn}."
            )


class Apart:
    """Trainers and engines have GPUs of their own; nobody waits for a turn."""

    def to_training(self) -> None:
        """Do nothing."""

    def to_sync(self) -> None:
        """Do nothing."""

    def to_generation(self) -> None:
        """Do nothing."""

    def to_the_end(self) -> None:
        """Do nothing."""
