"""Save and load: an interrupted run goes on as if it had not been, under another number of ranks too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.fakes.tiny_model import make_samples, save_vision_model
from tests.fakes.training import DISTILL, ONE_BATCH, Job, Outcome, joined, make_args, train, train_on_ranks

FLAGS = (*DISTILL, *ONE_BATCH, "--lr", "0.01", "--adam-eps", "1e-3", "--lr-warmup-iters", "3")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vision_model(tmp_path_factory.mktemp("model"))


def job(rollouts: int, load: Path | None = None, save: Path | None = None) -> Job:
    samples, pictures = make_samples(4)
    return Job(FLAGS, samples, pictures, rollouts, load=load and str(load), save=save and str(save))


def assert_goes_on(resumed: Outcome, whole: Outcome) -> None:
    for name in ("loss", "grad_norm", "lr"):
        assert resumed.metrics[-1][name] == pytest.approx(whole.metrics[-1][name], rel=1e-3), name
    for name, weight in whole.weights.items():
        torch.testing.assert_close(resumed.weights[name], weight, rtol=0, atol=2e-5, msg=name)


def assert_the_same(resumed: Outcome, whole: Outcome) -> None:
    assert resumed.metrics[-1] == whole.metrics[-1]
    assert resumed.weights.keys() == whole.weights.keys()
    for name, weight in whole.weights.items():
        assert torch.equal(resumed.weights[name], weight), name


def test_a_run_goes_on_where_it_was_saved_bit_for_bit(model: Path, tmp_path: Path) -> None:
    whole = train(model, job(3))
    train(model, job(2, save=tmp_path))
    assert_the_same(train(model, job(1, load=tmp_path)), whole)
    fresh = train(model, job(1))
    assert fresh.metrics[-1]["lr"] != whole.metrics[-1]["lr"]


def test_the_number_of_ranks_may_change_and_if_not_it_is_bit_for_bit(model: Path, tmp_path: Path) -> None:
    whole = train(model, job(3))
    train(model, job(1, save=tmp_path / "one"))
    jobs = [
        job(1, load=tmp_path / "one", save=tmp_path / "two"),
        *(job(3), job(2, save=tmp_path / "both"), job(1, load=tmp_path / "both")),
    ]
    outcomes = train_on_ranks(model, jobs, tmp_path)
    assert_goes_on(train(model, job(1, load=tmp_path / "two")), whole)
    for whole_on_two, resumed in zip(outcomes[1], outcomes[3], strict=True):
        assert_the_same(resumed, whole_on_two)


def test_the_step_count_comes_back(model: Path, tmp_path: Path) -> None:
    train(model, job(2, save=tmp_path))
    with joined(make_args(model, *DISTILL)) as backend:
        backend.load_checkpoint(tmp_path)
        assert backend.weight_version == 2


def test_a_folder_without_checkpoint_is_refused(model: Path, tmp_path: Path) -> None:
    with (
        joined(make_args(model, *DISTILL)) as backend,
        pytest.raises(FileNotFoundError, match="--load takes"),
    ):
        backend.load_checkpoint(tmp_path)
