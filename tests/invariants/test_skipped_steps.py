"""A step that is skipped never was: weights, moments, schedule and version go on as if nobody had tried it.

Three rollouts, the second of which is spoiled on one of two ranks, must leave what two sound ones do, bit for
bit; a third step would differ if the second had touched the moments, their step counter or the schedule.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from slime.trainer import build_shards
from tests.fakes.tiny_model import make_samples, save_vision_model
from tests.fakes.training import (
    DISTILL,
    ONE_BATCH,
    Job,
    Outcome,
    Plant,
    make_args,
    train,
    train_on_ranks,
)

pytest.importorskip("megatron.core")

BACKENDS = {"fsdp": (), "megatron": ("--train-backend", "megatron")}
FAULTS: dict[Any, str] = {
    "nan loss": "the loss is nan",
    "nan gradient": "the gradient norm is nan though the loss is ",
    "huge gradient": " is above --skip-grad 1000",
}
FLAGS = (
    *(*DISTILL, *ONE_BATCH, "--lr", "0.01", "--adam-eps", "1e-3", "--lr-warmup-iters", "3"),
    *("--weight-decay", "0.1", "--skip-grad", "1000"),
)
SPOILED = 5
"""A sample."""


def job(backend: str, rollouts: int, *plants: Plant, flags: tuple[str, ...] = ()) -> Job:
    samples, pictures = make_samples(8)
    return Job((*FLAGS, *BACKENDS[backend], *flags), samples, pictures, rollouts, plants=plants)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vision_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def two_ranks(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], list[Outcome]]:
    """Every case, in one start of two processes that share the samples."""
    jobs = {(backend, "sound"): job(backend, 2) for backend in BACKENDS}
    for backend in BACKENDS:
        jobs |= {(backend, fault): job(backend, 3, Plant(1, SPOILED, fault)) for fault in FAULTS}
    outcomes = train_on_ranks(model, list(jobs.values()), tmp_path_factory.mktemp("ranks"))
    return dict(zip(jobs, outcomes, strict=True))


def owner(backend: str) -> int:
    """Return the rank that trains the spoiled sample."""
    args = make_args(Path("model"), *FLAGS, *BACKENDS[backend], ranks=2)
    shards = build_shards(args, *make_samples(8), 2, 0)
    (rank,) = [rank for rank, shard in enumerate(shards) if SPOILED in [each.index for each in shard.samples]]
    return rank


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_on_one_rank_is_skipped_by_both_and_leaves_no_trace(
    two_ranks: dict[tuple[str, str], list[Outcome]], backend: str, fault: str
) -> None:
    for outcome, sound in zip(two_ranks[backend, fault], two_ranks[backend, "sound"], strict=True):
        assert outcome.weights.keys() == sound.weights.keys()
        assert [name for name in sound.weights if not outcome.weights[name].equal(sound.weights[name])] == []
        first, skipped, last = outcome.metrics
        assert [first, last] == sound.metrics
        assert (first["optimizer_steps"], first["skipped_steps"], first["samples"]) == (1, 0, 8)
        assert (skipped["optimizer_steps"], skipped["skipped_steps"], skipped["samples"]) == (0, 1, 0)
        assert last["lr"] == pytest.approx(0.01 * 2 / 3), "the second step of the warm-up"
        (step,) = outcome.skipped
        assert (step.rollout_id, step.number, step.version) == (1, 0, 1)
        assert FAULTS[fault] in step.reason


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_record_of_a_skipped_step_shows_loss_and_norm_and_no_other_hole(
    two_ranks: dict[tuple[str, str], list[Outcome]], backend: str
) -> None:
    for outcome in two_ranks[backend, "nan loss"]:
        holes = {name for name, value in outcome.metrics[1].items() if not math.isfinite(value)}
        assert holes == {"loss", "grad_norm"}
        assert outcome.metrics[1]["opd_reverse_kl"] != 0
    for outcome in two_ranks[backend, "huge gradient"]:
        assert 1000 < outcome.metrics[1]["grad_norm"] < math.inf
        assert outcome.metrics[1]["grad_norm"] == outcome.skipped[0].grad_norm


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_rank_with_the_spoiled_sample_suspects_its_own(
    two_ranks: dict[tuple[str, str], list[Outcome]], backend: str
) -> None:
    outcomes = two_ranks[backend, "nan loss"]
    suspects = [outcome.skipped[0].suspects for outcome in outcomes]
    guilty = suspects[owner(backend)]
    assert SPOILED in [suspect.sample for suspect in guilty]
    assert all(math.isnan(suspect.batch_loss or 0) for suspect in guilty)
    assert all(suspect.group == suspect.sample // 2 for suspect in guilty)
    innocent = suspects[1 - owner(backend)]
    assert len(innocent) == 4
    assert all(suspect.batch_loss is None for suspect in innocent)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_other_steps_of_a_rollout_are_taken(model: Path, backend: str) -> None:
    """Two steps a rollout: the one with the spoiled sample is skipped, and counts in no mean."""
    flags = ("--global-batch-size", "4")
    spoiled = train(model, job(backend, 1, Plant(0, SPOILED, "nan loss"), flags=flags))
    whole = train(model, job(backend, 1, flags=flags))
    metrics = spoiled.metrics[0]
    assert (metrics["optimizer_steps"], metrics["skipped_steps"], metrics["samples"]) == (1, 1, 4)
    assert metrics["tokens"] < whole.metrics[0]["tokens"]
    assert all(math.isfinite(value) for value in metrics.values())
    assert [(step.number, step.version) for step in spoiled.skipped] == [(1, 1)]
    assert [suspect.sample for suspect in spoiled.skipped[0].suspects if suspect.batch_loss is None] == []
    assert any(not torch.equal(spoiled.weights[name], whole.weights[name]) for name in whole.weights)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_threshold_a_huge_gradient_is_clipped(model: Path, backend: str) -> None:
    outcome = train(model, job(backend, 1, Plant(0, SPOILED, "huge gradient"), flags=("--skip-grad", "0")))
    assert outcome.metrics[0]["optimizer_steps"] == 1
    assert outcome.metrics[0]["grad_norm"] > 1000
    assert outcome.skipped == []
