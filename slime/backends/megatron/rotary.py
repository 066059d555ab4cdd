"""Interleaved multimodal rotary positions (mRoPE) of Qwen3-VL, which in a text are plain counts.

Shape letters: T tokens of a row, H heads, D values of a head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

TIME, HEIGHT, WIDTH = range(3)


def mrope_positions(
    image_tokens: Tensor, lengths: Sequence[int], grids: Sequence[Sequence[int]], merge_size: int
) -> Tensor:
    """Return the positions int64 [3, T] of time, height and width; each sample counts from 0.

    Text counts on in all three. A picture stands still in time and counts its rows and columns; the text
    after it goes on behind its longer side.

    Args:
        image_tokens: bool [T], the tokens of pictures.
        lengths: tokens of each sample, T together.
        grids: time, height and width of each picture in patches, in the order of the row.
        merge_size: patches of a side that become one token.
    """
    positions = torch.empty((3, image_tokens.shape[0]), dtype=torch.int64)
    pictures, start = iter(grids), 0
    for length in lengths:
        place, end, count = start, start + length, 0
        for picture in (image_tokens[start:end].nonzero()[:, 0] + start).tolist():
            if picture < place:  # inside of a picture that has been counted
                continue
            positions[:, place:picture] = torch.arange(count, count + picture - place)
            count += picture - place
            frames, height, width = next(pictures)
            rows, columns = height // merge_size, width // merge_size
            place = picture + frames * rows * columns
            positions[:, picture:place] = (
                count
                + torch.cartesian_prod(torch.arange(frames), torch.arange(rows), torch.arange(columns)).T
            )
            count += max(rows, columns)
        positions[:, place:end] = torch.arange(count, count + end - place)
        start = end
    return positions


class InterleavedRotary(nn.Module):
    """Rotations of queries and keys from positions in three dimensions.

    Every third frequency, up to three times a section's size, belongs to height and every third to width; the
    others are time's. Where all three positions are equal, it is the ordinary rotary embedding.
    """

    def __init__(self, head_dim: int, base: float, section: Sequence[int] | None) -> None:
        """Take the values of a head, the base of the frequencies, and how many of them each dimension has;
        None: text alone."""
        super().__init__()
        self._base, self._head_dim = base, head_dim
        self._section = None if section is None else tuple(section)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the cosines and sines [2, T, 1, 1, D] of positions [3, T]; the angles are float32."""
        steps = torch.arange(0, self._head_dim, 2, dtype=torch.float32, device=positions.device)
        frequencies = 1.0 / self._base ** (steps / self._head_dim)
        angles = positions[..., None].float() * frequencies  # [3, T, D / 2]
        mixed = angles[TIME].clone()
        if self._section is not None:
            for dimension in (HEIGHT, WIDTH):
                own = slice(dimension, 3 * self._section[dimension], 3)
                mixed[:, own] = angles[dimension, :, own]
        both = torch.cat((mixed, mixed), dim=-1)[:, None, None, :]
        return torch.stack((both.cos(), both.sin())).to(dtype)


def rotate(states: Tensor, rotation: Tensor) -> Tensor:
    """Return queries or keys [T, 1, H, D] turned by `rotation` [2, T, 1, 1, D]."""
    cosines, sines = rotation
    first, second = states.chunk(2, dim=-1)
    return states * cosines + torch.cat((-second, first), dim=-1) * sines
