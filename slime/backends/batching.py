"""Samples as tensors, and micro-batches made from them on the training rank.

Here the wire form ends: one image pad per picture becomes as many as the model reads, and pictures become
pixels. A loss sees only the flat response arrays [P]; how the rows above them are laid out is between here
and the backend: samples lie end to end in one row (packed), or each has a row, padded to the longest.

Shape letters: B rows, T tokens of a row, P response tokens of all samples, I pictures, N patches, D values a
patch.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from slime.data.expand import expand_image_pads, expanded_length
from slime.data.thinking import ThinkTags

Grid = tuple[int, int, int]
CARRIED: Mapping[str, torch.dtype] = {
    "rollout_log_probs": torch.float32,
    "teacher_log_probs": torch.float32,
    "teacher_top_ids": torch.int64,
    "teacher_top_log_probs": torch.float32,
    "teacher_tail_mass": torch.float32,
    "distill_mask": torch.float32,
}
"""What a sample may carry for each response token, and its type in a micro-batch, under the same name."""
ROWS_OF_K = ("teacher_top_ids", "teacher_top_log_probs")
"""Those that are [R, K]."""


class BatchProcessor(Protocol):
    """What batching reads of the processor."""

    tokenizer: Any
    image_token_id: int | None
    """None where the tokenizer has no image pad."""
    merge_size: int
    image_processor: Any


@dataclass(frozen=True, kw_only=True)
class TrainSample:
    """What a training rank needs of one `Sample`; plain tensors on the CPU."""

    index: int
    """The sample's number in the run, for messages."""
    group: int | None = None
    """That of its prompt's group, for messages."""
    tokens: Tensor
    """int64 [L], wire form."""
    response_length: int
    """R, at least 1."""
    loss_mask: Tensor
    """float32 [R]."""
    advantages: Tensor
    """float32 [R], of the task-reward stream alone."""
    rollout_log_probs: Tensor | None = None
    """float32 [R]."""
    teacher_log_probs: Tensor | None = None
    """float32 [R]."""
    teacher_top_ids: Tensor | None = None
    """int32 [R, K]."""
    teacher_top_log_probs: Tensor | None = None
    """float32 [R, K]."""
    teacher_tail_mass: Tensor | None = None
    """float32 [R]."""
    distill_mask: Tensor | None = None
    """float32 [R], 1 where the teacher's stream is trained on; None: where the loss mask is 1."""
    finished: bool = True
    """Whether the response ended by itself, not by the token limit."""
    image_hashes: tuple[str, ...] = ()
    image_grid_thw: tuple[Grid, ...] = ()

    def expanded_length(self, merge_size: int) -> int:
        """Return the number of tokens with every picture's pads expanded."""
        return expanded_length(self.tokens.tolist(), self.image_grid_thw, merge_size)


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """One forward and backward pass of one rank; without samples, a dummy that keeps the ranks in step."""

    sample_indices: tuple[int, ...]
    """`TrainSample.index` of each sample."""
    input_ids: Tensor
    """int64 [B, T], pads expanded; B = 1 where the samples are packed, else a right-padded row each."""
    attention_mask: Tensor
    """int64 [B, T], 1 on tokens."""
    image_token_mask: Tensor
    """int64 [B, T], 1 on the pads of pictures: the model's `mm_token_type_ids`."""
    pictures: tuple[Tensor, ...]
    """float32 [N, D] of each distinct picture; the micro-batches of a shard share these tensors."""
    picture_grids: Tensor | None
    """int64 [pictures, 3], their grids; None without pictures."""
    picture_rows: tuple[int, ...]
    """[I], which distinct picture each image in the batch is."""
    response_positions: Tensor
    """int64 [P], flat index into [B * T] of the position that predicts each response token."""
    response_ids: Tensor
    """int64 [P]."""
    sample_rows: Tensor
    """int64 [P], which sample of the micro-batch each response token belongs to."""
    loss_mask: Tensor
    """float32 [P]."""
    advantages: Tensor
    """float32 [P], of the task-reward stream."""
    finished: Tensor
    """bool [P], the token's response ended by itself."""
    thinking: Tensor
    """bool [P], the token belongs to the response's thought, tags included."""
    lengths: tuple[int, ...] | None = None
    """Tokens of each sample in the one packed row, in order; None: the samples have rows of their own."""
    rollout_log_probs: Tensor | None = None
    """float32 [P], under the engine."""
    teacher_log_probs: Tensor | None = None
    """float32 [P]."""
    teacher_top_ids: Tensor | None = None
    """int64 [P, K]."""
    teacher_top_log_probs: Tensor | None = None
    """float32 [P, K]."""
    teacher_tail_mass: Tensor | None = None
    """float32 [P]."""
    distill_mask: Tensor | None = None
    """float32 [P], where the teacher's stream is trained on; None: where the loss mask says."""
    old_log_probs: Tensor | None = None
    """float32 [P], under the trainer's student before the first of several steps."""
    reference_log_probs: Tensor | None = None
    """float32 [P], under the initial student."""

    @property
    def pixel_values(self) -> Tensor | None:
        """float32 [N, D], all distinct pictures joined for one forward pass; None without pictures."""
        return torch.cat(self.pictures) if self.pictures else None

    def to(self, device: torch.device) -> MicroBatch:
        """Return the same micro-batch with all tensors on `device`."""
        if self.input_ids.device == device:
            return self
        moved = {
            field.name: value.to(device, non_blocking=True)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        pictures = tuple(pixels.to(device, non_blocking=True) for pixels in self.pictures)
        return replace(self, pictures=pictures, **moved)


class MicroBatchBuilder:
    """Builds micro-batches of one shard; each picture of the shard is processed once.

    Its pixels exist once, however many micro-batches, optimizer steps and passes over them read it: at
    1024x1024 they are 25 MB.
    """

    def __init__(
        self,
        processor: BatchProcessor,
        pictures: Mapping[str, bytes],
        carried: frozenset[str] | None = None,
        *,
        packed: bool = True,
    ) -> None:
        """Take the processor, the shard's pictures, and which of `CARRIED` goes into every micro-batch: a
        dummy must look like the others. None: what the samples of each have in common.

        The samples of a micro-batch lie in one row, or with `packed` False in one row each.
        """
        self._processor = processor
        self._packed = packed
        self._carried = carried
        self._tags = ThinkTags.of(processor.tokenizer)
        self._pictures = pictures
        self._processed: dict[str, tuple[Tensor, Grid]] = {}

    def build(self, samples: Sequence[TrainSample]) -> MicroBatch:
        """Lay the samples out as one micro-batch; none gives a dummy without response.

        Raises:
            ValueError: a picture is missing or has another grid than its sample says, or pads do not fit
            pictures.
        """
        texts = [self._expand(sample) for sample in samples]
        rows = texts or [torch.zeros(2, dtype=torch.int64)]  # a dummy's
        lengths = [len(row) for row in rows]
        if self._packed:
            input_ids = torch.cat(rows)[None]
            attention_mask = torch.ones_like(input_ids)
            starts = [sum(lengths[:number]) for number in range(len(texts))]
        else:
            input_ids = pad_sequence(rows, batch_first=True)
            attention_mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
            starts = [number * input_ids.shape[1] for number in range(len(texts))]
        pictures, grids, picture_rows = self._pixels(samples)
        return MicroBatch(
            sample_indices=tuple(sample.index for sample in samples),
            input_ids=input_ids,
            attention_mask=attention_mask,
            image_token_mask=self._image_tokens(input_ids, attention_mask, has_pictures=bool(picture_rows)),
            pictures=pictures,
            picture_grids=grids,
            picture_rows=picture_rows,
            lengths=tuple(lengths) if self._packed else None,
            **_response_arrays(
                samples,
                texts,
                starts,
                self._tags,
                carried_by_all(samples) if self._carried is None else self._carried,
            ),
        )

    def _expand(self, sample: TrainSample) -> Tensor:
        """Return the sample's ids [T] as the model reads them."""
        pad = self._processor.image_token_id
        if pad is None:
            return sample.tokens
        tokens, grids = sample.tokens.tolist(), sample.image_grid_thw
        return torch.tensor(
            expand_image_pads(tokens, grids, pad, self._processor.merge_size), dtype=torch.int64
        )

    def _image_tokens(self, input_ids: Tensor, attention_mask: Tensor, *, has_pictures: bool) -> Tensor:
        if not has_pictures:
            return torch.zeros_like(input_ids)
        return ((input_ids == self._processor.image_token_id) & (attention_mask == 1)).long()

    def _pixels(
        self, samples: Sequence[TrainSample]
    ) -> tuple[tuple[Tensor, ...], Tensor | None, tuple[int, ...]]:
        """Return the distinct pictures' pixels and grids, and which of them each image is."""
        images = [
            (sample.index, sha256, grid)
            for sample in samples
            for sha256, grid in zip(sample.image_hashes, sample.image_grid_thw, strict=True)
        ]
        order = {sha256: row for row, sha256 in enumerate(dict.fromkeys(sha256 for _, sha256, _ in images))}
        if not order:
            return (), None, ()
        self._process({sha256: index for index, sha256, _ in images if sha256 not in self._processed})
        for index, sha256, grid in images:
            self._check_grid(index, sha256, grid)
        pictures = [self._processed[sha256] for sha256 in order]
        grids = torch.tensor([grid for _, grid in pictures])
        return (
            tuple(pixels for pixels, _ in pictures),
            grids,
            tuple(order[sha256] for _, sha256, _ in images),
        )

    def _process(self, new: Mapping[str, int]) -> None:
        """Make and keep the pixels of pictures, given as content hash -> a sample that shows it."""
        missing = [sha256 for sha256 in new if sha256 not in self._pictures]
        if missing:
            raise ValueError(
                f"sample {new[missing[0]]} needs picture {missing[0][:12]}…, which is not among the "
                f"{len(self._pictures)} pictures of this rank's shard."
            )
        if not new:
            return
        decoded = [_decode(self._pictures[sha256]) for sha256 in new]
        features = self._processor.image_processor(images=decoded, return_tensors="pt")
        grids = [(t, h, w) for t, h, w in features["image_grid_thw"].tolist()]
        parts = features["pixel_values"].split([t * h * w for t, h, w in grids])
        self._processed.update(zip(new, zip(parts, grids, strict=True), strict=True))

    def _check_grid(self, index: int, sha256: str, grid: Grid) -> None:
        """Hold the grid that the processor made against the sample's."""
        made = self._processed[sha256][1]
        if made != tuple(grid):
            raise ValueError(
                f"sample {index} carries the grid {tuple(grid)} for picture {sha256[:12]}…, and the image "
                f"processor makes {made} of its bytes; prompt and training must use the same processor and "
                "pixel limits."
            )


def _decode(png: bytes) -> Image.Image:
    with Image.open(io.BytesIO(png)) as image:
        return image.convert("RGB")


def _response_arrays(
    samples: Sequence[TrainSample],
    texts: Sequence[Tensor],
    starts: Sequence[int],
    tags: ThinkTags,
    carried: frozenset[str],
) -> dict[str, Any]:
    """Return the flat arrays [P] of all samples' responses; sample i begins at the flat index `starts[i]`."""
    positions, ids, numbers, thinking = [], [], [], []
    for number, (sample, tokens, start) in enumerate(zip(samples, texts, starts, strict=True)):
        length, response = len(tokens), sample.response_length
        if response >= length:
            raise ValueError(
                f"sample {sample.index} has {length} tokens, {response} of them response; the first response "
                "token needs a prompt token before it."
            )
        positions.append(torch.arange(length - response - 1, length - 1) + start)
        ids.append(tokens[length - response :])
        numbers.append(torch.full((response,), number))
        thinking.append(tags.thinking(tokens, response))
    return {
        "response_positions": _flat(positions, torch.int64),
        "response_ids": _flat(ids, torch.int64),
        "sample_rows": _flat(numbers, torch.int64),
        "loss_mask": _flat([sample.loss_mask for sample in samples], torch.float32),
        "advantages": _flat([sample.advantages for sample in samples], torch.float32),
        "finished": _flat(
            [torch.full((sample.response_length,), sample.finished) for sample in samples], torch.bool
        ),
        "thinking": _flat(thinking, torch.bool),
        **{name: _carried(samples, name) if name in carried else None for name in CARRIED},
    }


def carried_by_all(samples: Iterable[TrainSample]) -> frozenset[str]:
    """Return which of `CARRIED` every sample has."""
    samples = tuple(samples)
    return frozenset(name for name in CARRIED if all(getattr(sample, name) is not None for sample in samples))


def _carried(samples: Sequence[TrainSample], name: str) -> Tensor:
    """Return what all samples carry under `name` as one [P] or [P, K]."""
    if not samples:
        return torch.zeros((0, 1) if name in ROWS_OF_K else (0,), dtype=CARRIED[name])
    return _flat([getattr(sample, name) for sample in samples], CARRIED[name])


def _flat(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat([part.to(dtype) for part in parts]) if parts else torch.zeros(0, dtype=dtype)
