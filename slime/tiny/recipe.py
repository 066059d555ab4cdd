"""The settings that made the shipped checkpoints, and the run that makes them anew.

Each checkpoint is pre-trained from scratch; every check reads the greedy accuracy on the validation split,
and the test split is only looked at when a checkpoint is done.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from slime.tiny.accuracy import greedy_accuracy
from slime.tiny.examples import Encoder
from slime.tiny.model import load_model, save_checkpoint, save_processor
from slime.tiny.pretrain import Settings, pretrain
from slime.tiny.words import WORDS

RECIPES: Final = {
    "teacher": Settings(seed=1, steps=1200, slips=0.25),
    "student": Settings(seed=2, steps=1400, forgetful=0.75, forgetful_from=700),
    "weak": Settings(seed=1, steps=1200, slips=0.25, stop_within=(0.22, 0.28), check_every=10),
    "text_teacher": Settings(seed=1, steps=2000, problems=WORDS, slips=0.25),
    "text_student": Settings(seed=2, steps=2000, problems=WORDS, forgetful=0.75, forgetful_from=1000),
}


@dataclass(frozen=True, slots=True)
class Result:
    """What was measured on one finished checkpoint, as it lies on disk."""

    name: str
    directory: Path
    validation: float
    test: float
    test_blank: float | None
    """With every test picture white; None for a model without vision."""


def make_checkpoints(names: Iterable[str], out: Path) -> list[Result]:
    """Pre-train the named checkpoints into folders of `out`."""
    results: list[Result] = []
    for name in names:
        settings, directory = RECIPES[name], out / name
        splits = settings.problems.make_splits()
        held_out = [*splits["validation"], *splits["test"]]
        save_processor(directory, sees=settings.problems.pictured)
        model = pretrain(settings, Encoder(directory), held_out, splits["validation"], name)
        save_checkpoint(model, directory)
        results.append(measure(name, directory))
    return results


def measure(name: str, directory: Path) -> Result:
    """Measure a checkpoint folder: greedy, in float32 arithmetic, whole splits."""
    problems = RECIPES[name].problems
    splits, encoder, model = problems.make_splits(), Encoder(directory), load_model(directory)
    return Result(
        name=name,
        directory=directory,
        validation=greedy_accuracy(model, encoder, splits["validation"]),
        test=greedy_accuracy(model, encoder, splits["test"]),
        test_blank=greedy_accuracy(model, encoder, splits["test"], blank=True) if problems.pictured else None,
    )
