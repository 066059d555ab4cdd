"""A slice of the vocabulary answers as the whole one does; told what will be asked, in one pass over the LM
head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("megatron.core")

from slime.backends.base import ExpectingInputs
from slime.backends.fsdp import outputs as of_fsdp
from slime.backends.megatron.outputs import ResponseOutputs, VocabularyShare
from slime.backends.outputs import OnePassOutputs

P, H, V, FILLED, CHUNK = 3, 6, 29, 32, 2
CHUNKS = 2
MASKED = 5
IDS = torch.tensor([[3, 1, 2, 9], [4, 6, 8, 10], [28, 0, 1, 7]])
SAMPLED = torch.tensor([3, 0, 7])


class Alone:
    """A process group of one."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


def leaves() -> tuple[Tensor, Tensor]:
    """Return hidden states and a head with rows of filling, larger than any token's."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(P, H, generator=generator, dtype=torch.float64, requires_grad=True)
    head = torch.randn(FILLED, H, generator=generator, dtype=torch.float64)
    head[V:] *= 100
    return hidden, head.requires_grad_()


def outputs(hidden: Tensor, head: Tensor) -> ResponseOutputs:
    group: Any = Alone()
    share = VocabularyShare.of(V, FILLED, [MASKED], group, torch.device("cpu"))
    return ResponseOutputs(hidden, head, SAMPLED, torch.arange(P), CHUNK, share, group)


def asked(of: OnePassOutputs, hidden: Tensor, head: Tensor) -> list[Tensor]:
    """Ask everything; return the answers and the gradients."""
    chosen, rest = of.gather_with_rest(IDS)
    loss = (of.log_probs**2).sum() + (chosen * rest[:, None]).sum() + 0.1 * of.entropy.sum()
    gradients = torch.autograd.grad(loss, (hidden, head))
    return [of.log_probs, of.entropy, chosen, rest, of.gather(IDS), of.top_ids(2), of.log_probs_at(0.7)] + [
        gradient[:V] for gradient in gradients
    ]


@pytest.mark.parametrize("told", [True, False])
def test_what_is_expected_takes_one_pass_and_changes_no_answer(
    monkeypatch: pytest.MonkeyPatch, told: bool
) -> None:
    hidden, head = leaves()
    whole = of_fsdp.ResponseOutputs(hidden, head[:V], SAMPLED, CHUNK, torch.tensor([MASKED]))
    expected = asked(whole, hidden, head)
    passes, original = [], VocabularyShare.logits

    def logits(share: VocabularyShare, rows: Tensor, head: Tensor) -> Tensor:
        passes.append(len(rows))
        return original(share, rows, head)

    monkeypatch.setattr(VocabularyShare, "logits", logits)
    of = outputs(hidden, head)
    assert isinstance(of, ExpectingInputs)
    if told:
        of.expect(IDS, top=2)
    answers = asked(of, hidden, head)
    for answer, right in zip(answers, expected, strict=True):
        torch.testing.assert_close(answer, right, rtol=0, atol=1e-12)
    # Told: forward, backward, and another temperature. Else a pass for each question that is not of the
    # sampled tokens alone, and the backward pass of two.
    assert len(passes) == (3 if told else 7) * CHUNKS


def test_the_likeliest_of_a_small_vocabulary_are_its_tokens() -> None:
    hidden, head = leaves()
    of = outputs(hidden, head)
    assert of.top_ids(1000).sort(dim=1).values.tolist() == [list(range(V))] * P
    assert of.top_ids(V - 1).max() < V


def test_without_responses_there_is_nothing_to_say() -> None:
    hidden, head = leaves()
    group: Any = Alone()
    share = VocabularyShare.of(V, FILLED, [MASKED], group, torch.device("cpu"))
    none = torch.zeros(0, dtype=torch.int64)
    of = ResponseOutputs(hidden[:0], head, none, none, CHUNK, share, group)
    ids = IDS[:0]
    of.expect(ids, top=2)
    chosen, rest = of.gather_with_rest(ids)
    assert (chosen.shape, rest.shape, of.top_ids(2).shape) == ((0, 4), (0,), (0, 2))
    (gradient,) = torch.autograd.grad(of.log_probs.sum() + chosen.sum(), head)
    assert gradient.abs().max() == 0
