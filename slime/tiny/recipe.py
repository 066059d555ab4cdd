"""The settings that made the shipped checkpoints, and the run that makes them anew.

Each checkpoint is pre-trained from scratch; every check reads the greedy accuracy on the validation split,
and the test split is only looked at when a checkpoint is done.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from transformers import Qwen3VLForConditionalGeneration

from slime.tiny.accuracy import greedy_accuracy
from slime.tiny.examples import Encoder
from slime.tiny.geometry import make_splits
from slime.tiny.model import save_checkpoint, save_processor
from slime.tiny.pretrain import Settings, pretrain

RECIPES: Final = {
    "teacher": Settings(seed=1, steps=1200, slips=0.25),
    "student": Settings(seed=2, steps=1400, forgetful=0.75, forgetful_from=700),
    "weak": Settings(seed=1, steps=1200, slips=0.25, stop_within=(0.22, 0.28), check_every=10),
}


@dataclass(frozen=True, slots=True)
class Result:
    """What was measured on one finished checkpoint, as it lies on disk."""

    name: str
    directory: Path
    validation: float
    test: float
    test_blank: float
    """With every test picture white."""


def make_checkpoints(names: Iterable[str], out: Path) -> list[Result]:
    """Pre-train the named checkpoints into folders of `out`."""
    splits = make_splits()
    held_out = [*splits["validation"], *splits["test"]]
    results: list[Result] = []
    for name in names:
        directory = out / name
        save_processor(directory)
        model = pretrain(RECIPES[name], Encoder(directory), held_out, splits["validation"], name)
        save_checkpoint(model, directory)
        results.append(measure(name, directory))
    return results


def measure(name: str, directory: Path) -> Result:
    """Measure a checkpoint folder: greedy, in float32 arithmetic, whole splits."""
    splits, encoder = make_splits(), Encoder(directory)
    model = Qwen3VLForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
    return Result(
        name=name,
        directory=directory,
        validation=greedy_accuracy(model, encoder, splits["validation"]),
        test=greedy_accuracy(model, encoder, splits["test"]),
        test_blank=greedy_accuracy(model, encoder, splits["test"], blank=True),
    )
