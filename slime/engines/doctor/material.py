"""What the doctor sends: probes made with the student's own tokenizer, template and image processor.

As in a run, ids come from the student's checkpoint and pictures are prepared on our side, to sizes that the
processor leaves alone. Nothing is sent from here.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from slime.engines.doctor.receipt import Probe
from slime.engines.model_facts import ModelFacts, model_facts
from slime.utils.processing_utils import (
    IMAGE_PAD,
    encode_image_for_rollout_engine,
    image_tokens,
    load_processor,
)

LARGEST_PROBE_PIXELS = 2048 * 2048
"""A pre-flight must not run a teacher out of memory; larger pictures are compared by the configuration."""
PROBE_PIXELS = 256 * 256
QUESTION = "The drawing shows a shape of base 9 and height 4. What is its area?"
SENTENCE = "The area is 9*4/2 = 18."
SPREAD = 24
PICTURE_TEXT = "<|vision_start|>" + IMAGE_PAD + "<|vision_end|>"


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture, ready to be sent."""

    image: Image.Image
    uri: str
    tokens: int


class Material:
    """Probes of one student's checkpoint."""

    def __init__(self, checkpoint: str, min_pixels: int | None = None, max_pixels: int | None = None) -> None:
        """Load tokenizer, template and image processor.

        Raises:
            OSError, ValueError: there is no such checkpoint.
        """
        self.checkpoint = checkpoint
        self.facts: ModelFacts = model_facts(checkpoint)
        self.processor: Any = load_processor(checkpoint)
        self.tokenizer: Any = self.processor.tokenizer
        self.sees = self.processor.image_processor is not None and self.facts.image_token_id is not None
        self._nonce = secrets.token_bytes(8)
        if self.sees:
            low, high = _limits(checkpoint, self.image_processor)
            self.low, self.high = max(low, min_pixels or 0), min(high, max_pixels or high)
            if self.low > self.high:
                raise ValueError(
                    f"--image-min-pixels and --image-max-pixels leave no size between {self.low} and "
                    f"{self.high}"
                )

    @property
    def image_processor(self) -> Any:
        """The student's; None where it does not see."""
        return self.processor.image_processor

    # ---- text ----

    def render(self, pictures: int) -> str:
        """Return the probe conversation as the student's template writes it."""
        return render(self.processor, pictures)

    def prompt_ids(self, pictures: int) -> tuple[int, ...]:
        """Return the probe prompt in its wire form."""
        return tuple(self.tokenizer(self.render(pictures), add_special_tokens=False)["input_ids"])

    def vocabulary_text(self) -> str:
        """Return a text that needs tokens of the whole vocabulary, all special ones among them."""
        special = [token.content for _, token in sorted(self.tokenizer.added_tokens_decoder.items())]
        words = [self.tokenizer.decode([id_]) for id_ in self._spread(len(self.tokenizer), 8 * SPREAD)]
        return "".join([self.render(0), *special, " ".join(words), SENTENCE])

    def encode(self, text: str) -> list[int]:
        """Tokenize as a server does that is sent text."""
        return self.tokenizer.encode(text)

    def response(self, known: int) -> tuple[int, ...]:
        """Return response ids below `known` that no tokenizer would write so, with the end of turn.

        The sentence letter by letter, then ids from all over the vocabulary, the highest among them.
        """
        letters = [id_ for letter in SENTENCE for id_ in self._plain(letter)]
        end = self.tokenizer.eos_token_id
        ids = [*letters, *self._spread(known, SPREAD), *([] if end is None else [end])]
        return tuple(id_ for id_ in ids if id_ < known)

    def _plain(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _spread(self, known: int, count: int) -> list[int]:
        """Return ids evenly from [0, known), the highest included, none of them special."""
        added = set(self.tokenizer.added_tokens_decoder)
        limit = min(known, len(self.tokenizer))
        usable = [id_ for id_ in range(limit) if id_ not in added]
        if not usable:
            return []
        places = np.linspace(0, len(usable) - 1, min(count, len(usable))).round().astype(int)
        return [usable[place] for place in dict.fromkeys(places.tolist())]

    # ---- pictures ----

    def picture(self, pixels: int = PROBE_PIXELS, ratio: float = 1.0, variant: int = 0) -> Picture:
        """Return a drawing of about `pixels`, `ratio` times as wide as high, of a size that is left alone.

        Its marks differ from run to run and from `variant` to `variant`, so that no cache knows it.
        """
        height, width = self._size(pixels, ratio)
        return self._prepared(_draw(width, height, self._nonce + bytes([variant])))

    def blank(self, like: Picture) -> Picture:
        """Return a white picture of the same size."""
        return self._prepared(Image.new("RGB", like.image.size, (255, 255, 255)))

    def probe(self, pictures: Sequence[Picture], response: Sequence[int], vocab_size: int | None) -> Probe:
        """Return the probe conversation with these pictures and this response."""
        return Probe(
            prompt=self.prompt_ids(len(pictures)),
            response=tuple(response),
            images=tuple(picture.uri for picture in pictures),
            image_tokens=sum(picture.tokens for picture in pictures),
            vocab_size=vocab_size,
        )

    def sizes(self, most_tokens: int | None) -> list[tuple[int, float]]:
        """Return (pixels, ratio) of a small, an odd and a large picture within the limits."""
        side = self.image_processor.patch_size * self.processor.merge_size
        large = min(self.high, LARGEST_PROBE_PIXELS)
        if most_tokens is not None:
            large = min(large, max(most_tokens * side**2, self.low))
        middle = round(math.sqrt(self.low * large))
        return [(self.low, 1.0), (middle, 2.3), (large, 1.0)]

    def _size(self, pixels: int, ratio: float) -> tuple[int, int]:
        """Return (height, width) by the processor's own rule."""
        side = self.image_processor.patch_size * self.processor.merge_size
        pixels = min(max(pixels, self.low), self.high)
        height = max(round(math.sqrt(pixels / ratio)), 1)
        width = max(round(height * ratio), 1)
        return smart_resize(height, width, factor=side, min_pixels=self.low, max_pixels=self.high)

    def _prepared(self, image: Image.Image) -> Picture:
        grid = self.image_processor(images=[image])["image_grid_thw"][0]
        tokens = image_tokens([int(side) for side in grid], self.processor.merge_size)
        return Picture(image, encode_image_for_rollout_engine(image), tokens)


def _limits(checkpoint: str, processor: Any) -> tuple[int, int]:
    """Return the smallest and largest area that a processor leaves alone."""
    size = dict(processor.to_dict().get("size") or {})
    low, high = size.get("shortest_edge"), size.get("longest_edge")
    if not isinstance(low, int) or not isinstance(high, int):
        raise ValueError(
            f"the image processor of {checkpoint} has the size {size}; shortest_edge and longest_edge, "
            "in pixels, are needed as Qwen-VL has them."
        )
    return low, high


def render(processor: Any, pictures: int) -> str:
    """Return the probe conversation as a checkpoint's template writes it, or plain where it has none."""
    if not processor.chat_template:
        return PICTURE_TEXT * pictures + QUESTION
    parts: list[dict[str, Any]] = [{"type": "image"} for _ in range(pictures)]
    content: Any = [*parts, {"type": "text", "text": QUESTION}] if pictures else QUESTION
    messages = [{"role": "user", "content": content}]
    return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def _draw(width: int, height: int, seed: bytes) -> Image.Image:
    """Return coloured marks and a triangle."""
    random = np.random.default_rng(np.frombuffer(seed, dtype=np.uint8))
    colours = random.integers(0, 256, (max(height // 16, 1), max(width // 16, 1), 3), dtype=np.uint8)
    image = Image.fromarray(colours).resize((width, height), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(image)
    corners = [(width * 0.1, height * 0.9), (width * 0.9, height * 0.9), (width * 0.4, height * 0.1)]
    pen.polygon(corners, fill=(255, 255, 255), outline=(0, 0, 0), width=max(width // 64, 1))
    return image
