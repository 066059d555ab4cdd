"""The distillation signal is what it claims to be: its expected gradient is that of the reverse KL.

By full enumeration: every response over a small vocabulary and length, weighted by its exact probability.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from slime.losses.distillation import distillation_advantages, reverse_kl
from slime.losses.policy import clipped_policy_loss

VOCABULARY, LENGTH, COEF = 5, 3, 0.7
RESPONSES = torch.tensor(list(itertools.product(range(VOCABULARY), repeat=LENGTH)))  # [V**L, L]


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


def chosen(logits: Tensor) -> Tensor:
    """Return the log-prob of every token of every response, [N, L]."""
    return logits.log_softmax(-1)[prefix_rows(RESPONSES), RESPONSES]


def test_the_expected_policy_gradient_is_that_of_the_sum_of_reverse_kls_with_prefixes_held() -> None:
    student, teacher = tables()
    log_probs, teacher_log_probs = chosen(student), chosen(teacher)
    probability = log_probs.detach().sum(dim=1).exp()  # [N]
    assert torch.isclose(probability.sum(), torch.tensor(1.0, dtype=torch.float64))

    gap = reverse_kl(log_probs, teacher_log_probs)
    advantages = distillation_advantages(torch.zeros_like(gap), gap, COEF)
    loss = clipped_policy_loss(log_probs, log_probs.detach(), advantages, 0.2, 0.2).loss
    (policy_gradient,) = torch.autograd.grad((probability[:, None] * loss).sum(), student)

    exact = (student.softmax(-1) * (student.log_softmax(-1) - teacher.log_softmax(-1))).sum(-1)  # [prefixes]
    visits = torch.zeros_like(exact).index_add(
        0, prefix_rows(RESPONSES).flatten(), probability.repeat_interleave(LENGTH)
    )
    (kl_gradient,) = torch.autograd.grad(COEF * (visits.detach() * exact).sum(), student)
    assert kl_gradient.abs().max() > 1e-2
    torch.testing.assert_close(policy_gradient, kl_gradient, rtol=0, atol=1e-10)


def test_with_the_teacher_as_student_nothing_is_learned_from_any_sample() -> None:
    student, _ = tables()
    log_probs = chosen(student)
    gap = reverse_kl(log_probs, log_probs.detach())
    advantages = distillation_advantages(torch.zeros_like(gap), gap, COEF)
    loss = clipped_policy_loss(log_probs, log_probs.detach(), advantages, 0.2, 0.2).loss
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    assert gradient.abs().max() == 0


def test_the_task_stream_adds_its_own_gradient() -> None:
    """The gradient of both streams together is the sum of the gradients of each alone."""
    student, teacher = tables()
    task = torch.linspace(-1, 1, len(RESPONSES), dtype=torch.float64)[:, None].expand(-1, LENGTH)

    def gradient(task_weight: float, coef: float) -> Tensor:
        log_probs = chosen(student)
        gap = reverse_kl(log_probs, chosen(teacher))
        advantages = distillation_advantages(task_weight * task, gap, coef)
        loss = clipped_policy_loss(log_probs, log_probs.detach(), advantages, 0.2, 0.2).loss
        weight = log_probs.detach().sum(dim=1, keepdim=True).exp()
        return torch.autograd.grad((weight * loss).sum(), student)[0]

    torch.testing.assert_close(gradient(1, COEF), gradient(1, 0) + gradient(0, COEF), rtol=0, atol=1e-12)
