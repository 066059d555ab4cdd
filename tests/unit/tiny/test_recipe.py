"""The recipe of the shipped checkpoints: a short run in every suite, the whole of it in the slow one."""

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from slime.tiny import CHECKPOINTS, checkpoint_path, problems
from slime.tiny.__main__ import main
from slime.tiny.examples import Encoder
from slime.tiny.geometry import GEOMETRY
from slime.tiny.model import build_model, save_checkpoint
from slime.tiny.pretrain import Settings, pretrain
from slime.tiny.problems import Problem, ProblemSet
from slime.tiny.recipe import RECIPES, make_checkpoints
from slime.tiny.words import WORDS

RANGES = {
    "teacher": (0.95, 1.0),
    "student": (0.2, 0.4),
    "weak": (0.1, 0.3),
    "text_teacher": (0.99, 1.0),
    "text_student": (0.25, 0.45),
}

SHORT = Settings(seed=3, steps=3, warmup=1, batch_size=4, check_every=3)


def few_steps(settings: Settings = SHORT) -> dict[str, torch.Tensor]:
    """Pre-train for three steps and return the weights."""
    torch.set_num_threads(1)
    validation = list(islice(settings.problems.stream(random.Random(0), set()), 4))
    encoder = Encoder(checkpoint_path("teacher" if settings.problems is GEOMETRY else "text_teacher"))
    return pretrain(settings, encoder, [], validation, "test").state_dict()


@pytest.mark.parametrize("problem_set", [GEOMETRY, WORDS], ids=["geometry", "words"])
def test_pre_training_repeats_and_depends_on_its_settings(problem_set: ProblemSet) -> None:
    settings = replace(SHORT, problems=problem_set)
    first, again, other = few_steps(settings), few_steps(settings), few_steps(replace(settings, slips=1.0))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_a_checkpoint_that_is_never_weak_enough_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"no check of test .* within \(0\.5, 0\.6\) in 3 steps"):
        few_steps(replace(SHORT, stop_within=(0.5, 0.6)))


def test_held_out_rows_are_not_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[set[str]] = []

    def spy(self: ProblemSet, rng: random.Random, taken: set[str]) -> Iterator[Problem]:
        seen.append(set(taken))
        return original(self, rng, taken)

    held_out = list(islice(GEOMETRY.stream(random.Random(0), set()), 2))
    original = ProblemSet.stream
    monkeypatch.setattr(ProblemSet, "stream", spy)
    settings = Settings(seed=1, steps=1, batch_size=2)
    pretrain(settings, Encoder(checkpoint_path("teacher")), held_out, held_out, "test")
    assert seen == [{problem.key for problem in held_out}]


@pytest.mark.parametrize("problem_set", [GEOMETRY, WORDS], ids=["geometry", "words"])
def test_a_stream_gives_nothing_that_is_taken(problem_set: ProblemSet) -> None:
    held_out = {problem.key for problem in problem_set.make_splits()["test"]}
    stream = problem_set.stream(random.Random(1), set(held_out))
    keys = [problem.key for problem in islice(stream, 1000)]
    assert not held_out & set(keys)
    assert (len(set(keys)) == len(keys)) == problem_set.pictured


def test_saving_rounds_to_bfloat16_and_leaves_the_model(tmp_path: Path) -> None:
    model = build_model(0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    save_checkpoint(model, tmp_path)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    saved = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in saved
    assert {value.dtype for value in saved.values()} == {torch.bfloat16}
    assert all(torch.equal(before[name].bfloat16(), value) for name, value in saved.items())


def test_every_checkpoint_has_a_recipe_and_the_weak_one_is_the_teachers_run() -> None:
    assert tuple(RECIPES) == CHECKPOINTS
    teacher, weak = RECIPES["teacher"], RECIPES["weak"]
    assert (weak.seed, weak.steps, weak.slips) == (teacher.seed, teacher.steps, teacher.slips)


def test_measuring_prints_the_accuracies(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for split in problems.SPLIT_SIZES:
        monkeypatch.setitem(problems.SPLIT_SIZES, split, 64)
    assert main(["--measure", "--only", "teacher"]) == 0
    name, validation, test, blank = capsys.readouterr().out.splitlines()[1].split()
    assert name == "teacher"
    assert min(float(validation), float(test)) > 0.9
    assert float(blank) < 0.2
    assert main(["--measure", "--only", "text_teacher"]) == 0
    name, validation, test, *blank = capsys.readouterr().out.splitlines()[1].split()
    assert min(float(validation), float(test)) > 0.9
    assert blank == ["no", "pictures"]


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_recipe_still_reaches_the_accuracy(name: str, tmp_path: Path) -> None:
    """Takes 1 (weak) to 6 minutes (teacher) on one thread, 2 to 3 for those without pictures."""
    torch.set_num_threads(1)
    [result] = make_checkpoints([name], tmp_path)
    low, high = RANGES[name]
    assert low <= result.test <= high
    assert result.test_blank is None or result.test_blank <= 0.15
