"""Packed attention against SDPA over one sample at a time, forward and backward, in bfloat16.

Both are held against the same sums in float32: that says how much of a gap is bfloat16's own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scripts.checks.gpu.result import Row, measured, skipped, within
from scripts.checks.gpu.setting import Setting
from slime.backends import attention
from slime.backends.attention import borders, packed_attention

CHECK = "packed attention"
HEADS, KV_HEADS, DIM = 32, 8, 128
"""Qwen3-VL-4B's."""
LENGTHS = (7, 1, 513, 64, 2048, 33, 300, 1377)
TINY_LENGTHS = (7, 1, 33, 12)
LIMIT = 0.02
"""Of the norm. A bfloat16 number is off by up to 0.004 of itself."""
MIN_CAPABILITY = (8, 0)
"""What torch's flash attention needs."""
REPEATS = 10

States = tuple[Tensor, Tensor, Tensor]


def run(setting: Setting) -> Iterator[Row]:
    """Compare outputs and gradients, look that the kernel ran and that samples are apart, and time both."""
    if setting.on_gpu and torch.cuda.get_device_capability(setting.device) < MIN_CAPABILITY:
        major, minor = torch.cuda.get_device_capability(setting.device)
        yield skipped(CHECK, "all", f"flash attention needs capability 8.0; this GPU has {major}.{minor}")
        return
    lengths = TINY_LENGTHS if setting.tiny else LENGTHS
    exact = _with_gradients(_one_at_a_time(lengths), _draw(lengths, setting.device, torch.float32))
    plain = _with_gradients(_one_at_a_time(lengths), _draw(lengths, setting.device, torch.bfloat16))
    with counted_flash_calls() as calls:
        packed = _with_gradients(_packed(lengths), _draw(lengths, setting.device, torch.bfloat16))
    names = ("output", "gradient of queries", "gradient of keys", "gradient of values")
    for name, found, other, reference in zip(names, packed, plain, exact, strict=True):
        what = (
            f"{name}, bfloat16, {len(lengths)} samples of {min(lengths)} to {max(lengths)} tokens, {HEADS} "
            f"heads on {KV_HEADS}: gap to SDPA in float32, as a share of the norm "
            f"(SDPA in bfloat16: {_gap(other, reference):.2g})"
        )
        yield within(CHECK, what, _gap(found, reference), LIMIT)
    yield _leak(setting, lengths)
    if setting.on_gpu:
        yield within(CHECK, "calls that did not reach torch's flash attention", 1 - len(calls), 0)
        yield _speed(setting, lengths)
    else:
        what = "torch's flash attention ran"
        yield skipped(CHECK, what, "its kernel is a GPU's; here SDPA ran in its place")


@contextmanager
def counted_flash_calls() -> Iterator[list[int]]:
    """Give a list that gets an entry with each call of torch's flash attention by ours."""
    calls: list[int] = []
    kernel = attention.varlen_attn

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return kernel(*args, **kwargs)

    attention.varlen_attn = counting
    try:
        yield calls
    finally:
        attention.varlen_attn = kernel


def _draw(lengths: Sequence[int], device: torch.device, dtype: torch.dtype) -> States:
    """Return queries, keys and values [1, heads, T, D], laid out in memory as a layer has them, [1, T, heads,
    D]; in both precisions the same numbers, which bfloat16 can hold."""
    generator = torch.Generator().manual_seed(0)
    states = []
    for heads in (HEADS, KV_HEADS, KV_HEADS):
        drawn = torch.randn(1, sum(lengths), heads, DIM, generator=generator).bfloat16()
        states.append(drawn.to(device, dtype).transpose(1, 2).requires_grad_())
    query, key, value = states
    return query, key, value


def _layer() -> nn.Module:
    module: Any = nn.Module()
    module.num_key_value_groups = HEADS // KV_HEADS
    return module


def _packed(lengths: Sequence[int]) -> Callable[[States], Tensor]:
    def attend(states: States) -> Tensor:
        return packed_attention(
            _layer(), *states, None, scaling=DIM**-0.5, **borders(lengths, states[0].device)
        )[0]

    return attend


def _one_at_a_time(lengths: Sequence[int]) -> Callable[[States], Tensor]:
    def attend(states: States) -> Tensor:
        parts = []
        for query, key, value in zip(*(state.split(list(lengths), dim=2) for state in states), strict=True):
            key, value = (part.repeat_interleave(HEADS // KV_HEADS, dim=1) for part in (key, value))
            parts.append(F.scaled_dot_product_attention(query, key, value, is_causal=True))
        return torch.cat(parts, dim=2).transpose(1, 2)

    return attend


def _with_gradients(attend: Callable[[States], Tensor], states: States) -> list[Tensor]:
    """Return the output [1, T, H, D] and the gradients of a fixed weighted sum of it, in float32."""
    output = attend(states)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    output.backward(weights.to(output.device, output.dtype))
    gradients = [state.grad for state in states]
    return [part.detach().float() for part in (output, *gradients) if part is not None]


def _gap(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def _leak(setting: Setting, lengths: Sequence[int]) -> Row:
    """Change one sample, and look for a change in the others."""
    states = _draw(lengths, setting.device, torch.bfloat16)
    begin = sum(lengths[:2])
    own = slice(begin, begin + lengths[2])
    with torch.no_grad():
        before = _packed(lengths)(states)
        for state in states:
            state[:, :, own] += 1
        after = _packed(lengths)(states)
    change = (after - before).abs().amax(dim=(0, 2, 3))
    assert change[own].max() > 0, "the change has to be seen in the sample itself"
    change[own] = 0
    what = "one sample changed: largest change in the others"
    return within(CHECK, what, float(change.max()), 0)


def _speed(setting: Setting, lengths: Sequence[int]) -> Row:
    """Time forward and backward of both."""
    milliseconds = []
    for attend in (_packed(lengths), _one_at_a_time(lengths)):
        states = _draw(lengths, setting.device, torch.bfloat16)
        times = []
        for _ in range(REPEATS):
            torch.cuda.synchronize(setting.device)
            start = time.perf_counter()
            output = attend(states)
            output.backward(torch.ones_like(output))
            torch.cuda.synchronize(setting.device)
            times.append(1e3 * (time.perf_counter() - start))
        milliseconds.append(sorted(times)[REPEATS // 2])
    what = f"forward and backward over {sum(lengths):,} tokens, packed and SDPA one sample at a time"
    return measured(CHECK, what, "{:.2f} and {:.2f} ms".format(*milliseconds))
