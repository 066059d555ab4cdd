"""However many questions a loss asks, the LM head runs once forward and once backward for them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from slime.backends.base import ExpectingInputs
from slime.backends.fsdp.outputs import ResponseOutputs
from slime.losses import log_probs
from slime.losses.reduction import GlobalMean
from slime.objective import Distillation, Objective
from tests.unit.objective.test_objective import batch

P, H, V, K, CHUNK = 3, 6, 29, 4, 2
CHUNKS = 2


class Head:
    """Counts the chunks of logits that are computed."""

    chunks = 0


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> Head:
    counted, original = Head(), log_probs._logits

    def logits(*arguments: Any) -> Tensor:
        counted.chunks += 1
        return original(*arguments)

    monkeypatch.setattr(log_probs, "_logits", logits)
    return counted


def model() -> tuple[ResponseOutputs, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(P, H, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(V, H, generator=generator, dtype=torch.float64, requires_grad=True)
    return ResponseOutputs(hidden, weight, torch.tensor([3, 0, 7]), CHUNK, torch.tensor([5])), hidden, weight


IDS = torch.tensor([[3, 1, 2, 9], [4, 6, 8, 10], [28, 0, 1, 7]])


def test_expected_questions_share_a_pass_and_its_backward(head: Head) -> None:
    results = []
    for told in (True, False):
        outputs, hidden, weight = model()
        assert isinstance(outputs, ExpectingInputs)
        if told:
            outputs.expect(IDS, top=2)
        head.chunks = 0
        chosen, rest = outputs.gather_with_rest(IDS)
        loss = (outputs.log_probs**2).sum() + (chosen * rest[:, None]).sum() + 0.1 * outputs.entropy.sum()
        top = outputs.top_ids(2)
        assert torch.equal(outputs.gather(IDS), chosen)
        assert head.chunks == (CHUNKS if told else 4 * CHUNKS)
        head.chunks = 0
        results.append((loss, *torch.autograd.grad(loss, (hidden, weight)), top))
        assert head.chunks == (CHUNKS if told else 2 * CHUNKS)
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


def test_another_question_than_expected_is_answered_too() -> None:
    told, _, _ = model()
    plain, _, _ = model()
    told.expect(IDS, top=2)
    other = IDS + torch.tensor([0, 1, 0, 1])
    other[2, 1] = 11
    torch.testing.assert_close(told.gather_with_rest(other), plain.gather_with_rest(other))
    torch.testing.assert_close(told.gather(other), plain.gather(other))
    assert torch.equal(told.top_ids(3), plain.top_ids(3))
    assert not torch.equal(told.gather(other), told.gather(IDS))


def test_a_metric_that_asks_first_takes_no_gradient_away() -> None:
    outputs, hidden, _ = model()
    outputs.expect(IDS, top=2)
    with torch.no_grad():
        chosen, rest = outputs.gather_with_rest(IDS)
    assert not chosen.requires_grad
    assert not rest.requires_grad
    (gradient,) = torch.autograd.grad(outputs.log_probs.sum(), hidden)
    assert gradient.abs().max() > 0
    assert outputs.gather(IDS).requires_grad


def test_an_expectation_that_comes_too_late_is_an_error() -> None:
    outputs, _, _ = model()
    _ = outputs.entropy
    with pytest.raises(RuntimeError, match="after the first question"):
        outputs.expect(IDS, top=2)


@pytest.mark.parametrize("loss", ["sampled", "topk"])
def test_an_objective_with_the_teachers_top_k_runs_the_head_once(head: Head, loss: Any) -> None:
    """Log-probs, entropy, the divergence, what its signal looks like, and the overlap of the likeliest."""
    outputs, hidden, _ = model()
    teacher = torch.tensor([[0.4, 0.3, 0.1, 0.1]] * P, dtype=torch.float64)
    given = replace(
        batch(),
        loss_mask=torch.ones(P, dtype=torch.float64),
        teacher_log_probs=torch.full((P,), -1.0, dtype=torch.float64),
        teacher_top_ids=IDS,
        teacher_top_log_probs=teacher.log(),
        teacher_tail_mass=1 - teacher.sum(1),
    )
    mean = GlobalMean(num_tokens=3, num_samples=2, over_tokens=True)
    objective = Objective(
        mean=mean, distillation=Distillation(coef=1.0, mean=mean, loss=loss), entropy_coef=0.1
    )
    value, metrics = objective(outputs, given)
    assert metrics["signal/top_k_overlap:lower"] == 3
    assert head.chunks == CHUNKS
    value.backward()
    assert head.chunks == 2 * CHUNKS
    assert hidden.grad is not None
    assert hidden.grad.abs().max() > 0
