"""However a batch is split, over micro-batches or ranks, packed or padded, it gives one gradient.

The gradient is read off the weights after one step of an AdamW that moves them by g / (|g| + 1).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.fakes.tiny_model import make_samples, save_vision_model
from tests.fakes.training import DISTILL, LINEAR_STEP, ONE_BATCH, Job, Outcome, train, train_on_ranks

REDUCTIONS = {"token mean": ("--calculate-per-token-loss",), "sample mean": ()}
EXTRAS = (
    "--entropy-coef",
    "0.01",
    "--kl-loss-coef",
    "0.1",
    "--kl-loss-type",
    "k2",
    "--logprob-chunk-size",
    "7",
    "--use-tis",
)
TOLERANCE = 2e-6
PADDED = ("--train-layout", "padded")
"""Packed is the default, of the expected gradients too."""
TEACHER_TEXT = (
    "--rm-url",
    "http://127.0.0.1:1/generate",
    "--loss-type",
    "sft_loss",
    "--sample-from",
    "teacher",
)
HYBRID = ("--rm-type", "math", "--task-reward-weight", "0.5", "--opd-gate", "wrong")
SIGNALS = {
    "what follows, hybrid, wrong answers": (
        *DISTILL,
        *HYBRID,
        "--opd-kl-discount",
        "0.9",
        "--opd-kl-clip",
        "2",
    ),
    "top-k, right answers": (
        *(*DISTILL, "--opd-loss", "topk", "--opd-top-k", "5", "--opd-divergence", "jsd"),
        *("--rm-type", "math", "--opd-gate", "right"),
    ),
    "imitation": TEACHER_TEXT,
}
"""Beside the sampled signal of every other case; each is split over micro-batches and over ranks."""


def job(
    reduction: str, split: tuple[str, ...], *, samples: int = 8, pictures: tuple[bool, ...] = (True, False)
) -> Job:
    drawn, bytes_by_hash = make_samples(samples, with_pictures=pictures)
    return Job((*DISTILL, *LINEAR_STEP, *EXTRAS, *REDUCTIONS[reduction], *split), drawn, bytes_by_hash)


def tokens(budget: int) -> tuple[str, ...]:
    return ("--use-dynamic-batch-size", "--max-tokens-per-gpu", str(budget))


def signal_job(signal: str, reduction: str, split: tuple[str, ...]) -> Job:
    drawn, bytes_by_hash = make_samples(8, top_k=5)
    return Job((*SIGNALS[signal], *LINEAR_STEP, *REDUCTIONS[reduction], *split), drawn, bytes_by_hash)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vision_model(tmp_path_factory.mktemp("model"), tied=False)


@pytest.fixture(scope="module")
def whole(model: Path) -> dict[str, Outcome]:
    """One rank, one micro-batch."""
    return {reduction: train(model, job(reduction, ONE_BATCH)) for reduction in REDUCTIONS}


@pytest.fixture(scope="module")
def two_ranks(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Outcome]]:
    """Every case that needs two processes, in one start of them."""
    cases = {f"{reduction}, {name}": job(reduction, SPLITS[name]) for reduction, name in RANK_CASES}
    cases["pictures on one rank"] = job(
        "token mean", ("--micro-batch-size", "1"), samples=2, pictures=(True,)
    )
    cases["pictures on one rank"].samples[1].multimodal_train_inputs = None
    cases["pictures on one rank"].samples[1].tokens = cases["pictures on one rank"].samples[1].tokens[4:]
    cases["no pictures"] = job("token mean", tokens(30), pictures=(False,))
    cases["one rank without samples"] = job("token mean", ONE_BATCH, samples=2)
    cases["one rank without samples"].samples[0].response_length = 0
    cases["one rank without samples"].samples[0].loss_mask = []
    for signal in SIGNALS:
        cases |= {f"{signal}, {each}": signal_job(signal, each, tokens(45)) for each in REDUCTIONS}
    outcomes = train_on_ranks(model, list(cases.values()), tmp_path_factory.mktemp("ranks"))
    return dict(zip(cases, outcomes, strict=True))


SPLITS = {
    "one batch each": ONE_BATCH,
    "by samples": ("--micro-batch-size", "2"),
    "by tokens": tokens(45),
    "padded, by tokens": (*PADDED, *tokens(45)),
}
RANK_CASES = [
    *(("token mean", name) for name in SPLITS),
    *(("sample mean", name) for name in ("by tokens", "padded, by tokens")),
]


def assert_same(outcome: Outcome, expected: Outcome) -> None:
    for name, weight in expected.weights.items():
        torch.testing.assert_close(outcome.weights[name], weight, atol=TOLERANCE, rtol=0, msg=name)
    for name, value in expected.metrics[0].items():
        if name != "micro_batches":
            assert outcome.metrics[0][name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize(
    ("reduction", "split"),
    [
        ("token mean", ("--micro-batch-size", "1")),
        ("token mean", tokens(60)),
        ("sample mean", ("--micro-batch-size", "4")),
        ("sample mean", tokens(60)),
        ("token mean", (*PADDED, *tokens(60))),
        ("sample mean", (*PADDED, "--micro-batch-size", "4")),
    ],
)
def test_micro_batches_do_not_change_the_gradient(
    model: Path, whole: dict[str, Outcome], reduction: str, split: tuple[str, ...]
) -> None:
    outcome = train(model, job(reduction, split))
    assert outcome.metrics[0]["micro_batches"] > 1
    assert_same(outcome, whole[reduction])


@pytest.mark.parametrize(("reduction", "split"), RANK_CASES)
def test_ranks_do_not_change_the_gradient(
    whole: dict[str, Outcome], two_ranks: dict[str, list[Outcome]], reduction: str, split: str
) -> None:
    outcomes = two_ranks[f"{reduction}, {split}"]
    for outcome in outcomes:
        assert_same(outcome, whole[reduction])
    assert outcomes[0].metrics == outcomes[1].metrics


def test_padding_does_not_change_the_gradient(model: Path, whole: dict[str, Outcome]) -> None:
    assert_same(train(model, job("token mean", (*PADDED, *ONE_BATCH))), whole["token mean"])


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("signal", SIGNALS)
def test_no_signal_depends_on_the_split(
    model: Path, two_ranks: dict[str, list[Outcome]], signal: str, reduction: str
) -> None:
    expected = train(model, signal_job(signal, reduction, ONE_BATCH))
    assert_same(train(model, signal_job(signal, reduction, (*PADDED, "--micro-batch-size", "2"))), expected)
    for outcome in two_ranks[f"{signal}, {reduction}"]:
        assert_same(outcome, expected)


def test_a_rank_without_pictures_stays_in_step(model: Path, two_ranks: dict[str, list[Outcome]]) -> None:
    alone = job("token mean", ("--micro-batch-size", "1"), samples=2, pictures=(True,))
    alone.samples[1].multimodal_train_inputs = None
    alone.samples[1].tokens = alone.samples[1].tokens[4:]
    assert_same(two_ranks["pictures on one rank"][0], train(model, alone))


def test_ranks_without_any_picture_stay_in_step(model: Path, two_ranks: dict[str, list[Outcome]]) -> None:
    expected = train(model, job("token mean", ONE_BATCH, pictures=(False,)))
    assert_same(two_ranks["no pictures"][1], expected)


def test_a_rank_without_samples_stays_in_step(model: Path, two_ranks: dict[str, list[Outcome]]) -> None:
    outcome = two_ranks["one rank without samples"]
    assert outcome[0].metrics[0]["samples"] == 1
    alone = job("token mean", ONE_BATCH, samples=2)
    alone.samples[0].response_length, alone.samples[0].loss_mask = 0, []
    assert_same(outcome[0], train(model, alone))


def test_the_comparison_can_see(model: Path, whole: dict[str, Outcome]) -> None:
    """A teacher that differs in one token moves the weights by far more than the tolerance."""
    changed = job("token mean", ONE_BATCH)
    scores = changed.samples[3].teacher_log_probs
    assert scores is not None
    scores[0] -= 1
    outcome = train(model, changed)
    moved = [
        (outcome.weights[name] - whole["token mean"].weights[name]).abs().max() for name in outcome.weights
    ]
    assert max(moved) > 100 * TOLERANCE


def test_the_two_reductions_differ(whole: dict[str, Outcome]) -> None:
    one, other = whole["token mean"].weights, whole["sample mean"].weights
    assert max((one[name] - other[name]).abs().max() for name in one) > 100 * TOLERANCE
