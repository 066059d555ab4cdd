"""Keys and values of the running rows: dense, one row per request, grown as needed; no paging, no sharing.

The two adapters are what transformers' attention layers call `update` on.
"""

import torch
from torch import Tensor

ROW_STEP, LENGTH_STEP = 16, 64
"""The cache grows to multiples of these."""


class KVCache:
    """Per layer `[rows, kv_heads, length, head_dim]`; rows 0..B-1 run, in the batch's order."""

    def __init__(self, layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device):
        self._heads, self._dim = kv_heads, head_dim
        self._options = {"dtype": dtype, "device": device}
        self._layers = layers
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.rows = 0
        self.length = 0

    def clear(self) -> None:
        """Drop all rows and the memory."""
        self.keys, self.values, self.rows, self.length = [], [], 0, 0

    def reserve(self, rows: int, length: int) -> None:
        """Make room for `rows` rows of `length` tokens, keeping what is there; never shrinks."""
        if rows <= self.rows and length <= self.length:
            return
        new_rows = max(_round_up(rows, ROW_STEP), self.rows)
        new_length = max(_round_up(length, LENGTH_STEP), self.length)
        for tensors in (self.keys, self.values):
            for layer in range(self._layers):
                grown = torch.zeros(new_rows, self._heads, new_length, self._dim, **self._options)
                if layer < len(tensors):
                    grown[: self.rows, :, : self.length] = tensors[layer]
                    # Replaced layer by layer: old and new never stand side by side as a whole.
                    tensors[layer] = grown
                else:
                    tensors.append(grown)
        self.rows, self.length = new_rows, new_length

    def write(self, first_row: int, keys: list[Tensor], values: list[Tensor], sources: Tensor) -> None:
        """Store a prefill: row `first_row + i` gets row `sources[i]` of `[U, kv_heads, T, head_dim]`."""
        count, length = len(sources), keys[0].shape[2]
        for target, source in zip((*self.keys, *self.values), (*keys, *values), strict=True):
            target[first_row : first_row + count, :, :length] = source[sources]

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy rows `source` over rows `target`."""
        for tensor in (*self.keys, *self.values):
            tensor[target] = tensor[source]


def _round_up(count: int, step: int) -> int:
    return -(-count // step) * step


class PrefillKV:
    """Records the keys and values of a forward over whole prompts."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Take a layer's new states; attention sees just them."""
        assert layer_idx == len(self.keys), (layer_idx, len(self.keys))
        self.keys.append(key)
        self.values.append(value)
        return key, value


class DecodeKV:
    """Appends one token to each running row and hands attention the rows' whole past."""

    def __init__(self, cache: KVCache, places: Tensor, longest: int):
        self._cache = cache
        self._rows = torch.arange(len(places), device=places.device)
        self._places = places
        self._longest = longest

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Store `[B, kv_heads, 1, head_dim]` at each row's place; return views of the rows' whole past."""
        past = []
        for tensor, new in ((self._cache.keys[layer_idx], key), (self._cache.values[layer_idx], value)):
            tensor[self._rows, :, self._places] = new[:, :, 0]
            past.append(tensor[: len(self._rows), :, : self._longest])
        return past[0], past[1]
