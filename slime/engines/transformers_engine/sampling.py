"""Tokens out of logits for a whole batch at once, every row by its own parameters and its own seed.

A row's randomness is a hash of (its seed, number of tokens so far): it depends on nothing else in the batch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

UNIFORM_BITS = 40
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64


@dataclass
class SamplingBatch:
    """Parameters of B rows, on the model's device; optional parts are None where no row needs them."""

    seeds: Tensor
    """int64 `[B]`."""
    steps: Tensor
    """int64 `[B]`: tokens generated so far."""
    temperature: Tensor
    """float32 `[B]`."""
    greedy: Tensor
    """bool `[B]`."""
    all_greedy: bool
    filters: tuple[Tensor, Tensor, Tensor] | None
    """top_k (int64, 0: all), top_p, min_p (float32), each `[B]`."""
    bias: tuple[Tensor, Tensor, Tensor] | None
    """Rows, token ids and values to add, each `[N]`."""
    penalties: "Penalties | None"
    forbidden: tuple[Tensor, Tensor, Tensor] | None
    """Rows, token ids, and the number of tokens before which each must not come, each `[N]`."""


@dataclass
class Penalties:
    """What was sampled so far in the rows that penalise it."""

    rows: Tensor
    """int64 `[N]`."""
    history: Tensor
    """int64 `[N, S]`: output ids."""
    lengths: Tensor
    """int64 `[N]`: how many of the S are valid."""
    frequency: Tensor
    presence: Tensor
    repetition: Tensor


def uniform(seeds: Tensor, steps: Tensor) -> Tensor:
    """Return float64 `[B]` in [0, 1): the splitmix64 hash of each (seed, step)."""
    state = _mix(seeds + _GOLDEN) + (steps + 1) * _GOLDEN
    bits = _shift_right(_mix(state), 64 - UNIFORM_BITS)
    return bits.double() / 2**UNIFORM_BITS


def _mix(state: Tensor) -> Tensor:
    state = (state ^ _shift_right(state, 30)) * _MIX_1
    state = (state ^ _shift_right(state, 27)) * _MIX_2
    return state ^ _shift_right(state, 31)


def _shift_right(state: Tensor, bits: int) -> Tensor:
    """Shift int64 as if unsigned."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)


@torch.inference_mode()
def sample(logits: Tensor, batch: SamplingBatch) -> tuple[Tensor, Tensor]:
    """Return tokens `[B]` and log-probs `[B, V]` of float32 `logits` `[B, V]`, which are changed in place.

    The log-probs are those after bias and penalties and divided by the temperature, before top-k, top-p and
    min-p.
    """
    if batch.penalties is not None:
        _penalise(logits, batch.penalties)
    if batch.forbidden is not None:
        rows, ids, until = batch.forbidden
        early = batch.steps[rows] < until
        logits[rows[early], ids[early]] = float("-inf")
    if batch.bias is not None:
        rows, ids, values = batch.bias
        logits.index_put_((rows, ids), values, accumulate=True)
    log_probs = logits.div_(batch.temperature[:, None]).log_softmax(-1)
    best = log_probs.argmax(-1)
    if batch.all_greedy:
        return best, log_probs
    probs = log_probs.exp()
    if batch.filters is not None:
        probs = _filter(probs, *batch.filters)
    cumulative = probs.cumsum(-1, dtype=torch.float64)
    target = uniform(batch.seeds, batch.steps)[:, None] * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, target, right=True)[:, 0].clamp_(max=logits.shape[1] - 1)
    return torch.where(batch.greedy, best, drawn), log_probs


def _penalise(logits: Tensor, penalties: Penalties) -> None:
    rows = penalties.rows
    valid = torch.arange(penalties.history.shape[1], device=rows.device) < penalties.lengths[:, None]
    counts = torch.zeros(len(rows), logits.shape[1], device=logits.device)
    counts.scatter_add_(1, penalties.history * valid, valid.float())
    seen = counts > 0
    chosen = logits[rows] - counts * penalties.frequency[:, None] - seen * penalties.presence[:, None]
    scale = penalties.repetition[:, None]
    logits[rows] = torch.where(seen, torch.where(chosen < 0, chosen * scale, chosen / scale), chosen)


def _filter(probs: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Zero what top-k, top-p and min-p leave out, all three on the unfiltered distribution."""
    ordered, ids = probs.sort(dim=-1, descending=True)
    ranks = torch.arange(probs.shape[1], device=probs.device)
    dropped = (ranks >= top_k[:, None]) & (top_k[:, None] > 0)
    dropped |= ordered.cumsum(-1) - ordered > top_p[:, None]
    dropped |= ordered < ordered[:, :1] * min_p[:, None]
    return torch.zeros_like(probs).scatter_(1, ids, ordered.masked_fill(dropped, 0))
