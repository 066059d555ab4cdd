"""Chunked log-probs against plain autograd through all logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slime.losses.log_probs import chunked_log_probs, chunked_top_ids

P, H, V, K = 13, 6, 29, 3


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(P, H, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    head = torch.randn(V, H, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, head, torch.randint(0, V, (P, K), generator=generator)


def plain(hidden: Tensor, head: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    log_probs = (hidden @ head.T).log_softmax(-1)
    return log_probs.gather(1, ids), -(log_probs.exp() * log_probs).sum(-1)


@pytest.mark.parametrize("chunk_size", [1, 4, 13, 100])
def test_values_and_gradients_are_those_of_the_full_softmax(chunk_size: int) -> None:
    hidden, head, ids = inputs()
    weights, entropy_weights = torch.randn(P, K, dtype=torch.float64), torch.randn(P, dtype=torch.float64)
    results = []
    for log_probs, entropy in (
        chunked_log_probs(hidden, head, ids, chunk_size)[:2],
        plain(hidden, head, ids),
    ):
        loss = (log_probs * weights).sum() + (entropy * entropy_weights).sum()
        results.append((log_probs, entropy, *torch.autograd.grad(loss, (hidden, head))))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("output", [0, 1])
def test_each_output_alone_has_its_gradient(output: int) -> None:
    hidden, head, ids = inputs()
    ours = torch.autograd.grad(chunked_log_probs(hidden, head, ids, 5)[output].sum(), (hidden, head))
    expected = torch.autograd.grad(plain(hidden, head, ids)[output].sum(), (hidden, head))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


def test_the_same_id_twice_at_one_position_counts_twice() -> None:
    hidden, head, _ = inputs()
    ids = torch.full((P, 2), 4)
    ours = torch.autograd.grad(chunked_log_probs(hidden, head, ids, 5)[0].sum(), hidden)
    expected = torch.autograd.grad(2 * plain(hidden, head, ids[:, :1])[0].sum(), hidden)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


def test_no_positions_give_zero_gradients_not_none() -> None:
    """A dummy micro-batch must take part in the reduction of the head's gradient over ranks."""
    head = torch.randn(V, H, requires_grad=True)
    hidden = torch.zeros(0, H, requires_grad=True)
    log_probs, entropy, *_ = chunked_log_probs(hidden, head, torch.zeros(0, 1, dtype=torch.int64))
    assert log_probs.shape == (0, 1)
    assert entropy.shape == (0,)
    log_probs.sum().backward()
    assert head.grad is not None
    assert head.grad.abs().sum() == 0
    assert hidden.grad is not None


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, head, ids = inputs()
    head = head.detach()
    (ours,) = torch.autograd.grad(chunked_log_probs(hidden, head, ids, 5)[0].sum(), hidden)
    (expected,) = torch.autograd.grad(plain(hidden, head, ids)[0].sum(), hidden)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


def test_half_precision_is_normalised_in_float32() -> None:
    hidden, head, ids = inputs(torch.bfloat16)
    log_probs, entropy, *_ = chunked_log_probs(hidden, head, ids, 4)
    assert log_probs.dtype == entropy.dtype == torch.float32
    logits = (hidden @ head.T).float()
    torch.testing.assert_close(log_probs, logits.log_softmax(-1).gather(1, ids), rtol=0, atol=1e-5)
    log_probs.sum().backward()
    assert head.grad is not None
    assert head.grad.dtype == torch.bfloat16


def test_large_logits_stay_finite() -> None:
    hidden = torch.full((2, 1), 1e4, requires_grad=True)
    head = torch.linspace(-1, 1, V)[:, None].requires_grad_()
    log_probs, entropy, *_ = chunked_log_probs(hidden, head, torch.tensor([[V - 1], [0]]), 8)
    assert log_probs[:, 0].tolist() == [0.0, -2e4]
    assert entropy.abs().max() < 1e-2
    (log_probs.sum() + entropy.sum()).backward()
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()


@pytest.mark.parametrize(
    ("hidden", "head", "ids", "chunk", "message"),
    [
        ((2, 3), (5, 4), (2, 1), 8, r"\(2, 3\) and LM head \(5, 4\)"),
        ((2, 3), (5, 3), (3, 1), 8, r"\(3, 1\) given for 2 positions"),
        ((2, 3), (5, 3), (2,), 8, r"\(2,\) given for 2 positions"),
        ((2, 3), (5, 3), (2, 1), 0, "--logprob-chunk-size 0"),
    ],
)
def test_wrong_shapes_are_named(
    hidden: tuple[int, ...], head: tuple[int, ...], ids: tuple[int, ...], chunk: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        chunked_log_probs(torch.zeros(hidden), torch.zeros(head), torch.zeros(ids, dtype=torch.int64), chunk)


def test_masked_tokens_are_out_of_the_distribution_and_of_every_gradient() -> None:
    hidden, head, ids = inputs()
    masked = torch.tensor([3, V - 1])
    ids = ids.where(~torch.isin(ids, masked), 5)
    keep = torch.tensor([token for token in range(V) if token not in masked.tolist()])
    inner = torch.searchsorted(keep, ids)  # the same tokens, counted among those that are left
    ours = chunked_log_probs(hidden, head, ids, 5, masked)
    expected = plain(hidden, head[keep], inner)
    for output, wanted in zip(ours[:2], expected, strict=True):
        torch.testing.assert_close(output, wanted, rtol=0, atol=1e-12)
    gradients = torch.autograd.grad(ours[0].sum() + ours[1].sum(), (hidden, head))
    wanted = torch.autograd.grad(expected[0].sum() + expected[1].sum(), (hidden, head))
    torch.testing.assert_close(gradients, wanted, rtol=0, atol=1e-12)
    assert gradients[1][masked].abs().sum() == 0


def test_a_masked_token_has_a_finite_log_prob_without_gradient() -> None:
    hidden, head, _ = inputs()
    log_probs, *_ = chunked_log_probs(hidden, head, torch.full((P, 1), 3), 5, torch.tensor([3]))
    assert log_probs.isfinite().all()
    assert (log_probs < -9e4).all()
    gradient = torch.autograd.grad(log_probs.sum(), head)[0]
    assert gradient[3].abs().sum() == 0


def test_what_is_left_beside_the_chosen_tokens_and_its_gradient() -> None:
    hidden, head, _ = inputs()
    masked = torch.tensor([3, V - 1])
    ids = torch.tensor([[0, 5], [7, 1], [2, 0]])[torch.arange(P) % 3]
    ours = chunked_log_probs(hidden, head, ids, 5, masked, with_rest=True)
    logits = (hidden @ head.T).index_fill(1, masked, -1e5)
    rest = logits.scatter(1, ids, -torch.inf).logsumexp(1) - logits.logsumexp(1)
    torch.testing.assert_close(ours.log_rest, rest)
    weights = torch.linspace(-1, 2, P, dtype=rest.dtype)
    mixed = (ours.log_rest * weights).sum() + (ours.log_probs**2).sum() + ours.entropy.sum()
    plain_log_probs = logits.log_softmax(-1)
    entropy = -(plain_log_probs.exp() * plain_log_probs).sum(1)
    wanted = (rest * weights).sum() + (plain_log_probs.gather(1, ids) ** 2).sum() + entropy.sum()
    expected = torch.autograd.grad(wanted, (hidden, head))
    for gradient, other in zip(torch.autograd.grad(mixed, (hidden, head)), expected, strict=True):
        torch.testing.assert_close(gradient, other)


def test_nothing_is_left_beside_the_whole_vocabulary() -> None:
    hidden, head, _ = inputs()
    made = chunked_log_probs(hidden, head, torch.arange(V).expand(P, V), 5, with_rest=True)
    assert (made.log_rest < -1e4).all()
    gradient, _ = torch.autograd.grad((made.log_rest.exp() * 3).sum(), (hidden, head))
    assert gradient.abs().max() == 0


def test_one_pass_gives_what_several_give() -> None:
    """The sampled token, which may be among the chosen, beside them; the rest leaves only the chosen out."""
    hidden, head, _ = inputs()
    masked = torch.tensor([3, V - 1])
    sampled = torch.arange(P)[:, None] % 9 + 5
    chosen = torch.tensor([[0, 5], [7, 1], [2, 0]])[torch.arange(P) % 3]
    assert (chosen == sampled).any()
    both = torch.cat([sampled, chosen], dim=1)
    fused = chunked_log_probs(hidden, head, both, 5, masked, with_rest=True, rest_from=1, top=4)
    alone = chunked_log_probs(hidden, head, sampled, 5, masked)
    beside = chunked_log_probs(hidden, head, chosen, 5, masked, with_rest=True)
    torch.testing.assert_close(fused.log_probs, torch.cat([alone.log_probs, beside.log_probs], dim=1))
    torch.testing.assert_close((fused.entropy, fused.log_rest), (alone.entropy, beside.log_rest))
    assert torch.equal(fused.top_ids, chunked_top_ids(hidden, head, 4, 5, masked))
    assert torch.equal(fused.top_ids, (hidden @ head.T).index_fill(1, masked, -1e5).topk(4, dim=1).indices)
    assert not fused.top_ids.requires_grad
    weights = torch.linspace(-1, 2, P, dtype=hidden.dtype)

    def loss(log_probs: Tensor, entropy: Tensor, rest: Tensor) -> Tensor:
        return (log_probs**2).sum() + (entropy * weights).sum() + (rest * weights).exp().sum()

    ours = torch.autograd.grad(loss(fused.log_probs, fused.entropy, fused.log_rest), (hidden, head))
    apart = torch.cat([alone.log_probs, beside.log_probs], dim=1)
    expected = torch.autograd.grad(loss(apart, alone.entropy, beside.log_rest), (hidden, head))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
