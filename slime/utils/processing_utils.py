"""Tokenizer, image processor and the encoding of pictures for an engine.

`load_processor` returns transformers' own processor where torchvision works, and an object with the same
outputs where it does not: transformers then cannot make a Qwen-VL processor, because its *video* part wants
torchvision. Nothing here knows data sets or fetches a URL; `slime.data.images` does.
"""

from __future__ import annotations

import base64
import binascii
import importlib
import io
import re
import struct
import zlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer

IMAGE_PAD = "<|image_pad|>"
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


class Processor:
    """Tokenizer and image processor of a Qwen-VL checkpoint, with the outputs of transformers' own processor.

    Covers text and pictures; videos are refused by having no argument for them. `image_processor` is None
    where the checkpoint is text alone.
    """

    def __init__(self, tokenizer: Any, image_processor: Any | None) -> None:
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.chat_template: str | None = tokenizer.chat_template
        self.image_token = IMAGE_PAD
        self.image_token_id: int | None = tokenizer.get_vocab().get(IMAGE_PAD)
        self.merge_size: int = 1 if image_processor is None else image_processor.merge_size

    def apply_chat_template(self, messages: Sequence[dict[str, Any]], **options: Any) -> Any:
        """Render messages as the tokenizer's template says; options are transformers'."""
        return self.tokenizer.apply_chat_template(messages, **options)

    def __call__(
        self,
        text: str | Sequence[str],
        images: Image.Image | Sequence[Any] | None = None,
        return_tensors: str | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """Tokenize `text`, each picture's one pad expanded to its merged patches, and make the pixel values.

        Returns input_ids, attention_mask and mm_token_type_ids [B, T] (lists without `return_tensors`); with
        pictures also pixel_values [patches, channels * temporal * patch**2] and image_grid_thw [pictures, 3].

        Raises:
            ValueError: the text has another number of pads than there are pictures.
        """
        texts = [text] if isinstance(text, str) else list(text)
        features: dict[str, Any] = {}
        if images is not None:
            if self.image_processor is None:
                raise ValueError(
                    "pictures were given and the checkpoint has no image processor; it is text alone."
                )
            pictures = [images] if isinstance(images, Image.Image) else list(images)
            features = dict(self.image_processor(images=pictures, return_tensors=return_tensors))
        grids = [tuple(int(side) for side in grid) for grid in features.get("image_grid_thw", [])]
        texts = self._expand(texts, grids)
        tokens = dict(self.tokenizer(texts, return_tensors=return_tensors, **options))
        tokens["mm_token_type_ids"] = self._token_types(tokens["input_ids"])
        return {**tokens, **features}

    def _token_types(self, ids: Any) -> Any:
        """Mark the image pads with 1: multimodal positions (mRoPE) are computed from these."""
        if isinstance(ids, list):
            return [[int(token == self.image_token_id) for token in row] for row in ids]
        return (ids == self.image_token_id) * 1

    def _expand(self, texts: list[str], grids: Sequence[tuple[int, ...]]) -> list[str]:
        """Repeat each pad as often as its picture has merged patches."""
        found = sum(text.count(IMAGE_PAD) for text in texts)
        if found != len(grids):
            raise ValueError(
                f"the text has {found} {IMAGE_PAD} and there are {len(grids)} pictures; one each is needed."
            )
        counts = iter(image_tokens(grid, self.merge_size) for grid in grids)
        return [re.sub(re.escape(IMAGE_PAD), lambda _: IMAGE_PAD * next(counts), text) for text in texts]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write tokenizer, template and image processor in Hugging Face's form."""
        self.tokenizer.save_pretrained(folder)
        if self.image_processor is not None:
            self.image_processor.save_pretrained(folder)


def image_tokens(grid_thw: Sequence[int], merge_size: int) -> int:
    """Return how many tokens a picture of that grid takes in the expanded sequence."""
    frames, height, width = grid_thw
    return frames * height * width // merge_size**2


def load_processor(path: str | Path, **options: Any) -> Any:
    """Return the processor of a checkpoint (folder or hub name).

    Has `tokenizer`, `image_processor` (None for a text model), `image_token_id`, `merge_size`,
    `chat_template`, `apply_chat_template`, and is called as transformers' processors are. `options` go to
    `from_pretrained`.

    Raises:
        OSError: the checkpoint is not there, or has no tokenizer.
    """
    sees = hasattr(AutoConfig.from_pretrained(path, **options), "vision_config")
    if sees and torchvision_works():
        processor = AutoProcessor.from_pretrained(path, **options)
        processor.merge_size = processor.image_processor.merge_size
        return processor
    tokenizer = AutoTokenizer.from_pretrained(path, **options)
    image_processor = AutoImageProcessor.from_pretrained(path, backend="pil", **options) if sees else None
    return Processor(tokenizer, image_processor)


@cache
def torchvision_works() -> bool:
    """Tell whether torchvision is installed and loads; the wheel for CUDA does not beside a CPU torch."""
    try:
        importlib.import_module("torchvision.transforms.v2")
    except (ImportError, OSError, RuntimeError, AttributeError):
        return False
    return True


def encode_image_for_rollout_engine(image: Image.Image | bytes | str | Path | dict[str, Any]) -> str:
    """Return a picture as the PNG data URI that engines take; a prepared picture is not encoded again.

    Takes a PIL picture, encoded bytes, a data URI, the path of a local file, or `{"bytes": …, "path": …}`.

    Raises:
        BadImageError: it cannot be read.
    """
    if isinstance(image, str) and image.startswith("data:image/png;base64,"):
        return image
    png = png_of(image) if isinstance(image, Image.Image) else None
    if png is None:
        png = encode_png(to_rgb(open_image(image)))
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


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
