"""`image_data` strings to pixel tensors: decoding as the real server does, then the checkpoint's processor.

Pixels of recent pictures are kept (they do not depend on weights), because the samples of one prompt bring
the same picture. Vision features are never kept between forwards.
"""

import base64
import hashlib
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from torch import Tensor

from slime.engines.transformers_engine.errors import InternalFault, InvalidValue
from slime.utils.pictures import BadImageError, decode_image, read_file

PATH_SUFFIXES = (".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp")
CACHE_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Pixels:
    """One picture as the vision tower takes it."""

    digest: bytes
    """SHA-256 of the encoded file; equal digests share one vision pass."""
    values: Tensor
    """Float32 `[patches, channels * temporal * patch * patch]`."""
    grid: tuple[int, int, int]
    """Time, height and width in patches."""

    def merged_tokens(self, merge: int) -> int:
        """Number of prompt tokens that the picture takes."""
        return self.grid[0] * self.grid[1] * self.grid[2] // merge**2


def read_image_bytes(source: str) -> bytes:
    """Return the encoded file that a string of `image_data` names or holds."""
    if source.startswith(("http://", "https://")):
        raise InvalidValue(
            f"image_data names {source[:80]}: the transformers engine does not download pictures; "
            "send a data URI or raw base64."
        )
    if source.startswith("data:"):
        return _decode_base64(source.partition(",")[2])
    if names_file(source):
        return _read_file(unquote(source.removeprefix("file://")) if source.startswith("file://") else source)
    return _decode_base64(source)


def names_file(source: str) -> bool:
    """Tell whether a string of `image_data` is a path: any that begins with `/`, so base64 of a JPEG, too."""
    if source.startswith(("file://", "/")):
        return True
    return source.lower().endswith(PATH_SUFFIXES) and Path(source).exists()


def _decode_base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:  # binascii.Error is one; so is text that is not ASCII
        raise InvalidValue(str(error)) from error


def _read_file(path: str) -> bytes:
    try:
        return read_file(Path(path))
    except BadImageError as error:
        raise InternalFault(f"image_data names a file that cannot be read: {error}") from error


class ImageLoader:
    """Turns `image_data` strings into `Pixels`; safe to call from several threads.

    Without an image processor (a text model) every picture is refused.
    """

    def __init__(self, image_processor: Any | None, cache_bytes: int = CACHE_BYTES):
        self._processor = image_processor
        self._cache: OrderedDict[bytes, Pixels] = OrderedDict()  # by the hash of the source string
        self._free_bytes = cache_bytes
        self._lock = threading.Lock()

    def recent(self, source: str) -> Pixels | None:
        """Return the pixels of a picture that was loaded lately, None otherwise; cheap."""
        key = hashlib.sha256(source.encode()).digest()
        with self._lock:
            pixels = self._cache.get(key)
            if pixels is not None:
                self._cache.move_to_end(key)
            return pixels

    def load(self, source: str) -> Pixels:
        """Return the pixels of one picture; raise InvalidValue where the bytes are no usable picture."""
        encoded = read_image_bytes(source)
        pixels = self._process(encoded, hashlib.sha256(encoded).digest())
        if not names_file(source):
            with self._lock:
                self._keep(hashlib.sha256(source.encode()).digest(), pixels)
        return pixels

    def _process(self, encoded: bytes, digest: bytes) -> Pixels:
        if self._processor is None:
            raise InvalidValue(
                "image_data holds a picture, and the served model takes text alone; send no image_data, or "
                "serve a vision-language model."
            )
        try:
            image = decode_image(encoded)
        except BadImageError as error:
            raise InvalidValue(f"Could not decode image: {error}") from error
        try:
            # Transparency is dropped, not blended, as the real server's processor does.
            batch = self._processor(images=[image.convert("RGB")], return_tensors="pt")
        except ValueError as error:
            raise InvalidValue(str(error)) from error
        time, height, width = batch["image_grid_thw"][0].tolist()
        return Pixels(digest, batch["pixel_values"], (time, height, width))

    def _keep(self, key: bytes, pixels: Pixels) -> None:
        if key in self._cache:
            return
        self._cache[key] = pixels
        self._free_bytes -= pixels.values.nbytes
        while self._free_bytes < 0 and len(self._cache) > 1:
            _, oldest = self._cache.popitem(last=False)
            self._free_bytes += oldest.values.nbytes
