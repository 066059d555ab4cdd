"""Pictures as PIL, bytes and PNG: safe decoding, one RGB form, one encoding.

The lowest layer of it: no data set, no URL, no model. `slime.data.images` fetches and resizes.

Encoding is what costs (26 ms for a drawing of 1024x1024), so a picture object's encoding is remembered
beside it, never in it: copies, rotations and pickles of the picture inherit nothing, and its `info` is
untouched. What was drawn on never goes out stale: a picture that is still the unread file that it was opened
from is sent as it is, and one whose pixels somebody has read is compared, by a digest of them, with what was
encoded.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import re
import stat
import struct
import weakref
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from PIL import Image, ImageFile

MAX_IMAGE_BYTES = 64 * 2**20
"""Largest encoded picture that is opened."""
MAX_IMAGE_PIXELS = 64 * 2**20
"""Largest picture that is decoded; beyond it a small file can fill the memory (a decompression bomb)."""
PNG_COMPRESSION = 3
"""zlib level: two thirds of the time of the default 6, for 5 to 12 % more bytes on line drawings."""
PNG_URI = "data:image/png;base64,"

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
        return decode_image(read_file(Path(source)))
    raise BadImageError(
        f"a picture cannot be a {type(source).__name__}; give bytes, a path, a URL, a data URI or PIL."
    )


def read_file(path: Path) -> bytes:
    """Return the bytes of an encoded picture's file.

    Raises:
        BadImageError: it is not there, no plain file, or too large.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for, a device read without end
            raise BadImageError(f"{str(path)[:200]} is no file.")
        if status.st_size > MAX_IMAGE_BYTES:
            raise BadImageError(f"{path} has {status.st_size} bytes; at most {MAX_IMAGE_BYTES} are read.")
        with path.open("rb") as file:  # one that grows, or says that it is empty, is not read without end
            return file.read(MAX_IMAGE_BYTES)
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


@dataclass(frozen=True)
class EncodedPicture:
    """The one encoding of a picture, which all who send or train on it share."""

    sha256: str
    """Of `png`, in hexadecimal: the picture's name on its way."""
    png: bytes

    @cached_property
    def data_uri(self) -> str:
        """The form that engines take."""
        return PNG_URI + base64.b64encode(self.png).decode("ascii")


class _Memory:
    """What is remembered of one picture object: its encoding, and of which pixels it is."""

    def __init__(self, image: Image.Image) -> None:
        key = id(image)
        self.image = weakref.ref(image, lambda _: _memories.pop(key, None))
        self.lock = Lock()
        self.encoded: EncodedPicture | None = None
        self.pixels: bytes | None = None
        """Digest of the encoded pixels; None: those of `encoded.png`, from which the picture was opened."""

    def is_current(self, image: Image.Image) -> bool:
        """Tell whether the encoding is that of the pixels that the picture has now."""
        if self.encoded is None:
            return False
        if self.pixels is None:
            if _is_unread(image):
                return True
            self.pixels = _pixel_digest(Image.open(io.BytesIO(self.encoded.png), formats=("PNG",)))
        return self.pixels == _pixel_digest(image)


_memories: dict[int, _Memory] = {}
"""By `id()` of living pictures; PIL's pictures compare by their pixels and cannot be keys."""


def _memory_of(image: Image.Image) -> _Memory:
    memory = _memories.get(id(image))
    return _memories.setdefault(id(image), _Memory(image)) if memory is None else memory


def open_encoded(encoded: EncodedPicture) -> Image.Image:
    """Return the picture, its pixels unread until somebody asks for them; sending it costs no encoding."""
    image = Image.open(io.BytesIO(encoded.png), formats=("PNG",))
    _memory_of(image).encoded = encoded
    return image


def encoded_picture(image: Image.Image) -> EncodedPicture:
    """Return the PNG of a picture as RGB, encoded once for each state of its pixels. Safe for threads.

    Raises:
        BadImageError: it cannot be encoded as 8-bit RGB.
    """
    memory = _memory_of(image)
    with memory.lock:
        if memory.encoded is None or not memory.is_current(image):
            memory.encoded = _encode(image)
            memory.pixels = _pixel_digest(image)
        return memory.encoded


def _encode(image: Image.Image) -> EncodedPicture:
    png = encode_png(to_rgb(image))
    return EncodedPicture(hashlib.sha256(png).hexdigest(), png)


def picture_uri(source: Image.Image | bytes | str | Path | dict[str, Any]) -> str:
    """Return a picture as PNG data URI; takes what `open_image` takes.

    Raises:
        BadImageError: it cannot be read.
    """
    if isinstance(source, Image.Image):
        return encoded_picture(source).data_uri
    if isinstance(source, str) and source.startswith(PNG_URI):
        return source
    return _encode(open_image(source)).data_uri


def is_at_hand(source: Any) -> bool:
    """Tell whether `picture_uri` answers at once, without looking at a pixel."""
    if isinstance(source, str):
        return source.startswith(PNG_URI)
    return isinstance(source, Image.Image) and _is_encoded(source)


def _is_encoded(image: Image.Image) -> bool:
    memory = _memories.get(id(image))
    return memory is not None and memory.encoded is not None and memory.pixels is None and _is_unread(image)


def _is_unread(image: Image.Image) -> bool:
    """Tell whether the picture is still the file that it was opened from: nobody can have drawn on it."""
    return isinstance(image, ImageFile.ImageFile) and bool(image.tile)


def _pixel_digest(image: Image.Image) -> bytes:
    """Return a digest of all that `to_rgb` reads."""
    pixels = image.tobytes()
    palette = None if image.palette is None else image.palette.tobytes()
    head = (image.mode, image.size, palette, image.info.get("transparency"))
    return hashlib.sha256(repr(head).encode() + pixels).digest()


def blank_like(image: Image.Image) -> Image.Image:
    """Return a white picture of the same size."""
    return Image.new("RGB", image.size, (255, 255, 255))
