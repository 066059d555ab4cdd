"""Pictures as PIL and PNG: a remembered encoding stays with its pixels; limits hold."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from slime.utils import pictures
from slime.utils.pictures import (
    BadImageError,
    attach_png,
    decode_image,
    encode_png,
    open_image,
    png_of,
    to_rgb,
)


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


MADE_FROM: dict[str, Callable[[Image.Image], Image.Image]] = {
    "copy": lambda image: image.copy(),
    "rotate": lambda image: image.rotate(90),
    "crop": lambda image: image.crop((0, 0, 8, 8)),
    "resize": lambda image: image.resize((16, 16)),
    "convert": lambda image: image.convert("L"),
    "transpose": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "pickle": lambda image: pickle.loads(pickle.dumps(image)),
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("make", MADE_FROM.values(), ids=MADE_FROM.keys())
def test_the_remembered_png_does_not_follow_into_other_pictures(
    make: Callable[[Image.Image], Image.Image],
) -> None:
    image = noise(32, 32)
    png = encode_png(image)
    attach_png(image, png, "hash")
    assert png_of(image) == png
    assert image.info["sha256"] == "hash"
    other = make(image)
    assert png_of(other) is None
    assert "sha256" not in other.info


def test_modes_without_a_range_are_refused() -> None:
    for mode in ("I", "F"):
        with pytest.raises(BadImageError, match="8 bits"):
            to_rgb(Image.new(mode, (8, 8)))


def test_file_over_the_size_limit_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    data = encode_png(noise(64, 64))
    (tmp_path / "a.png").write_bytes(data)
    monkeypatch.setattr(pictures, "MAX_IMAGE_BYTES", 1000)
    with pytest.raises(BadImageError, match="at most 1000 are read"):
        decode_image(data)
    with pytest.raises(BadImageError, match="at most 1000 are read"):
        open_image(tmp_path / "a.png")
