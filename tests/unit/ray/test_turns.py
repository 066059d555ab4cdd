"""Whose turn it is on shared GPUs; the stand-in engine dies of a wrong order, as the real one does."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest

from slime.engines.control import MemoryTag
from slime.ray.turns import Apart, Turn, Turns

CAPACITY = 10
"""What the shared GPU holds."""
ENGINE: dict[MemoryTag, int] = {"weights": 3, "kv_cache": 5, "cuda_graph": 1}
MODEL, OPTIMIZER = 3, 6


class EngineDiedError(BaseException):
    """The server's process has ended."""


class Gpu:
    """One GPU, with a strict engine and a trainer on it."""

    def __init__(self) -> None:
        self.engine: set[MemoryTag] = set(ENGINE)
        self.trainer: set[str] = set()
        self.written = True
        """Whether the engine's weights have content."""
        self.running = False

    def _fits(self) -> None:
        used = sum(ENGINE[tag] for tag in self.engine)
        used += MODEL * ("model" in self.trainer) + OPTIMIZER * ("optimizer" in self.trainer)
        if used > CAPACITY:
            raise MemoryError(f"{used} of {CAPACITY}: {sorted(self.engine)} and {sorted(self.trainer)}")

    # ---- the engine ----

    def release_memory(self, tags: Sequence[MemoryTag]) -> None:
        if self.running or not set(tags) <= self.engine:
            raise EngineDiedError(f"release of {tags} with {sorted(self.engine)}")
        self.engine -= set(tags)
        self.written = self.written and "weights" not in tags

    def resume_memory(self, tags: Sequence[MemoryTag]) -> None:
        if set(tags) & self.engine:
            raise EngineDiedError(f"resume of {tags} with {sorted(self.engine)}")
        self.engine |= set(tags)
        self._fits()

    def generate(self) -> None:
        if self.engine != set(ENGINE) or not self.written:
            raise EngineDiedError(f"generates with {sorted(self.engine)}, weights written: {self.written}")

    # ---- the trainer ----

    def onload(self) -> None:
        self.trainer = {"model", "optimizer"}
        self._fits()

    def offload_optimizer(self) -> None:
        self.trainer.discard("optimizer")

    def offload(self) -> None:
        self.trainer.clear()

    def train(self) -> None:
        assert self.trainer == {"model", "optimizer"}

    def publish(self) -> None:
        assert "model" in self.trainer
        if "weights" not in self.engine:
            raise EngineDiedError("weights are written into released memory")
        self.written = True


@pytest.fixture
def gpu() -> Gpu:
    return Gpu()


def test_the_loop_fits_and_kills_nobody(gpu: Gpu) -> None:
    turns = Turns(gpu, gpu)
    for _ in range(3):
        turns.to_sync()
        gpu.publish()
        turns.to_generation()
        gpu.generate()
        turns.to_training()
        gpu.train()
        turns.to_training()  # a checkpoint is written meanwhile
        gpu.train()
    assert turns.turn is Turn.TRAINING


def test_every_other_order_is_refused_before_an_engine_dies(gpu: Gpu) -> None:
    """Whatever is asked for, in whatever order: either it is refused and nothing changes, or it works."""
    steps: dict[str, Callable[[Turns], None]] = {
        "training": Turns.to_training,
        "sync": Turns.to_sync,
        "generation": Turns.to_generation,
    }
    refused = 0
    for order in itertools.product(steps, repeat=4):
        here = Gpu()
        turns = Turns(here, here)
        for step in order:
            before = (turns.turn, set(here.engine), set(here.trainer))
            try:
                steps[step](turns)
            except RuntimeError:
                refused += 1
                assert (turns.turn, here.engine, here.trainer) == before
                continue
            if turns.turn is Turn.SYNC:
                here.publish()
            elif turns.turn is Turn.GENERATION:
                here.generate()
            else:
                here.train()
    assert refused > 0


def test_the_message_says_whose_turn_it_is(gpu: Gpu) -> None:
    turns = Turns(gpu, gpu)
    turns.to_training()
    with pytest.raises(RuntimeError, match=r"turn of training.*to generate it must be that of sync"):
        turns.to_generation()
    turns.to_sync()
    with pytest.raises(RuntimeError, match=r"turn of sync.*to train it must be that of generation"):
        turns.to_training()


@pytest.mark.parametrize("turns_before", [0, 1, 2])
def test_without_engines_the_trainers_have_everything(gpu: Gpu, turns_before: int) -> None:
    turns = Turns(gpu, gpu)
    for step in (turns.to_training, turns.to_sync)[:turns_before]:
        step()
    gpu.engine.clear()
    turns.to_the_end()
    gpu.train()
    turns.to_training()
    gpu.train()


def test_apart_nobody_is_asked_for_anything() -> None:
    turns = Apart()
    turns.to_generation()
    turns.to_training()
    turns.to_sync()
    turns.to_the_end()
