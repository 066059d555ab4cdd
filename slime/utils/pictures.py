"""Pictures as PIL, bytes and PNG: safe decoding, one RGB form, one encoding.

The lowest layer of it: no data set, no URL, no model. `slime.data.images` fetches and resizes.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

MAX_IMAGE_BYTES = 64 * 2**20
"""Largest encoded picture that is opened."""
MAX_IMAGE_PIXELS = 64 * 2**20
"""Largest picture that is decoded; beyond it a small file can fill the memory (a decompression bomb)."""
PNG_COMPRESSION = 3
"""zlib level: two thirds of the time of the default 6, for 5 to 12 % more bytes on line drawings."""

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
DECODE_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError, struct.error,
    zlib.error, Image.DecompressionBombError,
)  # fmt: skip
"""What PIL's readers raise on a broken file; UnidentifiedImageError is an OSError."""

_DATA_URI = re.compile(r"data:image/[\w.+-]+;base64,", re.ASCII)


class BadImageError(ValueError):
    """A picture cannot be read or used. The message says why, not where it came from."""


def open_image(source: Image.Image | bytes | str | Path | dict[str, Any]) -> Image.Image:
    """Open a picture from memory or from a local file. URLs are not fetched here.

    Raises:
        BadImageError: unreadable, of a format that is not taken, or too large.
    """
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, dict):
        inner = source.get("bytes") if source.get("bytes") is not None else source.get("path")
        if inner is None:
            raise BadImageError("the picture has neither bytes nor a path.")
        return open_image(inner)
    if isinstance(source, bytes | bytearray | memoryview):
        return decode_image(bytes(source))
    if isinstance(source, str) and source.startswith("data:"):
        return decode_image(data_uri_bytes(source))
    if isinstance(source, str | Path):
        return decode_image(_read_file(Path(source)))
    raise BadImageError(
        f"a picture cannot be a {type(source).__name__}; give bytes, a path, a URL, a data URI or PIL."
    )


def _read_file(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > MAX_IMAGE_BYTES:
            raise BadImageError(f"{path} has {size} bytes; at most {MAX_IMAGE_BYTES} are read.")
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        if isinstance(error, BadImageError):
            raise
        raise BadImageError(f"{str(path)[:200]} cannot be read: {error}") from error


def data_uri_bytes(uri: str) -> bytes:
    """Return the bytes of a `data:image/…;base64,…` URI.

    Raises:
        BadImageError: it is no such URI, or its base64 is broken.
    """
    head = _DATA_URI.match(uri)
    if head is None:
        raise BadImageError(
            f"{uri[:40]!r} is no data URI of a picture; it must begin with data:image/TYPE;base64,"
        )
    try:
        return base64.b64decode(uri[head.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadImageError(f"the data URI's base64 is broken: {error}") from error


def decode_image(data: bytes) -> Image.Image:
    """Decode an encoded picture (first frame of an animation), within the limits.

    Raises:
        BadImageError: it is no picture, is broken, or is too large.
    """
    if len(data) > MAX_IMAGE_BYTES:
        raise BadImageError(f"the encoded picture has {len(data)} bytes; at most {MAX_IMAGE_BYTES} are read.")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > MAX_IMAGE_PIXELS:  # before `load`, which allocates
            raise BadImageError(
                f"the picture has {image.width}x{image.height} pixels; at most {MAX_IMAGE_PIXELS} are "
                "decoded."
            )
        image.load()
    except DECODE_ERRORS as error:
        if isinstance(error, BadImageError):
            raise
        raise BadImageError(f"the picture cannot be decoded: {error or type(error).__name__}") from error
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Return the picture as 8-bit RGB, transparent parts on white; EXIF rotation is not applied.

    Qwen's own preparation puts transparency on white, too; transformers' drops the alpha channel, which turns
    a line drawing on a transparent ground black. All downstream see this function's result, so none
    disagrees.

    Raises:
        BadImageError: the picture has a mode whose values have no fixed range.
    """
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise BadImageError(
            f"pictures of mode {image.mode} (32 bits a pixel) are not taken; save it with 8 bits."
        )
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def encode_png(image: Image.Image) -> bytes:
    """Encode as PNG, without metadata: the same pixels give the same bytes."""
    buffer = io.BytesIO()
    Image.Image.save(_bare(image), buffer, format="PNG", compress_level=PNG_COMPRESSION)
    return buffer.getvalue()


def _bare(image: Image.Image) -> Image.Image:
    """Return the picture without `info`, of which the PNG writer would take ICC profiles and the like."""
    if not image.info:
        return image
    bare = image.copy()
    bare.info = {}
    return bare


class _OwnInfo(dict[str | tuple[int, int], Any]):
    """Picture info whose `png` stays with the picture: PIL copies info to every picture that is made from one
    (by `copy()`, newer versions by `items()`), and a rotated copy would carry the PNG of the original."""

    def copy(self) -> dict[str | tuple[int, int], Any]:
        return dict(self.items())

    def items(self) -> Any:
        return {key: value for key, value in super().items() if key not in ("png", "sha256")}.items()


def attach_png(image: Image.Image, png: bytes, sha256: str) -> None:
    """Remember the PNG of exactly these pixels, and its hash, in `info["png"]` and `info["sha256"]`.

    They do not follow into copies. Who draws on the picture itself must drop them.
    """
    image.info = _OwnInfo({**image.info, "png": png, "sha256": sha256})


def png_of(image: Image.Image) -> bytes | None:
    """Return the PNG that `attach_png` remembered, None where there is none."""
    return image.info.get("png")


def blank_like(image: Image.Image) -> Image.Image:
    """Return a white picture of the same size."""
    return Image.new("RGB", image.size, (255, 255, 255))
