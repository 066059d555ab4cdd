"""Turns problems into model inputs, exactly as a training job builds its prompts.

Chat template with the picture, if there is one, at the place of `<image>`, one pad expanded to the picture's
merged patches, pixels by the image processor. Used by pre-training and its accuracy check; a job has its own
path through `slime.data`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer

from slime.tiny.slips import Segment
from slime.tiny.tokenizer import END

IGNORED = -100
"""The label of a position that carries no loss."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Padded inputs of B examples of at most T tokens."""

    inputs: dict[str, Tensor]
    """Keyword arguments of the model: ids and masks [B, T]; with pictures also token types, pixels, grids."""
    labels: Tensor
    """[B, T], `IGNORED` outside the response."""


class Encoder:
    """Builds batches with the tokenizer and, where it has one, the image processor of one folder.

    Of a batch either every text has one picture, or none has.
    """

    def __init__(self, directory: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        sees = (directory / "preprocessor_config.json").is_file()
        self.image_processor: Any = (
            AutoImageProcessor.from_pretrained(directory, backend="pil") if sees else None
        )
        self.image_id: int = self.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        self.end_id: int = self.tokenizer.convert_tokens_to_ids(END)
        self.pad_id: int = self.tokenizer.pad_token_id

    def prompt_ids(self, text: str) -> list[int]:
        """Encode a problem's text, one pad for its picture (the wire form)."""
        before, placeholder, after = text.partition("<image>")
        parts = [{"type": "text", "text": before}, {"type": "image"}, {"type": "text", "text": after}]
        content = [part for part in parts if part["type"] == "image" or part["text"]]
        prompt = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content if placeholder else text}],
            tokenize=False,
            add_generation_prompt=True,
        )
        return self.tokenizer(prompt, add_special_tokens=False).input_ids

    def prompts(self, texts: Sequence[str], images: Sequence[Image.Image] = ()) -> Batch:
        """Build left-padded prompts for generation."""
        return self._batch(texts, images, [None] * len(texts))

    def examples(
        self, texts: Sequence[str], images: Sequence[Image.Image], responses: Sequence[list[Segment]]
    ) -> Batch:
        """Build right-padded prompts with responses; learned segments and the end carry labels."""
        return self._batch(texts, images, responses)

    def _batch(
        self, texts: Sequence[str], images: Sequence[Image.Image], responses: Sequence[list[Segment] | None]
    ) -> Batch:
        pixels, counts = self._pictures(images) if images else ({}, [0] * len(texts))
        rows: list[list[int]] = []
        labels: list[list[int]] = []
        for text, count, response in zip(texts, counts, responses, strict=True):
            prompt = self._expand(self.prompt_ids(text), count)
            answer, learned = ([], []) if response is None else self._response(response)
            rows.append(prompt + answer)
            labels.append([IGNORED] * len(prompt) + learned)
        left = responses[0] is None
        ids = self._pad(rows, self.pad_id, left)
        inputs = {"input_ids": ids, "attention_mask": self._pad([[1] * len(row) for row in rows], 0, left)}
        if images:
            inputs |= {"mm_token_type_ids": (ids == self.image_id).long()} | pixels
        return Batch(inputs, self._pad(labels, IGNORED, left))

    def _pictures(self, images: Sequence[Image.Image]) -> tuple[dict[str, Tensor], list[int]]:
        """Return pixels and grids, and the number of tokens of each picture."""
        pixels = self.image_processor(images=list(images), return_tensors="pt")
        grids: Tensor = pixels["image_grid_thw"]
        counts = (grids.prod(dim=1) // self.image_processor.merge_size**2).tolist()
        return {"pixel_values": pixels["pixel_values"], "image_grid_thw": grids}, counts

    def _response(self, segments: list[Segment]) -> tuple[list[int], list[int]]:
        """Return ids and labels of a response with its end token."""
        ids: list[int] = []
        labels: list[int] = []
        for segment in segments:
            part = self.tokenizer(segment.text).input_ids
            ids += part
            labels += part if segment.learned else [IGNORED] * len(part)
        return [*ids, self.end_id], [*labels, self.end_id]

    def _expand(self, ids: list[int], count: int) -> list[int]:
        """Repeat the pad `count` times; without a picture there is none."""
        if count == 0:
            return ids
        at = ids.index(self.image_id)
        return [*ids[:at], *[self.image_id] * count, *ids[at + 1 :]]

    @staticmethod
    def _pad(rows: list[list[int]], value: int, left: bool) -> Tensor:
        length = max(map(len, rows))
        fills = [[value] * (length - len(row)) for row in rows]
        return torch.tensor(
            [fill + row if left else row + fill for row, fill in zip(rows, fills, strict=True)]
        )
