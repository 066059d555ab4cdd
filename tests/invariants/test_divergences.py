"""The dense signals are the divergences that they claim to be: values, gradients, bounds, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slime.losses.divergence import (
    Divergence,
    bucketed_divergence,
    bucketed_entropy,
    without_never_sampled,
)

KINDS: tuple[Divergence, ...] = ("reverse_kl", "forward_kl", "jsd")
POSITIONS, VOCABULARY, BETA = 6, 9, 0.3


def models(seed: int = 0, vocabulary: int = VOCABULARY, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    """Return logits of the student, differentiable, and log-probs of the teacher, both [P, V]."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(2, POSITIONS, vocabulary, generator=generator, dtype=torch.float64)
    return logits[0].clone().requires_grad_(), logits[1].log_softmax(-1)


def top_k(log_probs: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids, log-probs [P, K] and tail mass [P] of a teacher."""
    values, ids = log_probs.topk(count)
    return ids, values, (1 - values.exp().sum(-1)).clamp(min=0)


def divergence(student: Tensor, teacher: Tensor, count: int, kind: Divergence) -> Tensor:
    ids, values, tail = top_k(teacher, count)
    return bucketed_divergence(student.log_softmax(-1).gather(1, ids), values, tail, kind, jsd_beta=BETA)


def plain(p: Tensor, q: Tensor, kind: Divergence) -> tuple[Tensor, Tensor]:
    """Return the divergence of distributions [P, B], and its derivative with respect to p."""
    m = BETA * q + (1 - BETA) * p
    match kind:
        case "reverse_kl":
            return (p * (p / q).log()).sum(-1), (p / q).log()
        case "forward_kl":
            return (q * (q / p).log()).sum(-1), -q / p
        case "jsd":
            value = BETA * (q * (q / m).log()).sum(-1) + (1 - BETA) * (p * (p / m).log()).sum(-1)
            return value, (1 - BETA) * (p / m).log()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 3, VOCABULARY - 1, VOCABULARY])
def test_value_and_gradient_are_the_analytic_ones(kind: Divergence, count: int) -> None:
    student, teacher = models()
    ids, values, tail = top_k(teacher, count)
    p = student.detach().softmax(-1)
    bucket = torch.full_like(ids.new_zeros(POSITIONS, VOCABULARY), count)  # which bucket a token is in
    bucket.scatter_(1, ids, torch.arange(count).expand_as(ids))
    q_buckets = torch.cat([values.exp(), tail[:, None]], dim=1)
    p_buckets = torch.zeros_like(q_buckets).scatter_add(1, bucket, p)
    whole = slice(None, count) if count == VOCABULARY else slice(None)  # nothing is left for a tail
    expected, slopes = plain(p_buckets[:, whole], q_buckets[:, whole], kind)
    mean_slope = (p_buckets[:, whole] * slopes).sum(-1, keepdim=True)
    gradient = p * (slopes.gather(1, bucket) - mean_slope)

    made = divergence(student, teacher, count, kind)
    (ours,) = torch.autograd.grad(made.sum(), student)
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(ours, gradient, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_with_the_whole_vocabulary_it_is_the_exact_divergence(kind: Divergence) -> None:
    student, teacher = models()
    exact, _ = plain(student.softmax(-1), teacher.exp(), kind)
    (expected,) = torch.autograd.grad(exact.sum(), student, retain_graph=True)
    made = divergence(student, teacher, VOCABULARY, kind)
    torch.testing.assert_close(made, exact, rtol=0, atol=1e-9)
    torch.testing.assert_close(torch.autograd.grad(made.sum(), student)[0], expected, rtol=0, atol=1e-9)


def test_the_ends_of_the_jsd_are_the_two_kls() -> None:
    student, teacher = models()
    ids, values, tail = top_k(teacher, 4)
    ours = student.detach().log_softmax(-1).gather(1, ids)
    ends: tuple[tuple[float, Divergence], ...] = ((1e-6, "forward_kl"), (1 - 1e-6, "reverse_kl"))
    for beta, kind in ends:
        jsd = bucketed_divergence(ours, values, tail, "jsd", jsd_beta=beta) / 1e-6
        torch.testing.assert_close(jsd, bucketed_divergence(ours, values, tail, kind), rtol=1e-4, atol=1e-4)


@given(seed=st.integers(0, 10_000), vocabulary=st.integers(2, 40), scale=st.floats(0.01, 2))
@settings(max_examples=100, deadline=None)
def test_more_buckets_never_say_less_and_none_is_negative(seed: int, vocabulary: int, scale: float) -> None:
    """The tail bucket makes each divergence a lower bound of the exact one, tighter with every token."""
    student, teacher = models(seed, vocabulary, scale)
    slack = 1e-8  # what is left of 16 digits after 1 - (1 - 1e-6)
    for kind in KINDS:
        exact, _ = plain(student.softmax(-1), teacher.exp(), kind)
        before = torch.zeros(POSITIONS, dtype=torch.float64)
        for count in range(1, vocabulary + 1):
            made = divergence(student, teacher, count, kind)
            assert (made >= -1e-12).all(), (kind, count)
            assert (made >= before - slack).all(), (kind, count)
            assert (made <= exact + slack).all(), (kind, count)
            before = made


@given(seed=st.integers(0, 10_000), vocabulary=st.integers(2, 40), scale=st.floats(0.01, 100))
@settings(max_examples=100, deadline=None)
def test_in_single_precision_none_is_negative_and_all_is_finite(
    seed: int, vocabulary: int, scale: float
) -> None:
    student, teacher = models(seed, vocabulary, scale)
    logits = student.detach().float().requires_grad_()
    for kind in KINDS:
        for count in range(1, vocabulary + 1):
            made = divergence(logits, teacher.float(), count, kind)
            (gradient,) = torch.autograd.grad(made.sum(), logits)
            assert (made >= -1e-5).all(), (kind, count)
            assert made.isfinite().all()
            assert gradient.isfinite().all()


def test_without_a_tail_bucket_the_sum_may_be_negative() -> None:
    """What others cut off at 0 (verl#7855): the student has less mass on the teacher's top-k."""
    student, teacher = torch.tensor([[0.0, 0.0, 5.0]]).log_softmax(-1), torch.tensor([[3.0, 3.0, 0.0]])
    ids, values, tail = top_k(teacher.log_softmax(-1), 2)
    ours = student.gather(1, ids)
    assert (ours.exp() * (ours - values)).sum() < 0
    assert bucketed_divergence(ours, values, tail, "reverse_kl").item() > 1


def test_equal_models_have_no_divergence_and_no_gradient() -> None:
    student, _ = models()
    for kind in KINDS:
        made = divergence(student, student.detach().log_softmax(-1), 3, kind)
        assert made.abs().max() < 1e-12
        assert torch.autograd.grad(made.sum(), student)[0].abs().max() < 1e-12


def test_a_teacher_is_asked_what_it_prefers_among_what_may_be_sampled() -> None:
    student, teacher = models()
    masked = 2
    ids, values, tail = top_k(teacher, VOCABULARY)
    given_allowed, tail = without_never_sampled(values, tail, ids == masked)
    allowed = torch.arange(VOCABULARY) != masked
    conditional = (teacher[:, allowed]).log_softmax(-1)
    logits = student.detach().masked_fill(~allowed, -1e5)
    ours = logits.log_softmax(-1).gather(1, ids)
    for kind in KINDS:
        expected, _ = plain(student.detach()[:, allowed].softmax(-1), conditional.exp(), kind)
        made = bucketed_divergence(ours, given_allowed, tail, kind, jsd_beta=BETA)
        torch.testing.assert_close(made, expected, rtol=0, atol=1e-8)
    assert without_never_sampled(values, tail, torch.zeros_like(ids, dtype=torch.bool))[0].equal(values)


def test_a_teacher_that_wants_only_what_is_never_sampled_gives_finite_numbers() -> None:
    values, ids = torch.tensor([[0.0, -1e5]]), torch.tensor([[7, 1]])
    allowed, tail = without_never_sampled(values, torch.zeros(1), ids == 7)
    ours = torch.tensor([[-1e5, -0.5]], requires_grad=True)
    for kind in KINDS:
        made = bucketed_divergence(ours, allowed, tail, kind)
        assert made.isfinite().all()
        assert torch.autograd.grad(made.sum(), ours)[0].isfinite().all()


def test_the_entropy_of_buckets_is_at_most_that_of_all_tokens() -> None:
    _, teacher = models()
    exact = -(teacher.exp() * teacher).sum(-1)
    before = torch.zeros(POSITIONS, dtype=torch.float64)
    for count in range(1, VOCABULARY + 1):
        _, values, tail = top_k(teacher, count)
        entropy = bucketed_entropy(values, tail)
        assert (before <= entropy + 1e-12).all()
        before = entropy
    torch.testing.assert_close(before, exact, rtol=0, atol=1e-9)


def test_shapes_and_names_are_checked() -> None:
    with pytest.raises(ValueError, match=r"student log-probs \(2, 3\), teacher log-probs \(2, 4\)"):
        bucketed_divergence(torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2), "jsd")
    with pytest.raises(ValueError, match="--opd-jsd-beta 1"):
        bucketed_divergence(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2), "jsd", jsd_beta=1.0)
    with pytest.raises(ValueError, match="--opd-divergence hellinger"):
        bucketed_divergence(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2), "hellinger")  # type: ignore[arg-type]
