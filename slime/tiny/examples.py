"""Turns problems into model inputs, exactly as a training job builds its prompts.

Chat template with the picture at the place of `<image>`, one pad expanded to the picture's merged patches,
pixels by the image processor. Used by pre-training and its accuracy check; a job has its own path through
`slime.data`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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
    """Keyword arguments of the model: ids and masks [B, T], pixels, grids."""
    labels: Tensor
    """[B, T], `IGNORED` outside the response."""


class Encoder:
    """Builds batches with the tokenizer and the image processor of one folder."""

    def __init__(self, directory: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.image_processor = AutoImageProcessor.from_pretrained(directory, backend="pil")
        self.image_id: int = self.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        self.end_id: int = self.tokenizer.convert_tokens_to_ids(END)
        self.pad_id: int = self.tokenizer.pad_token_id

    def prompt_ids(self, text: str) -> list[int]:
        """Encode a problem's text, one pad for its picture (the wire form)."""
        before, after = text.split("<image>")
        parts = [{"type": "text", "text": before}, {"type": "image"}, {"type": "text", "text": after}]
        content = [part for part in parts if part["type"] == "image" or part["text"]]
        prompt = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        return self.tokenizer(prompt, add_special_tokens=False).input_ids

    def prompts(self, texts: Sequence[str], images: Sequence[Image.Image]) -> Batch:
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
        pixels = self.image_processor(images=list(images), return_tensors="pt")
        grids: Tensor = pixels["image_grid_thw"]
        pads = (grids.prod(dim=1) // self.image_processor.merge_size**2).tolist()
        rows: list[list[int]] = []
        labels: list[list[int]] = []
        for text, count, response in zip(texts, pads, responses, strict=True):
            prompt = self._expand(self.prompt_ids(text), count)
            answer, learned = ([], []) if response is None else self._response(response)
            rows.append(prompt + answer)
            labels.append([IGNORED] * len(prompt) + learned)
        left = responses[0] is None
        ids = self._pad(rows, self.pad_id, left)
        mask = self._pad([[1] * len(row) for row in rows], 0, left)
        inputs = {
            "input_ids": ids,
            "attention_mask": mask,
            "mm_token_type_ids": (ids == self.image_id).long(),
            "pixel_values": pixels["pixel_values"],
            "image_grid_thw": grids,
        }
        return Batch(inputs, self._pad(labels, IGNORED, left))

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
        at = ids.index(self.image_id)
        return [*ids[:at], *[self.image_id] * count, *ids[at + 1 :]]

    @staticmethod
    def _pad(rows: list[list[int]], value: int, left: bool) -> Tensor:
        length = max(map(len, rows))
        fills = [[value] * (length - len(row)) for row in rows]
        return torch.tensor(
            [fill + row if left else row + fill for row, fill in zip(rows, fills, strict=True)]
        )
