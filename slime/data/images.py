"""Pictures of a data set: fetched, checked, resized once, encoded as PNG once.

What comes out is of a size that every processor leaves alone, so that student engine, teacher and trainer see
the same pixels and count the same tokens. Slow by nature (decoding, network): call it from a worker thread.
"""

from __future__ import annotations

import hashlib
import time
import urllib.error
import urllib.request
from collections.abc import Hashable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from slime.utils.pictures import (
    MAX_IMAGE_BYTES,
    BadImageError,
    EncodedPicture,
    data_uri_bytes,
    decode_image,
    encode_png,
    encoded_picture,
    open_image,
    to_rgb,
)

FETCH_SECONDS = 20.0
FETCH_ATTEMPTS = 3
FETCH_BLOCK = 2**16
URL_SCHEMES = ("http://", "https://")
FILE_SCHEME = "file://"


@dataclass(frozen=True)
class Picture(EncodedPicture):
    """A prepared picture as it travels: content hash, bytes, patch grid."""

    grid_thw: tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class PictureAccess:
    """What the rows of a data set may name. Nobody vetted them, so it is little unless a flag says more."""

    root: Path | None = None
    """Folder that no path leaves, symbolic links followed; None allows no path at all."""
    named: bool = False
    """Whether the user named the root (`--image-root`); only then a row may write `file://`."""
    remote: bool = False
    """Whether http and https are fetched (`--allow-remote-images`)."""


NOTHING_NAMED = PictureAccess()
"""Pictures come with their bytes, or not at all."""


def picture_key(source: Any, access: PictureAccess = NOTHING_NAMED) -> Hashable:
    """Return what tells a picture of a data row from others, without decoding it.

    Encoded bytes and data URIs are known by their content, local files by path, size and time of change, URLs
    by themselves, PIL pictures by their pixels. Arguments and errors are `load_image`'s.
    """
    source = _plain(source)
    if isinstance(source, str) and source.startswith(URL_SCHEMES):
        return "url", _allowed_url(source, access)
    if isinstance(source, str) and source.startswith("data:"):
        source = data_uri_bytes(source)
    if isinstance(source, str):
        path = _local_path(source, access)
        try:
            status = path.stat()
        except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
            raise BadImageError(f"{str(path)[:200]} cannot be read: {error}") from error
        return "file", str(path), status.st_size, status.st_mtime_ns
    if isinstance(source, bytes | bytearray | memoryview):
        return "content", hashlib.sha256(source).digest()
    return "pixels", encoded_picture(open_image(source)).sha256


def _plain(source: Any) -> Any:
    """Return what a row's `{"bytes", "path"}` means; nothing in it is such an object again."""
    if not isinstance(source, dict):
        return source
    inner = source["bytes"] if source.get("bytes") is not None else source.get("path") or source.get("url")
    if inner is None:
        raise BadImageError("the picture has neither bytes nor a path.")
    if not isinstance(inner, str | bytes | bytearray | memoryview):
        raise BadImageError(
            f"the picture's bytes or path are a {type(inner).__name__}; bytes or text is needed."
        )
    return inner


def load_image(source: Any, access: PictureAccess = NOTHING_NAMED) -> Image.Image:
    """Open a picture of a data row: PIL, bytes, `{"bytes", "path"}`, path, http(s) URL or data URI.

    A path, relative to the root or absolute, must lie below it when its links are followed.

    Raises:
        BadImageError: it cannot be had, decoded or used, or `access` does not allow it.
    """
    source = _plain(source)
    if isinstance(source, str) and source.startswith(URL_SCHEMES):
        return decode_image(fetch(_allowed_url(source, access)))
    if isinstance(source, str) and not source.startswith("data:"):
        return open_image(_local_path(source, access))
    return open_image(source)


def _allowed_url(url: str, access: PictureAccess) -> str:
    if not access.remote:
        raise BadImageError(
            f"{url[:200]!r} is on another machine, and a row makes this one fetch nothing by default. Pass "
            "--allow-remote-images if you trust the data, or download the pictures."
        )
    return url


def _local_path(text: str, access: PictureAccess) -> Path:
    """Return the file that a row's path means, inside the root."""
    if text.startswith(FILE_SCHEME):
        if not access.named:
            raise BadImageError(
                f"{text[:80]!r} is taken only with --image-root, the folder that it must lie in; or give a "
                "path relative to the data file."
            )
        text = unquote(text.removeprefix(FILE_SCHEME))
    if "://" in text[:20]:
        raise BadImageError(
            f"{text[:80]!r}: only http and https URLs are fetched; give a plain path for a file."
        )
    if access.root is None:
        raise BadImageError(
            f"{text[:200]!r} is a path and there is no folder that it could be in; set --image-root."
        )
    try:
        root = access.root.resolve()
        resolved = (root / text).resolve()
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: links that go round in a circle
        raise BadImageError(f"{text[:200]!r} is no path: {error}") from error
    if not resolved.is_relative_to(root):
        raise BadImageError(
            f"{text[:200]!r} leads out of the picture folder {root}; set --image-root to a folder above it."
        )
    return resolved


class _WebOnly(urllib.request.HTTPRedirectHandler):
    """Follows a redirection to another web page, and to nothing else."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if not newurl.lower().startswith(URL_SCHEMES):
            raise BadImageError(f"it sends us on to {newurl[:80]!r}, which is no http or https URL")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def fetch(url: str) -> bytes:
    """Download a picture within a time and a size limit; connection errors and 5xx answers are tried again.

    Raises:
        BadImageError: it cannot be had.
    """
    deadline = time.monotonic() + FETCH_SECONDS
    for attempt in range(1, FETCH_ATTEMPTS + 1):
        try:
            return _fetch_once(url, deadline)
        except urllib.error.HTTPError as error:
            final = error.code < 500
            reason = f"HTTP {error.code} {error.reason}"
        except (OSError, HTTPException) as error:  # URLError, timeouts, resets
            final = False
            reason = str(error) or type(error).__name__
        except ValueError as error:
            raise BadImageError(f"{url[:200]} cannot be fetched: {error}") from error
        if final or attempt == FETCH_ATTEMPTS or time.monotonic() > deadline:
            raise BadImageError(
                f"{url[:200]} cannot be fetched: {reason} ({attempt} of {FETCH_ATTEMPTS} attempts)"
            )
        time.sleep(0.2 * attempt)
    raise AssertionError("the last attempt returns or raises")


def _fetch_once(url: str, deadline: float) -> bytes:
    """Read the body block by block, so that a slow drip ends at the deadline too."""
    request = urllib.request.Request(url, headers={"User-Agent": "slime-opd-vlm"})
    data = bytearray()
    timeout = max(0.1, deadline - time.monotonic())
    with urllib.request.build_opener(_WebOnly).open(request, timeout=timeout) as answer:
        while block := answer.read1(FETCH_BLOCK):
            data += block
            if len(data) > MAX_IMAGE_BYTES:
                raise BadImageError(f"it is larger than {MAX_IMAGE_BYTES} bytes")
            if time.monotonic() > deadline:
                raise TimeoutError(f"not complete after {FETCH_SECONDS:g} s")
    return bytes(data)


def prepare_picture(
    image: Image.Image, image_processor: Any, min_pixels: int | None = None, max_pixels: int | None = None
) -> Picture:
    """Resize once to what every processor leaves alone, and encode once.

    Raises:
        BadImageError: too long and thin, or its limits cannot be met.
    """
    factor = image_processor.patch_size * image_processor.merge_size
    low, high = pixel_limits(image_processor, min_pixels, max_pixels)
    height, width = target_size(image.height, image.width, factor, low, high)
    rgb = to_rgb(image)
    if rgb.size != (width, height):
        rgb = rgb.resize((width, height), Image.Resampling(int(image_processor.resample)))
    png = encode_png(rgb)
    patch = image_processor.patch_size
    return Picture(hashlib.sha256(png).hexdigest(), png, (1, height // patch, width // patch))


def pixel_limits(image_processor: Any, min_pixels: int | None, max_pixels: int | None) -> tuple[int, int]:
    """Return the smallest and largest area that both the processor and the flags allow.

    Raises:
        BadImageError: no area satisfies both.
    """
    low, high = image_processor.size["shortest_edge"], image_processor.size["longest_edge"]
    low = low if min_pixels is None else max(low, min_pixels)
    high = high if max_pixels is None else min(high, max_pixels)
    if low > high:
        raise BadImageError(
            f"pictures need at least {low} and at most {high} pixels; the model's processor takes "
            f"{image_processor.size['shortest_edge']} to {image_processor.size['longest_edge']}: "
            "change --image-min-pixels or --image-max-pixels."
        )
    return low, high


def target_size(height: int, width: int, factor: int, low: int, high: int) -> tuple[int, int]:
    """Return the (height, width) that the processors' own rule gives and then leaves alone.

    Raises:
        BadImageError: an empty picture, sides too unequal, or no multiple of `factor` within the limits.
    """
    if height < 1 or width < 1:
        raise BadImageError(f"the picture is empty ({width}x{height}).")
    try:
        target = smart_resize(height, width, factor=factor, min_pixels=low, max_pixels=high)
        again = smart_resize(*target, factor=factor, min_pixels=low, max_pixels=high)
    except ValueError as error:
        raise BadImageError(f"a picture of {width}x{height} pixels cannot be resized: {error}") from error
    if again != target:
        raise BadImageError(
            f"a picture of {width}x{height} pixels has no size in multiples of {factor} between {low} and "
            f"{high} pixels; widen --image-min-pixels or --image-max-pixels."
        )
    return target
