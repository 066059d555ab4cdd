"""The loss of one micro-batch: its terms, its metrics and what they mean."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from slime.backends.batching import MicroBatch
from slime.losses.reduction import GlobalMean
from slime.objective import Distillation, Objective


@dataclass
class Outputs:
    """Log-probs and entropy as leaves."""

    log_probs: Tensor
    entropy: Tensor

    def gather(self, ids: Tensor) -> Tensor:
        raise NotImplementedError

    def top_ids(self, count: int) -> Tensor:
        raise NotImplementedError

    def log_probs_at(self, temperature: float) -> Tensor:
        """Return something that shows which temperature was asked for."""
        return self.log_probs.detach() * temperature


def outputs() -> Outputs:
    return Outputs(
        torch.tensor([-1.0, -2.0, -3.0], requires_grad=True), torch.full((3,), 0.5, requires_grad=True)
    )


def batch(**parts: Any) -> MicroBatch:
    """Two samples: tokens 0 and 1, and token 2; token 1 is masked."""
    flat = torch.tensor([0, 0, 1])
    return MicroBatch(
        sample_indices=(0, 1),
        input_ids=torch.zeros(2, 3, dtype=torch.int64),
        attention_mask=torch.ones(2, 3),
        image_token_mask=torch.zeros(2, 3),
        pictures=(),
        picture_grids=None,
        picture_rows=(),
        response_positions=torch.arange(3),
        response_ids=torch.zeros(3, dtype=torch.int64),
        sample_rows=flat,
        loss_mask=torch.tensor([1.0, 0.0, 1.0]),
        finished=torch.tensor([True, True, False]),
        thinking=torch.tensor([True, False, False]),
        **{"advantages": torch.zeros(3), "teacher_log_probs": torch.tensor([-2.0, -9.0, -2.5]), **parts},
    )


def objective(*, over_tokens: bool = True, **parts: Any) -> Objective:
    mean = GlobalMean(num_tokens=4, num_samples=3, over_tokens=over_tokens)
    return Objective(**{"mean": mean, "distillation": Distillation(coef=0.5, mean=mean), **parts})


def test_distillation_alone() -> None:
    given = outputs()
    loss, metrics = objective()(given, batch())
    gap = (-1 + 2) + (-3 + 2.5)
    assert metrics["opd_reverse_kl"].item() == pytest.approx(gap / 4)
    assert metrics["opd_kl_loss"].item() == pytest.approx(0.5 * gap / 4)
    assert loss.item() == pytest.approx(metrics["opd_kl_loss"].item()), "no task reward: the term is the loss"
    loss.backward()
    assert given.log_probs.grad is not None
    torch.testing.assert_close(given.log_probs.grad, torch.tensor([0.5 * 1, 0, 0.5 * -0.5]) / 4)


def test_the_terms_add_up_to_the_loss() -> None:
    terms = objective(entropy_coef=0.1, kl_loss_coef=0.2, kl_loss_type="k2", over_tokens=False)
    given = batch(
        advantages=torch.tensor([1.0, 1.0, -1.0]), reference_log_probs=torch.tensor([-1.5, -1.5, -1.5])
    )
    loss, metrics = terms(outputs(), given)
    parts = torch.stack(
        [metrics[name] for name in ("pg_loss", "opd_kl_loss", "entropy_loss", "kl_loss")]
    ).sum()
    assert loss.item() == pytest.approx(parts.item())
    assert metrics["entropy"].item() == pytest.approx(2 * 0.5 / 4)
    assert metrics["entropy_loss"].item() == pytest.approx(-0.1 * 2 * 0.5 / 3)
    assert metrics["kl_loss"].item() == pytest.approx(0.2 * (0.5**2 / 2 + 1.5**2 / 2) / 3)
    assert metrics["pg_loss"].item() == pytest.approx(0, abs=1e-6), "the two samples' advantages cancel"
    assert not any(value.requires_grad for value in metrics.values())


def test_later_steps_use_the_old_log_probs() -> None:
    """The advantage is that of the policy that sampled; the ratio moves, and is clipped."""
    given = batch(
        old_log_probs=torch.tensor([-2.0, 0.0, -3.0]), teacher_log_probs=torch.tensor([-1.0, 0.0, -3.0])
    )
    loss, metrics = objective()(outputs(), given)
    assert metrics["opd_reverse_kl"].item() == pytest.approx(-1 / 4)
    assert metrics["opd_clipfrac"].item() == pytest.approx(1 / 4)
    assert metrics["pg_clipfrac"].item() == 0
    assert loss.item() == pytest.approx(-1.2 * 0.5 / 4)
    assert metrics["opd_kl_loss"].item() == pytest.approx(loss.item())
    assert metrics["policy_kl"].item() == pytest.approx((-2.0 + 1.0) / 4)


def test_the_gap_to_the_engine_is_over_loss_tokens() -> None:
    _, metrics = objective()(outputs(), batch(rollout_log_probs=torch.tensor([-1.1, 50.0, -2.7])))
    assert metrics["train_rollout_logprob_abs_diff"].item() == pytest.approx((0.1 + 0.3) / 4)


def test_beside_temperature_1_the_gap_to_the_engine_is_at_the_engines_temperature() -> None:
    given = batch(rollout_log_probs=torch.tensor([-0.6, 50.0, -1.4]))
    terms = objective(rollout_temperature=0.5)
    _, metrics = terms(outputs(), given)
    assert metrics["train_rollout_logprob_abs_diff"].item() == pytest.approx((0.1 + 0.1) / 4)
    moved = replace(given, old_log_probs=torch.zeros(3))
    assert "train_rollout_logprob_abs_diff" not in terms(outputs(), moved)[1], "not known any more"


def test_importance_weights_enter_all_that_is_measured_on_sampled_tokens() -> None:
    log_ratio = torch.tensor([-0.5, 7.0, 3.0])
    given = batch(
        advantages=torch.tensor([1.0, 1.0, -1.0]),
        reference_log_probs=torch.tensor([-1.5, -1.5, -1.5]),
        rollout_log_probs=torch.tensor([-1.0, -2.0, -3.0]) - log_ratio,
    )
    weights = torch.tensor([math.exp(-0.5), 0.0, 2.0]) / 4
    parts = {"entropy_coef": 0.1, "kl_loss_coef": 0.2, "kl_loss_type": "k2"}
    made = outputs()
    loss, metrics = objective(tis_clip=(0.0, 2.0), **parts)(made, given)
    gap = torch.tensor([1.0, 0.0, -0.5])
    reference_gap = torch.tensor([0.5, 0.0, -1.5])
    advantages = torch.tensor([1.0, 0.0, -1.0])
    expected = {
        "opd_reverse_kl": (weights * gap).sum(),
        "opd_kl_loss": 0.5 * (weights * gap).sum(),
        "advantages": (weights * advantages).sum(),
        "pg_loss": -(weights * advantages).sum(),
        "kl_loss": 0.2 * (weights * reference_gap**2 / 2).sum(),
        "entropy_loss": torch.tensor(-0.1 * 2 * 0.5 / 4),
        "entropy": torch.tensor(2 * 0.5 / 4),
        "tis_weight_mean": weights.sum(),
        "tis_clipfrac": torch.tensor(1 / 4),
    }
    torch.testing.assert_close({name: metrics[name] for name in expected}, expected)
    loss.backward()
    assert made.log_probs.grad is not None
    torch.testing.assert_close(
        made.log_probs.grad,
        weights * (0.2 * reference_gap - advantages + 0.5 * gap),
        msg="weights carry no gradient",
    )


def test_importance_weights_without_the_engines_log_probs_are_an_error() -> None:
    with pytest.raises(ValueError, match="does not carry"):
        objective(tis_clip=(0.0, 2.0))(outputs(), batch())


def test_without_teacher_there_is_no_distillation_metric() -> None:
    _, metrics = objective(distillation=None)(outputs(), batch(teacher_log_probs=None))
    assert not any(name.startswith("opd") for name in metrics)


def test_a_dummy_has_the_same_metrics_and_no_weight() -> None:
    empty = torch.zeros(0)
    names = ("loss_mask", "advantages", "teacher_log_probs")
    kinds = dict.fromkeys(("finished", "thinking"), empty.bool())
    dummy = replace(batch(), sample_rows=empty.long(), **dict.fromkeys(names, empty), **kinds)
    given = Outputs(torch.zeros(0, requires_grad=True), torch.zeros(0, requires_grad=True))
    for over_tokens in (True, False):
        loss, metrics = objective(over_tokens=over_tokens)(given, dummy)
        assert loss.item() == 0
        assert loss.requires_grad
        assert metrics.keys() == objective()(outputs(), batch())[1].keys()
        assert all(value.item() == 0 for value in metrics.values())


def test_log_probs_that_a_term_needs_must_be_there() -> None:
    with pytest.raises(ValueError, match="does not carry"):
        objective()(outputs(), batch(teacher_log_probs=None))
