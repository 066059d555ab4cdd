"""Sampled at any temperature, the student learns what it would have learned at temperature 1.

By full enumeration over a small vocabulary, through the trainer's own objective: a response's probability
under the sampling distribution is its weight in the loss. Then once through the whole trainer.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slime.backends.batching import MicroBatch, MicroBatchBuilder
from slime.losses.reduction import GlobalMean
from slime.objective import Distillation, Objective
from slime.trainer import Trainer, build_shards
from slime.utils.processing_utils import load_processor
from slime.utils.types import Sample
from tests.fakes.tiny_model import make_samples, save_vision_model
from tests.fakes.training import DISTILL, LINEAR_STEP, ONE_BATCH, Job, joined, make_args, train

VOCABULARY, LENGTH, COEF, WIDE = 5, 3, 0.7, 1e9
RESPONSES = torch.tensor(list(itertools.product(range(VOCABULARY), repeat=LENGTH)))  # [V**L, L]
TEMPERATURES = (0.5, 0.8, 1.6)


def prefix_rows() -> Tensor:
    """Return, for each position of each response [N, L], the row of its prefix in a table of all prefixes."""
    rows = torch.zeros_like(RESPONSES)
    for position in range(1, LENGTH):
        rows[:, position] = rows[:, position - 1] * VOCABULARY + RESPONSES[:, position - 1] + 1
    return rows


ROWS = prefix_rows()


@dataclass
class Outputs:
    """What the objective asks of a model whose logits are a table [prefixes, V]."""

    logits: Tensor

    @property
    def log_probs(self) -> Tensor:
        return self.log_probs_of(self.logits)

    @property
    def entropy(self) -> Tensor:
        log_probs = self.logits.log_softmax(-1)
        return -(log_probs.exp() * log_probs).sum(-1)[ROWS].flatten()

    def gather(self, ids: Tensor) -> Tensor:
        return self.logits.log_softmax(-1)[ROWS.flatten()].gather(1, ids)

    def top_ids(self, count: int) -> Tensor:
        return self.logits.detach().topk(count).indices[ROWS.flatten()]

    def log_probs_at(self, temperature: float) -> Tensor:
        return self.log_probs_of(self.logits.detach() / temperature)

    @staticmethod
    def log_probs_of(logits: Tensor) -> Tensor:
        """Return the log-prob of every token of every response, [N * L]."""
        return logits.log_softmax(-1)[ROWS, RESPONSES].flatten()


@dataclass
class World:
    """Student, teacher and reference over all prefixes, and what is sampled at a temperature."""

    temperature: float

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        prefixes = sum(VOCABULARY**position for position in range(LENGTH))
        tables = 2 * torch.randn(3, prefixes, VOCABULARY, generator=generator, dtype=torch.float64)
        self.student, self.teacher, self.reference = tables[0].clone().requires_grad_(), *tables[1:]
        self.target = self.student.detach().softmax(-1)  # p, [prefixes, V]
        self.sampler = (self.student.detach() / self.temperature).softmax(-1)  # q
        drawn = self.sampler[ROWS, RESPONSES].prod(1)  # [N]
        assert torch.isclose(drawn.sum(), torch.tensor(1.0, dtype=torch.float64))
        self.drawn = drawn.repeat_interleave(LENGTH)  # [N * L]
        self.visits = torch.zeros(prefixes, dtype=torch.float64).index_add(0, ROWS.flatten(), self.drawn)

    def batch(self) -> MicroBatch:
        """Return all responses, each token with the probability that its response is sampled as its mask."""
        count = RESPONSES.numel()
        return MicroBatch(
            sample_indices=tuple(range(len(RESPONSES))),
            input_ids=RESPONSES,
            attention_mask=torch.ones_like(RESPONSES),
            image_token_mask=torch.zeros_like(RESPONSES),
            pictures=(),
            picture_grids=None,
            picture_rows=(),
            response_positions=torch.arange(count),
            response_ids=RESPONSES.flatten(),
            sample_rows=torch.arange(len(RESPONSES)).repeat_interleave(LENGTH),
            loss_mask=self.drawn,
            finished=torch.ones(count, dtype=torch.bool),
            thinking=torch.zeros(count, dtype=torch.bool),
            advantages=torch.zeros(count, dtype=torch.float64),
            rollout_log_probs=self.sampler.log()[ROWS, RESPONSES].flatten(),
            teacher_log_probs=Outputs.log_probs_of(self.teacher),
            reference_log_probs=Outputs.log_probs_of(self.reference),
        )

    def learned(self, **parts: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the expected gradient [prefixes, V] and the expected metrics of the objective."""
        mean = GlobalMean(num_tokens=1, num_samples=1, over_tokens=True)
        signal = {"distillation": Distillation(coef=COEF, mean=mean)}
        objective = Objective(mean=mean, **{**signal, "rollout_temperature": self.temperature, **parts})
        loss, metrics = objective(Outputs(self.student), self.batch())
        return torch.autograd.grad(loss, self.student)[0], metrics

    def exact(self) -> Tensor:
        """Return the sum over visited prefixes of the reverse KL at temperature 1, differentiable."""
        log_probs = self.student.log_softmax(-1)
        return (self.visits * (log_probs.exp() * (log_probs - self.teacher.log_softmax(-1))).sum(-1)).sum()


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_corrected_gradient_is_that_of_the_reverse_kl_at_temperature_1(temperature: float) -> None:
    world = World(temperature)
    gradient, metrics = world.learned(tis_clip=(0.0, WIDE))
    (exact,) = torch.autograd.grad(COEF * world.exact(), world.student)
    torch.testing.assert_close(gradient, exact, rtol=0, atol=1e-10)
    assert metrics["opd_reverse_kl"].item() == pytest.approx(world.exact().item(), abs=1e-10)
    assert metrics["opd_kl_loss"].item() == pytest.approx(COEF * world.exact().item(), abs=1e-10)
    assert metrics["tis_weight_mean"].item() == pytest.approx(LENGTH, abs=1e-10)
    assert metrics["tis_clipfrac"].item() == 0
    assert metrics["train_rollout_logprob_abs_diff"].item() == pytest.approx(0, abs=1e-10)
    uncorrected, plain = world.learned()
    assert (uncorrected - exact).abs().max() > 1e-2
    assert abs(plain["opd_reverse_kl"].item() - world.exact().item()) > 1e-2


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(("low", "high"), [(0.0, 1.2), (0.4, 1.5)])
def test_truncation_biases_by_the_closed_form(temperature: float, low: float, high: float) -> None:
    world = World(temperature)
    gradient, metrics = world.learned(tis_clip=(low, high))
    (exact,) = torch.autograd.grad(COEF * world.exact(), world.student)
    p, q = world.target, world.sampler
    moved = (low * q - p).clamp(min=0) - (p - high * q).clamp(min=0)  # [prefixes, V]
    gap = (p.log() - world.teacher.log_softmax(-1)).detach()
    surrogate = (world.visits[:, None] * moved * gap * world.student.log_softmax(-1)).sum()
    (bias,) = torch.autograd.grad(COEF * surrogate, world.student)
    assert bias.abs().max() > 1e-3
    torch.testing.assert_close(gradient, exact + bias, rtol=0, atol=1e-10)
    shift = (world.visits[:, None] * moved * gap).sum()
    assert metrics["opd_reverse_kl"].item() == pytest.approx((world.exact() + shift).item(), abs=1e-10)
    outside = (world.visits[:, None] * q * ((p < low * q) | (p > high * q))).sum()
    assert metrics["tis_clipfrac"].item() == pytest.approx(outside.item(), abs=1e-10)
    mass = (world.visits[:, None] * (p + moved)).sum()
    assert metrics["tis_weight_mean"].item() == pytest.approx(mass.item(), abs=1e-10)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_above_temperature_1_weights_are_bounded_and_below_they_are_not(temperature: float) -> None:
    world = World(temperature)
    ratio, normaliser = world.target / world.sampler, (world.target ** (1 / temperature)).sum(-1)
    torch.testing.assert_close(ratio, normaliser[:, None] * world.target ** (1 - 1 / temperature))
    assert bool((ratio <= normaliser[:, None]).all()) == (temperature > 1)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_kl_to_the_start_is_that_at_temperature_1(estimator: Any) -> None:
    world = World(0.8)
    parts = {"distillation": None, "kl_loss_coef": 0.3, "kl_loss_type": estimator}
    _, metrics = world.learned(tis_clip=(0.0, WIDE), **parts)
    log_ratio = world.reference.log_softmax(-1) - world.target.log()
    values = {"k1": -log_ratio, "k2": log_ratio**2 / 2, "k3": log_ratio.exp() - 1 - log_ratio}
    exact = (world.visits[:, None] * world.target * values[estimator]).sum()
    assert metrics["kl_loss"].item() == pytest.approx(0.3 * exact.item(), abs=1e-10)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vision_model(tmp_path_factory.mktemp("model"), tied=False)


def with_engine_log_probs(model: Path, temperature: float) -> tuple[list[Sample], dict[str, bytes], Tensor]:
    """Return samples with what an engine at that temperature says, and their log-probs at 1 [P]."""
    samples, pictures = make_samples(8)
    args = make_args(model, *DISTILL, *ONE_BATCH)
    with joined(args) as backend, torch.no_grad():
        shard = build_shards(args, samples, pictures, 1, 0)[0]
        batch = MicroBatchBuilder(load_processor(model), pictures).build(shard.samples)
        (plain,) = backend.compute_log_probs([batch])
        tempered = backend._student(batch, lambda outputs: outputs.log_probs_at(temperature))
    lengths = [sample.response_length for sample in shard.samples]
    for sample, values in zip(shard.samples, tempered.split(lengths), strict=True):
        samples[sample.index].rollout_log_probs = values.tolist()
    return samples, pictures, torch.stack([plain, tempered])


def test_the_trainer_weighs_every_token_once(model: Path) -> None:
    samples, pictures, (plain, tempered) = with_engine_log_probs(model, 0.5)
    flags = (*DISTILL, *LINEAR_STEP, *ONE_BATCH, "--calculate-per-token-loss")
    args = make_args(model, *flags, "--rollout-temperature", "0.5", "--tis-clip", "1.5")
    with joined(args) as backend:
        shard = build_shards(args, samples, pictures, 1, 0)[0]
        metrics = Trainer(args, backend, load_processor(model)).train(0, shard)
    mask = torch.cat([sample.loss_mask for sample in shard.samples])
    weights = (plain - tempered).exp().clamp(max=1.5) * mask / mask.sum()
    teacher = torch.cat([s.teacher_log_probs for s in shard.samples if s.teacher_log_probs is not None])
    assert 0 < metrics["tis_clipfrac"] < 1
    assert metrics["tis_weight_mean"] == pytest.approx(weights.sum().item(), abs=1e-5)
    assert metrics["opd_reverse_kl"] == pytest.approx((weights * (plain - teacher)).sum().item(), abs=1e-5)
    assert metrics["train_rollout_logprob_abs_diff"] < 1e-5


def test_on_policy_samples_have_weight_1(model: Path) -> None:
    samples, pictures, _ = with_engine_log_probs(model, 1.0)
    flags = (*DISTILL, *LINEAR_STEP, *ONE_BATCH)
    plain = train(model, Job(flags, samples, pictures))
    weighted = train(model, Job((*flags, "--use-tis"), samples, pictures))
    assert weighted.metrics[0]["tis_weight_mean"] == pytest.approx(1, abs=1e-5)
    for name, weight in plain.weights.items():
        torch.testing.assert_close(weighted.weights[name], weight, rtol=0, atol=2e-6)
