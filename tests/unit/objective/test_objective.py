"""The loss of one micro-batch: its terms, its metrics and what they mean."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from slime.backends.batching import MicroBatch
from slime.losses.reduction import GlobalMean
from slime.objective import Distillation, Objective
from slime.objective.ratios import finished, ratio


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


def top_k(**parts: Any) -> dict[str, Any]:
    """Return the teacher's two likeliest tokens at each of the three positions."""
    log_probs = torch.tensor([[0.6, 0.3], [0.5, 0.2], [0.9, 0.05]]).log()
    return {
        "teacher_top_ids": torch.tensor([[0, 1], [2, 3], [0, 4]]),
        "teacher_top_log_probs": log_probs,
        "teacher_tail_mass": 1 - log_probs.exp().sum(1),
        **parts,
    }


@dataclass
class Model(Outputs):
    """A model whose log-probs of five tokens are a table [P, 5]."""

    table: Tensor = field(default_factory=lambda: torch.zeros(3, 5, requires_grad=True))

    def gather(self, ids: Tensor) -> Tensor:
        return self.table.log_softmax(-1).gather(1, ids)

    def top_ids(self, count: int) -> Tensor:
        return torch.arange(count).expand(3, count)


def model() -> Model:
    made = outputs()
    return Model(made.log_probs, made.entropy)


def gradients(made: Model, given: MicroBatch, terms: Objective) -> tuple[Tensor, Tensor]:
    loss, _ = terms(made, given)
    loss = loss + 0 * made.table.sum()  # used by the dense stream alone
    first, second = torch.autograd.grad(loss, (made.log_probs, made.table))
    return first, second


@pytest.mark.parametrize("signal", ["sampled", "topk"])
@pytest.mark.parametrize("over_tokens", [True, False])
def test_the_hybrid_gradient_is_the_sum_of_its_streams(signal: Any, over_tokens: bool) -> None:
    """Each stream has its coefficient and its own denominators: 4 tokens of 3 samples, 2 of 1 distilled."""
    mean = GlobalMean(num_tokens=4, num_samples=3, over_tokens=over_tokens)
    distilled = GlobalMean(num_tokens=2, num_samples=1, over_tokens=over_tokens)
    advantages = torch.tensor([1.0, 1.0, -2.0])
    gate = torch.tensor([1.0, 0.0, 0.0])
    whole = batch(advantages=advantages, distill_mask=gate, **top_k())
    distillation = Distillation(coef=0.5, mean=distilled, loss=signal, divergence="jsd")
    both = gradients(model(), whole, Objective(mean=mean, distillation=distillation))
    task = gradients(model(), whole, Objective(mean=mean))
    alone = replace(whole, advantages=torch.zeros(3))
    teacher = gradients(model(), alone, Objective(mean=mean, distillation=distillation))
    for one, other, third in zip(both, task, teacher, strict=True):
        torch.testing.assert_close(one, other + third)
    doubled = gradients(model(), alone, Objective(mean=mean, distillation=replace(distillation, coef=1.0)))
    for one, other in zip(doubled, teacher, strict=True):
        torch.testing.assert_close(one, 2 * other)
    pulled = teacher[0 if signal == "sampled" else 1].abs()
    assert (pulled.reshape(3, -1).sum(1) > 0).tolist() == [True, False, False], "only what the gate lets in"
    if signal == "sampled":
        share = 1 / 2 if over_tokens else 1 / 1  # of the one token: 1 of 2 tokens, all of the 1 sample
        torch.testing.assert_close(teacher[0][0], torch.tensor(0.5 * 1.0 * share))


def test_a_gate_that_lets_nothing_in_leaves_the_task() -> None:
    mean = GlobalMean(num_tokens=4, num_samples=3, over_tokens=True)
    nothing = GlobalMean(num_tokens=0, num_samples=0, over_tokens=True)
    given = batch(advantages=torch.ones(3), distill_mask=torch.zeros(3))
    terms = Objective(mean=mean, distillation=Distillation(coef=1.0, mean=nothing))
    for one, other in zip(
        gradients(model(), given, terms), gradients(model(), given, Objective(mean=mean)), strict=True
    ):
        torch.testing.assert_close(one, other)
    metrics = metrics_of(terms, model(), given)
    assert metrics["adv/opd_share"] == 0
    assert metrics["opd_reverse_kl"] == pytest.approx(0.5 / 4), "the signal is looked at all the same"


def metrics_of(terms: Objective, made: Outputs, given: MicroBatch) -> dict[str, float]:
    return finished({name: value.item() for name, value in terms(made, given)[1].items()})


def test_the_share_of_the_teacher_is_that_of_the_gradient_on_the_logits() -> None:
    """Through explicit logits: the 1-norms of both streams' gradients, summed over positions."""
    logits = torch.tensor([[1.0, 0.0, -1.0], [0.0, 0.5, 0.0], [2.0, 0.0, 1.0]], requires_grad=True)
    ids = torch.tensor([[0], [1], [2]])
    log_probs = logits.log_softmax(-1).gather(1, ids)[:, 0]
    made = Outputs(log_probs, torch.full((3,), 0.5, requires_grad=True))
    given = batch(advantages=torch.tensor([1.0, 5.0, -1.0]))
    metrics = metrics_of(objective(), made, given)
    pulls = []
    for teacher in (True, False):
        gap = log_probs.detach() - given.teacher_log_probs if given.teacher_log_probs is not None else None
        assert gap is not None
        advantages = -0.5 * gap if teacher else given.advantages
        loss = -(log_probs * advantages * given.loss_mask / 4).sum()
        pulls.append(torch.autograd.grad(loss, logits, retain_graph=True)[0].abs().sum().item())
    assert metrics["adv/opd_share"] == pytest.approx(pulls[0] / sum(pulls))
    assert metrics_of(objective(distillation=None), made, given).keys().isdisjoint({"adv/opd_share"})


def test_the_dense_stream_without_top_k_is_an_error() -> None:
    terms = objective(distillation=Distillation(coef=1.0, mean=objective().mean, loss="topk"))
    with pytest.raises(ValueError, match="--opd-loss topk needs the teacher's top-k"):
        terms(model(), batch())


def test_imitation_is_the_negative_log_likelihood_and_nothing_else() -> None:
    made = model()
    loss, metrics = objective(loss_type="sft_loss", distillation=None)(made, batch(advantages=torch.ones(3)))
    assert loss.item() == pytest.approx((1 + 3) / 4) == metrics["sft_loss"].item()
    assert metrics["sft_forward_kl"].item() == pytest.approx(((-2 + 1) + (-2.5 + 3)) / 4)
    assert not any(name in metrics for name in ("pg_loss", "opd_kl_loss", "policy_kl"))


def test_the_anatomy_of_the_sampled_signal() -> None:
    """Token 1 is masked; sample 0 is finished and thinks with token 0, sample 1 is token 2, truncated."""
    metrics = metrics_of(objective(), outputs(), batch())
    expected = {
        "first_token_kl": (1.0 - 0.5) / 2,
        "thinking_kl": 1.0,
        "answer_kl": -0.5,
        "finished_kl": 1.0,
        "truncated_kl": -0.5,
        "teacher_prefers_share": 1 / 2,
    }
    for name, value in expected.items():
        assert metrics[f"signal/{name}"] == pytest.approx(value), name
    assert "signal/last_token_kl" not in metrics, "the only end of a response is masked"
    whole = metrics_of(objective(), outputs(), replace(batch(), loss_mask=torch.ones(3)))
    assert whole["signal/last_token_kl"] == pytest.approx(-2.0 + 9.0)


def test_the_anatomy_of_the_top_k() -> None:
    metrics = metrics_of(objective(), model(), batch(**top_k()))
    rows = [0, 2]  # the loss tokens
    teacher = top_k()["teacher_top_log_probs"][rows]
    tail = top_k()["teacher_tail_mass"][rows]
    entropy = -(teacher.exp() * teacher).sum(1) - tail * tail.log()
    expected = {
        "student_top_k_mass": 2 / 5,
        "teacher_top_k_mass": (0.9 + 0.95) / 2,
        "teacher_tail_mass": (0.1 + 0.05) / 2,
        "teacher_entropy": entropy.mean().item(),
        "top_k_overlap": (2 / 2 + 1 / 2) / 2,
    }
    for name, value in expected.items():
        assert metrics[f"signal/{name}"] == pytest.approx(value, abs=1e-5), name


def test_ratios_are_taken_of_whole_sums() -> None:
    parts = [ratio("x", torch.tensor(a), torch.tensor(b)) for a, b in ((1.0, 2.0), (5.0, 1.0))]
    sums = {name: sum(part[name].item() for part in parts) for name in parts[0]}
    empty = dict.fromkeys(ratio("y", torch.zeros(()), torch.zeros(())), 0.0)
    assert finished(sums | empty | {"loss": 3.0}) == {"loss": 3.0, "x": 2.0}
