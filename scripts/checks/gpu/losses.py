"""Losses are the same numbers on a GPU as on the CPU, and those of the formulas."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from scripts.checks.gpu.result import Row, within
from scripts.checks.gpu.setting import CPU, Setting
from slime.losses.divergence import Divergence, bucketed_divergence
from slime.losses.log_probs import chunked_log_probs
from slime.losses.policy import clipped_policy_loss

CHECK = "losses"
POSITIONS, WIDTH, VOCABULARY, TOP = 96, 64, 2048, 16
DIVERGENCES: tuple[Divergence, ...] = ("reverse_kl", "forward_kl", "jsd")
STUDENT, TEACHER = (0.5, 0.3, 0.2), (0.2, 0.2, 0.6)
"""Two tokens and the rest."""


def run(setting: Setting) -> Iterator[Row]:
    """Compare each divergence, the clipped policy loss, and log-probs and entropy with their gradients."""
    yield from (_closed_form(setting, divergence) for divergence in DIVERGENCES)
    expected, found = (_values(device) for device in (CPU, setting.device))
    what = f"{setting.name} against the CPU, float32, values and gradients, largest relative gap"
    for name, values in expected.items():
        yield within(CHECK, f"{name}: {what}", _gap(found[name], values), 1e-4)


def _closed_form(setting: Setting, divergence: Divergence) -> Row:
    """Hold a divergence of three buckets against its sum, written out."""
    student, teacher = (torch.tensor([side], device=setting.device) for side in (STUDENT, TEACHER))
    found = bucketed_divergence(
        student[:, :2].log(), student[:, 2].log(), teacher[:, :2].log(), teacher[:, 2], divergence
    ).item()
    mixture = [(p + q) / 2 for p, q in zip(STUDENT, TEACHER, strict=True)]
    expected = {
        "reverse_kl": _kl(STUDENT, TEACHER),
        "forward_kl": _kl(TEACHER, STUDENT),
        "jsd": (_kl(STUDENT, mixture) + _kl(TEACHER, mixture)) / 2,
    }[divergence]
    return within(
        CHECK, f"{divergence} of three buckets against the formula, gap in nats", abs(found - expected), 1e-6
    )


def _kl(first: tuple[float, ...], second: tuple[float, ...] | list[float]) -> float:
    return sum(p * math.log(p / q) for p, q in zip(first, second, strict=True))


def _values(device: torch.device) -> dict[str, tuple[Tensor, ...]]:
    """Return, by name, values and gradients of one random batch, on the CPU."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    hidden, head = draw(POSITIONS, WIDTH), draw(VOCABULARY, WIDTH) * WIDTH**-0.5
    teacher = draw(POSITIONS, VOCABULARY).mul(2).log_softmax(-1).topk(TOP)
    tail = 1 - teacher.values.double().exp().sum(1).float()
    advantages = draw(POSITIONS)
    drift = draw(POSITIONS) * 0.3
    values: dict[str, tuple[Tensor, ...]] = {}
    for name in (*DIVERGENCES, "policy loss", "entropy"):
        states, weight = (part.to(device).requires_grad_() for part in (hidden, head))
        made = chunked_log_probs(states, weight, teacher.indices.to(device), chunk_size=40, with_rest=True)
        if name == "policy loss":
            log_probs = made.log_probs[:, 0]
            old = log_probs.detach() + drift.to(device)
            loss = clipped_policy_loss(log_probs, old, advantages.to(device), 0.2, 0.2).loss
        elif name == "entropy":
            loss = made.entropy
        else:
            loss = bucketed_divergence(
                made.log_probs, made.log_rest, teacher.values.to(device), tail.to(device), name
            )
        loss.sum().backward()
        assert states.grad is not None
        assert weight.grad is not None
        values[name] = tuple(part.detach().cpu() for part in (loss, states.grad, weight.grad))
    return values


def _gap(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """Return the largest distance of two tensors, as a share of the expected one's norm."""
    return max(float((one - other).norm() / other.norm()) for one, other in zip(found, expected, strict=True))
