"""Pictures as PIL and PNG: a remembered encoding stays with its pixels; limits hold."""

from __future__ import annotations

import copy
import gc
import hashlib
import pickle
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from slime.utils import pictures
from slime.utils.pictures import (
    BadImageError,
    EncodedPicture,
    decode_image,
    encode_png,
    encoded_picture,
    is_at_hand,
    open_encoded,
    open_image,
    picture_uri,
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


class Encodings:
    """Counts how often a picture is encoded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0

        def counting(image: Image.Image) -> bytes:
            self.count += 1
            return encode_png(image)

        monkeypatch.setattr(pictures, "encode_png", counting)


@pytest.fixture
def encodings(monkeypatch: pytest.MonkeyPatch) -> Encodings:
    return Encodings(monkeypatch)


def prepared(image: Image.Image) -> EncodedPicture:
    png = encode_png(image)
    return EncodedPicture(hashlib.sha256(png).hexdigest(), png)


def pixels_sent(image: Image.Image) -> np.ndarray:
    """Return the pixels of the URI that an engine would get."""
    return np.asarray(open_image(picture_uri(image)))


@pytest.mark.parametrize("make", MADE_FROM.values(), ids=MADE_FROM.keys())
@pytest.mark.parametrize("form", ["bare", "prepared"])
def test_an_encoding_does_not_follow_into_other_pictures(
    make: Callable[[Image.Image], Image.Image], form: str
) -> None:
    bare = noise(32, 32)
    image = bare if form == "bare" else open_encoded(prepared(bare))
    assert np.array_equal(pixels_sent(image), np.asarray(bare))
    other = make(image)
    assert not is_at_hand(other)
    assert np.array_equal(pixels_sent(other), np.asarray(other.convert("RGB")))
    assert image.info == {}


def test_a_prepared_picture_is_sent_as_it_is(encodings: Encodings) -> None:
    encoded = prepared(noise(32, 32))
    image = open_encoded(encoded)
    assert is_at_hand(image)
    assert picture_uri(image) is picture_uri(open_encoded(encoded)) is encoded.data_uri
    assert encodings.count == 0
    image.load()
    assert not is_at_hand(image)
    assert picture_uri(image) is encoded.data_uri, "its pixels were read and not changed"
    assert encodings.count == 0


def test_a_bare_picture_is_encoded_once(encodings: Encodings) -> None:
    image = noise(32, 32)
    with ThreadPoolExecutor(4) as pool:
        uris = list(pool.map(picture_uri, [image] * 8))
    assert len(set(uris)) == 1
    assert encodings.count == 1
    assert image.info == {}


def draw(image: Image.Image) -> None:
    ImageDraw.Draw(image).line((0, 0, 31, 31), fill=(1, 2, 3))


def shrink(image: Image.Image) -> None:
    image.thumbnail((16, 16))


def put_pixel(image: Image.Image) -> None:
    access = image.load()
    assert access is not None
    access[3, 3] = (9, 9, 9)


@pytest.mark.parametrize("change", [draw, shrink, put_pixel])
@pytest.mark.parametrize("form", ["bare", "prepared"])
def test_what_was_drawn_on_is_encoded_anew(
    encodings: Encodings, change: Callable[[Image.Image], None], form: str
) -> None:
    image = noise(32, 32) if form == "bare" else open_encoded(prepared(noise(32, 32)))
    before, encoded = pixels_sent(image), encodings.count
    change(image)
    after = pixels_sent(image)
    assert np.array_equal(after, np.asarray(image))
    assert before.shape != after.shape or not np.array_equal(before, after)
    picture_uri(image)
    assert encodings.count == encoded + 1


def test_another_palette_is_another_picture() -> None:
    image = noise(32, 32).quantize(8)
    before = pixels_sent(image)
    image.putpalette([255 - value for value in image.getpalette() or []])
    assert not np.array_equal(before, pixels_sent(image))
    image.info["transparency"] = 0
    assert (pixels_sent(image) == 255).all(-1).sum() >= 32


def test_nothing_is_remembered_of_pictures_that_are_gone() -> None:
    """Looks at this picture's own entry: pictures of earlier tests may be collected meanwhile."""
    image = noise(32, 32)
    key = id(image)
    encoded_picture(image)
    memory = weakref.ref(pictures._memories[key])
    del image
    gc.collect()
    assert memory() is None
    assert key not in pictures._memories


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
