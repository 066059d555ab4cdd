"""The plain way to train on sampled tokens: padded batches, all logits, a picture for every sample."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForImageTextToText

from scripts.benchmarks.training.workload import LEARNING_RATE, Machine, Shape
from slime.data.expand import expand_image_pads
from slime.utils.processing_utils import load_processor
from slime.utils.types import Sample


class PlainTrainer:
    """transformers and AdamW, with the policy gradient of public recipes.

    Weights are float32; computing in bfloat16 is left to autocast.
    """

    def __init__(
        self,
        model: Path,
        shape: Shape,
        machine: Machine,
        samples: Sequence[Sample],
        pictures: Mapping[str, bytes],
        port: int,
    ) -> None:
        del port  # it has no other ranks
        self._device = torch.device(machine.device)
        self._autocast = machine.dtype == "bfloat16"
        self._processor = load_processor(model)
        self._model: Any = AutoModelForImageTextToText.from_pretrained(
            model, dtype=torch.float32, attn_implementation="sdpa"
        )
        self._model.to(self._device)
        self._model.config.get_text_config().attention_dropout = 0.0
        if machine.gradient_checkpointing:
            self._model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            self._model.train()
        fused = self._device.type == "cuda"  # as ours: the kernel is not what is compared
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=fused, foreach=not fused
        )
        self._samples = samples
        self._pictures = pictures
        self._rows = shape.total // shape.micro_batches

    def step(self) -> dict[str, float]:
        """Take one optimizer step; return what ours must agree with."""
        num_tokens = sum(sample.response_length for sample in self._samples)
        gaps = 0.0
        for start in range(0, len(self._samples), self._rows):
            batch = self._samples[start : start + self._rows]
            inputs, labels, teacher = self._inputs(batch)
            mask = labels >= 0
            with torch.autocast(self._device.type, torch.bfloat16, enabled=self._autocast):
                logits = self._model(**inputs, use_cache=False).logits[:, :-1]
            log_probs = logits.float().log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
            del logits
            gap = log_probs.detach() - teacher
            ratio = (log_probs - log_probs.detach()).exp()
            loss = (ratio * gap * mask).sum() / num_tokens
            loss.backward()
            gaps += float((gap * mask).sum()) / num_tokens
        norm = torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return {"reverse_kl": gaps, "grad_norm": float(norm)}

    def _inputs(self, batch: Sequence[Sample]) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Return the model's inputs, and labels (-1: no response) and the teacher's log-probs [B, T - 1]."""
        rows, labels, teacher, images = [], [], [], []
        for sample in batch:
            inputs = sample.multimodal_train_inputs or {}
            ids = torch.tensor(
                expand_image_pads(
                    sample.tokens,
                    inputs["image_grid_thw"],
                    self._processor.image_token_id,
                    self._processor.merge_size,
                )
            )
            rows.append(ids)
            prompt = len(ids) - sample.response_length
            labels.append(torch.cat([torch.full((prompt - 1,), -1), ids[prompt:]]))
            scores = torch.as_tensor(sample.teacher_log_probs, dtype=torch.float32)
            teacher.append(torch.cat([torch.zeros(prompt - 1), scores]))
            with Image.open(io.BytesIO(self._pictures[inputs["image_hashes"][0]])) as picture:
                images.append(picture.convert("RGB"))
        input_ids = pad_sequence(rows, batch_first=True)
        attention_mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        pixels = self._processor.image_processor(images=images, return_tensors="pt")
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "mm_token_type_ids": (input_ids == self._processor.image_token_id).long(),
            "pixel_values": pixels["pixel_values"],
            "image_grid_thw": pixels["image_grid_thw"],
        }
        return (
            {name: value.to(self._device) for name, value in inputs.items()},
            pad_sequence(labels, batch_first=True, padding_value=-1).to(self._device),
            pad_sequence(teacher, batch_first=True).to(self._device),
        )
