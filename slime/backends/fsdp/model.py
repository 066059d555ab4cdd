"""A Hugging Face model whose forward pass ends in a loss over response positions.

The loss runs inside the forward pass, so everything that touches parameters, the LM head included, lies
between FSDP's gather and release. The LM head never sees a prompt position.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

from slime.backends.attention import borders
from slime.backends.base import LossInputs
from slime.backends.batching import MicroBatch
from slime.backends.fsdp.outputs import ResponseOutputs

Result = TypeVar("Result")


class PolicyModel(nn.Module):
    """The root module that FSDP shards: `forward(batch, use)` calls `use` with the response outputs."""

    def __init__(
        self,
        hf: PreTrainedModel,
        chunk_size: int,
        masked_ids: Sequence[int] = (),
        *,
        packed: bool = True,
    ) -> None:
        """Wrap `hf`, a causal language model with or without a vision tower; `masked_ids` are never sampled.

        With `packed` its attention is `packed_attention`; else one that reads a mask.
        """
        super().__init__()
        self.hf = hf
        self._chunk_size = chunk_size
        self._masked_ids = tuple(masked_ids)
        self._packed = packed

    @property
    def vision_tower(self) -> nn.Module | None:
        """The vision tower, or None in a text-only model."""
        return getattr(self.hf.base_model, "visual", None)

    def forward(self, batch: MicroBatch, use: Callable[[LossInputs], Result]) -> Result:
        """Return `use(outputs)`, outputs being those of the P response positions of `batch`."""
        hidden = self._hidden_states(batch)  # [B, T, H]
        hidden = hidden.flatten(0, 1).index_select(0, batch.response_positions)  # [P, H]
        head: Any = self.hf.get_output_embeddings()
        masked = torch.tensor(self._masked_ids, device=hidden.device) if self._masked_ids else None
        return use(ResponseOutputs(hidden, head.weight, batch.response_ids, self._chunk_size, masked))

    def _hidden_states(self, batch: MicroBatch) -> Tensor:
        """Return the last hidden states [B, T, H]."""
        model: Any = self.hf.base_model
        if self.vision_tower is None:
            if batch.picture_rows:
                raise ValueError(
                    f"samples {batch.sample_indices} carry pictures and {type(self.hf).__name__} has no "
                    "vision tower; train a vision-language model, or drop --multimodal-keys."
                )
            return model(
                input_ids=batch.input_ids, **self._separation(batch), use_cache=False
            ).last_hidden_state
        if not batch.picture_rows:
            return self._text_beside_idle_tower(batch)
        features, grids = _image_features(model, batch)
        separation = self._separation(batch)
        if batch.lengths is not None:
            separation["position_ids"] = _picture_positions(model, batch, batch.lengths, grids)
        return model(
            input_ids=batch.input_ids,
            **separation,
            mm_token_type_ids=batch.image_token_mask,
            image_grid_thw=grids,
            mm_encoder_outputs={"image": features},
            use_cache=False,
        ).last_hidden_state

    def _separation(self, batch: MicroBatch) -> dict[str, Any]:
        """Return what keeps samples apart: the mask of padded rows, or borders and positions in one row."""
        if (batch.lengths is not None) != self._packed:
            kinds = ("padded", "packed")
            raise ValueError(
                f"a {kinds[batch.lengths is not None]} micro-batch was given to a model that reads "
                f"{kinds[self._packed]} ones; --train-layout says which, to both."
            )
        if batch.lengths is None:
            return {"attention_mask": batch.attention_mask}
        device = batch.input_ids.device
        counts = torch.cat([torch.arange(length) for length in batch.lengths]).to(device)
        return {
            "attention_mask": None,
            "position_ids": counts[None],
            **borders(batch.lengths, device),
        }

    def _text_beside_idle_tower(self, batch: MicroBatch) -> Tensor:
        """Run the vision tower on a blank picture times zero, then the text, so that ranks gather in step.

        Text positions are plain counts, which is what mRoPE comes to without a picture.
        """
        model: Any = self.hf.base_model
        config = self.hf.config.vision_config
        merge, device = config.spatial_merge_size, batch.input_ids.device
        patch = config.in_channels * config.temporal_patch_size * config.patch_size**2
        features = model.get_image_features(
            torch.zeros(merge**2, patch, device=device),
            torch.tensor([[1, merge, merge]], device=device),
            return_dict=True,
        )
        parts = [*features.pooler_output, *(part for level in features.deepstack_features for part in level)]
        embeddings = model.get_input_embeddings()(batch.input_ids)
        embeddings = embeddings + 0 * torch.stack([part.sum() for part in parts]).sum()
        return model.language_model(
            inputs_embeds=embeddings, **self._separation(batch), use_cache=False
        ).last_hidden_state


def reshard(model: nn.Module) -> None:
    """Free what a forward pass without a backward pass has left gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _image_features(model: Any, batch: MicroBatch) -> tuple[BaseModelOutputWithDeepstackFeatures, Tensor]:
    """Encode each distinct picture once; return features and grids [I, 3] of every image in the batch."""
    pixel_values = batch.pixel_values
    if pixel_values is None or batch.picture_grids is None:
        raise ValueError(f"samples {batch.sample_indices} carry pictures and their micro-batch no pixels.")
    features = model.get_image_features(pixel_values, batch.picture_grids, return_dict=True)
    rows = list(batch.picture_rows)
    pooled: Any = [features.pooler_output[row] for row in rows]
    deepstack: Any = [[level[row] for row in rows] for level in features.deepstack_features]
    spread = BaseModelOutputWithDeepstackFeatures(pooler_output=pooled, deepstack_features=deepstack)
    return spread, batch.picture_grids[rows]


def _picture_positions(model: Any, batch: MicroBatch, lengths: Sequence[int], grids: Tensor) -> Tensor:
    """Return the mRoPE positions [3, 1, T] of a packed row: each sample's own, from 0 on."""
    ids, kinds, mask = (
        pad_sequence(list(row[0].split(list(lengths))), batch_first=True)
        for row in (batch.input_ids, batch.image_token_mask, batch.attention_mask)
    )
    positions, _ = model.get_rope_index(
        ids, mm_token_type_ids=kinds, image_grid_thw=grids, attention_mask=mask
    )
    return positions[:, None, mask.bool()]
