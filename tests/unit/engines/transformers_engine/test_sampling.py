"""Vectorised sampling: the right distribution, row by row its own parameters, repeatable by seed."""

import pytest
import torch

from slime.engines.transformers_engine.sampling import Penalties, SamplingBatch, sample, uniform

VOCAB = 11


def batch(rows: int, **changes) -> SamplingBatch:
    fields = {
        "seeds": torch.arange(rows),
        "steps": torch.zeros(rows, dtype=torch.int64),
        "temperature": torch.ones(rows),
        "greedy": torch.zeros(rows, dtype=torch.bool),
        "all_greedy": False,
        "filters": None,
        "bias": None,
        "penalties": None,
        "forbidden": None,
    }
    return SamplingBatch(**(fields | changes))


def logits(rows: int) -> torch.Tensor:
    return torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(0)).expand(rows, -1).clone()


def filters(rows: int, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0):
    return torch.full((rows,), top_k), torch.full((rows,), top_p), torch.full((rows,), min_p)


def shares(tokens: torch.Tensor) -> torch.Tensor:
    return torch.bincount(tokens, minlength=VOCAB) / len(tokens)


def test_uniform_is_flat_and_depends_on_seed_and_step_alone():
    seeds, steps = torch.arange(20_000) * 7 - 5_000, torch.arange(20_000) % 50
    values = uniform(seeds, steps)
    assert values.min() >= 0
    assert values.max() < 1
    assert torch.histc(values.float(), 10, 0, 1) / len(values) == pytest.approx(
        torch.full((10,), 0.1), abs=0.01
    )
    assert torch.equal(values[100:200], uniform(seeds[100:200], steps[100:200]))
    neighbours = torch.stack([uniform(seeds, steps), uniform(seeds, steps + 1)])
    assert abs(torch.corrcoef(neighbours)[0, 1]) < 0.03


def test_samples_follow_the_softmax():
    rows = 40_000
    tokens, log_probs = sample(logits(rows), batch(rows))
    expected = logits(1)[0].softmax(-1)
    assert shares(tokens) == pytest.approx(expected, abs=0.01)
    assert log_probs[0].exp() == pytest.approx(expected, abs=1e-6)


def test_temperature_enters_tokens_and_log_probs():
    rows = 40_000
    tokens, log_probs = sample(logits(rows), batch(rows, temperature=torch.full((rows,), 0.5)))
    expected = (logits(1)[0] * 2).softmax(-1)
    assert shares(tokens) == pytest.approx(expected, abs=0.01)
    assert log_probs[7].exp() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"), [(3, 1.0, 0.0), (0, 0.6, 0.0), (0, 1.0, 0.4), (4, 0.5, 0.2)]
)
def test_filters_keep_what_they_should(top_k, top_p, min_p):
    rows = 20_000
    probs = logits(1)[0].softmax(-1)
    order = probs.argsort(descending=True)
    kept, mass = [], 0.0
    for rank, token in enumerate(order.tolist()):
        if (top_k and rank >= top_k) or mass > top_p or probs[token] < min_p * probs[order[0]]:
            break
        kept.append(token)
        mass += float(probs[token])
    tokens, log_probs = sample(logits(rows), batch(rows, filters=filters(rows, top_k, top_p, min_p)))
    assert set(tokens.tolist()) == set(kept)
    assert shares(tokens)[kept] == pytest.approx(probs[kept] / probs[kept].sum(), abs=0.02)
    assert log_probs[0].exp() == pytest.approx(probs, abs=1e-6)  # unfiltered


def test_greedy_rows_take_the_best_beside_sampling_ones():
    rows = 64
    greedy = torch.arange(rows) % 2 == 0
    tokens, _ = sample(logits(rows), batch(rows, greedy=greedy))
    best = int(logits(1).argmax())
    assert set(tokens[greedy].tolist()) == {best}
    assert len(set(tokens[~greedy].tolist())) > 1


def test_bias_and_forbidden_tokens_belong_to_their_rows():
    rows = 3
    bias = (torch.tensor([1]), torch.tensor([4]), torch.tensor([100.0]))
    forbidden = (torch.tensor([2, 2]), torch.tensor([0, 1]), torch.tensor([5, 5]))
    tokens, log_probs = sample(logits(rows), batch(rows, bias=bias, forbidden=forbidden))
    assert tokens[1] == 4
    assert log_probs[2, :2].tolist() == [float("-inf")] * 2
    assert torch.isfinite(log_probs[0]).all()
    later = batch(rows, forbidden=forbidden, steps=torch.full((rows,), 5))
    assert torch.isfinite(sample(logits(rows), later)[1]).all()


def test_penalties_count_what_was_sampled():
    penalties = Penalties(
        rows=torch.tensor([1]),
        history=torch.tensor([[3, 3, 5, 0]]),
        lengths=torch.tensor([3]),
        frequency=torch.tensor([0.5]),
        presence=torch.tensor([0.25]),
        repetition=torch.tensor([2.0]),
    )
    _, log_probs = sample(logits(2), batch(2, penalties=penalties))
    expected = logits(1)[0].clone()
    expected[3] -= 2 * 0.5 + 0.25
    expected[5] -= 0.5 + 0.25
    for token in (3, 5):
        expected[token] = expected[token] * 2 if expected[token] < 0 else expected[token] / 2
    assert log_probs[1] == pytest.approx(expected.log_softmax(-1), abs=1e-6)
    assert log_probs[0] == pytest.approx(logits(1)[0].log_softmax(-1), abs=1e-6)


def test_a_row_does_not_depend_on_the_others():
    rows = 50
    values = torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(1))
    together, _ = sample(values.clone(), batch(rows))
    for row in range(rows):
        one = batch(1, seeds=torch.tensor([row]))
        assert int(sample(values[row : row + 1].clone(), one)[0]) == int(together[row])
