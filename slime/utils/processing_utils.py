"""Tokenizer, image processor and the encoding of pictures for an engine.

`load_processor` returns transformers' own processor where torchvision works, and an object with the same
outputs where it does not: transformers then cannot make a Qwen-VL processor, because its *video* part wants
torchvision. Nothing here knows data sets or fetches a URL; `slime.data.images` does.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer

from slime.utils.pictures import BadImageError, decode_image, picture_uri

__all__ = [
    "BadImageError",
    "Processor",
    "decode_image",
    "encode_image_for_rollout_engine",
    "image_tokens",
    "load_processor",
    "torchvision_works",
]

IMAGE_PAD = "<|image_pad|>"


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
    """Return a picture as the PNG data URI that engines take.

    Takes a PIL picture, encoded bytes, a data URI, the path of a local file, or `{"bytes": …, "path": …}`.
    A prepared picture costs nothing; any other PIL picture is encoded once, and again after it was drawn on.

    Raises:
        BadImageError: it cannot be read.
    """
    return picture_uri(image)
