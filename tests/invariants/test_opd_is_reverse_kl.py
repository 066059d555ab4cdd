"""The sampled signal is what it claims to be: its expected gradient is that of the reverse KL.

By full enumeration: every response over a small vocabulary and length, weighted by its exact probability; and
once by drawing.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from slime.losses.distillation import discounted_sums, distillation_advantages, reverse_kl
from slime.losses.policy import clipped_policy_loss

VOCABULARY, LENGTH, COEF = 5, 3, 0.7
RESPONSES = torch.tensor(list(itertools.product(range(VOCABULARY), repeat=LENGTH)))  # [V**L, L]
SAMPLE_ROWS = torch.arange(len(RESPONSES)).repeat_interleave(LENGTH)


def prefix_rows(responses: Tensor) -> Tensor:
    """Return, for each position of each response [N, L], the row of its prefix in a table of all prefixes."""
    rows = torch.zeros_like(responses)
    for position in range(1, LENGTH):
        rows[:, position] = rows[:, position - 1] * VOCABULARY + responses[:, position - 1] + 1
    return rows


def tables() -> tuple[Tensor, Tensor]:
    """Return logits of student and teacher for every prefix, [prefixes, V]."""
    generator = torch.Generator().manual_seed(0)
    prefixes = sum(VOCABULARY**position for position in range(LENGTH))
    student, teacher = torch.randn(2, prefixes, VOCABULARY, generator=generator, dtype=torch.float64)
    return student.clone().requires_grad_(), teacher


def chosen(logits: Tensor, responses: Tensor = RESPONSES) -> Tensor:
    """Return the log-prob of every token of every response, [N, L]."""
    return logits.log_softmax(-1)[prefix_rows(responses), responses]


def advantages(gap: Tensor, discount: float = 0.0) -> Tensor:
    """Return the teacher's advantages [N, L] of gaps [N, L]."""
    flat = gap.flatten()
    rows = torch.arange(len(gap)).repeat_interleave(LENGTH)
    made = distillation_advantages(
        flat, COEF, loss_mask=torch.ones_like(flat), sample_rows=rows, discount=discount
    )
    return made.view_as(gap)


def expected_gradient(student: Tensor, teacher: Tensor, discount: float) -> Tensor:
    """Return the policy gradient, averaged over all responses by their probability."""
    log_probs = chosen(student)
    probability = log_probs.detach().sum(dim=1).exp()  # [N]
    assert torch.isclose(probability.sum(), torch.tensor(1.0, dtype=torch.float64))
    made = advantages(reverse_kl(log_probs, chosen(teacher)), discount)
    loss = clipped_policy_loss(log_probs, log_probs.detach(), made, 0.2, 0.2).loss
    return torch.autograd.grad((probability[:, None] * loss).sum(), student)[0]


def kl_of_each_prefix(student: Tensor, teacher: Tensor) -> Tensor:
    return (student.softmax(-1) * (student.log_softmax(-1) - teacher.log_softmax(-1))).sum(-1)  # [prefixes]


def visits(student: Tensor) -> Tensor:
    """Return how often each prefix is met in a response, [prefixes]."""
    probability = chosen(student).sum(dim=1).exp().repeat_interleave(LENGTH)
    rows = prefix_rows(RESPONSES).flatten()
    return torch.zeros(len(student), dtype=torch.float64).index_add(0, rows, probability)


def test_the_expected_policy_gradient_is_that_of_the_sum_of_reverse_kls_with_prefixes_held() -> None:
    student, teacher = tables()
    held = COEF * (visits(student).detach() * kl_of_each_prefix(student, teacher)).sum()
    (exact,) = torch.autograd.grad(held, student)
    assert exact.abs().max() > 1e-2
    torch.testing.assert_close(expected_gradient(student, teacher, 0.0), exact, rtol=0, atol=1e-10)


def test_with_discount_1_it_is_that_of_the_reverse_kl_between_whole_responses() -> None:
    student, teacher = tables()
    log_probs = chosen(student).sum(dim=1)
    whole = COEF * (log_probs.exp() * (log_probs - chosen(teacher).sum(dim=1))).sum()
    (exact,) = torch.autograd.grad(whole, student)
    torch.testing.assert_close(expected_gradient(student, teacher, 1.0), exact, rtol=0, atol=1e-10)
    assert (exact - expected_gradient(student, teacher, 0.0)).abs().max() > 1e-2, "the future matters"


def test_what_is_sampled_is_unbiased() -> None:
    """The mean gradient over drawn responses is within three standard errors of the exact one."""
    student, teacher = tables()
    generator = torch.Generator().manual_seed(1)
    probability = chosen(student).detach().sum(dim=1).exp()
    drawn = torch.multinomial(probability, 20_000, replacement=True, generator=generator)
    log_probs = chosen(student).detach()
    made = advantages(log_probs - chosen(teacher))
    # at the prefixes of a response, the gradient of -A log p on the logits is A (p - onehot)
    probs, rows = student.detach().softmax(-1), prefix_rows(RESPONSES)
    pushes = made[:, :, None] * (probs[rows] - torch.nn.functional.one_hot(RESPONSES, VOCABULARY))
    gradients = torch.zeros(len(RESPONSES), len(student), VOCABULARY, dtype=torch.float64)
    gradients = gradients.scatter_add_(1, rows[:, :, None].expand_as(pushes), pushes).flatten(1)
    exact = expected_gradient(student, teacher, 0.0).flatten()
    torch.testing.assert_close((probability[:, None] * gradients).sum(dim=0), exact, rtol=0, atol=1e-10)
    directions = torch.randn(8, len(exact), dtype=torch.float64, generator=generator)
    for direction in (exact, *directions):
        seen = gradients[drawn] @ direction
        assert (seen.mean() - exact @ direction).abs() < 3 * seen.std() / len(drawn) ** 0.5


def test_with_the_teacher_as_student_nothing_is_learned_from_any_sample() -> None:
    student, _ = tables()
    log_probs = chosen(student)
    made = advantages(reverse_kl(log_probs, log_probs.detach()), 1.0)
    loss = clipped_policy_loss(log_probs, log_probs.detach(), made, 0.2, 0.2).loss
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    assert gradient.abs().max() == 0


@pytest.mark.parametrize("discount", [0.3, 0.9, 1.0])
def test_discounted_sums_are_those_of_a_loop(discount: float) -> None:
    lengths = [1, 7, 2, 13, 1]
    rows = torch.cat([torch.full((length,), row) for row, length in enumerate(lengths)])
    values = torch.randn(len(rows), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = values.clone()
    for position in range(len(rows) - 2, -1, -1):
        if rows[position] == rows[position + 1]:
            expected[position] += discount * expected[position + 1]
    torch.testing.assert_close(discounted_sums(values, rows, discount), expected)
    assert discounted_sums(values[:0], rows[:0], discount).shape == (0,)


def test_a_clip_cuts_each_tokens_own_term_and_masked_tokens_have_no_future() -> None:
    gap, rows = torch.tensor([5.0, -0.5, -9.0, 100.0]), torch.tensor([0, 0, 0, 1])
    mask = torch.tensor([1.0, 1.0, 0.0, 1.0])
    cut = distillation_advantages(gap, 2.0, loss_mask=mask, sample_rows=rows, clip=1.0)
    assert cut.tolist() == [-2, 1, 2, -2]
    ahead = distillation_advantages(gap, 1.0, loss_mask=mask, sample_rows=rows, clip=1.0, discount=0.5)
    assert ahead.tolist() == [-0.75, 0.5, 0, -1]
