"""The policy on megatron-core: transformers' vision tower, whole on every rank, before Megatron's decoder.

Shape letters: T tokens of a row, L of them on this rank, H values of a hidden state, P response tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.initialization import no_init_weights
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeVisionModel

from slime.backends.batching import MicroBatch
from slime.backends.megatron.attention import RowParams
from slime.backends.megatron.layout import Row
from slime.backends.megatron.outputs import ResponseOutputs, VocabularyShare
from slime.backends.megatron.parallel import Ranks
from slime.backends.megatron.rotary import InterleavedRotary
from slime.backends.megatron.shape import ModelShape
from slime.backends.megatron.spec import block_spec
from slime.backends.megatron.weights import padded_vocabulary


class PolicyModel(MegatronModule):
    """This rank's part of the model; forward passes end in hidden states, a loss asks `outputs` for more."""

    def __init__(
        self,
        config: TransformerConfig,
        hf_config: PreTrainedConfig,
        shape: ModelShape,
        ranks: Ranks,
        device: torch.device,
        *,
        chunk_size: int,
        masked_ids: tuple[int, ...] = (),
    ) -> None:
        """Build it with weights that are not filled; `masked_ids` are never sampled."""
        super().__init__(config=config)
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process, self.post_process = ranks.is_first_stage, ranks.is_last_stage
        self.share_embeddings_and_output_weights = shape.tied
        self.shape = shape
        self._ranks = ranks
        self._chunk_size = chunk_size
        rows = padded_vocabulary(shape.vocabulary, ranks.sizes.tensor)
        self.language_model = GPTModel(
            config=config,
            transformer_layer_spec=block_spec(config, device),  # pyright: ignore[reportArgumentType]
            vocab_size=rows,
            max_sequence_length=0,  # only of embeddings of absolute positions
            pre_process=self.pre_process,
            post_process=self.post_process,
            parallel_output=True,
            share_embeddings_and_output_weights=shape.tied,
            position_embedding_type="none",  # ours, below
            scatter_embedding_sequence_parallel=False,
        )
        self.rotary = InterleavedRotary(shape.head_dim, shape.rope_theta, shape.mrope_section)
        self.vision_model: nn.Module | None = None
        if self.pre_process and shape.sees:
            self.vision_model = _vision_tower(hf_config, config.params_dtype)
            for parameter in self.vision_model.parameters():
                # The copies of tensor-parallel ranks compute the same; on a GPU to rounding, and would drift
                # apart. Gloo cannot average, and on a CPU they are equal.
                averaged: Any = parameter
                averaged.average_gradients_across_tp_domain = device.type == "cuda"
        self._vocabulary = VocabularyShare.of(shape.vocabulary, rows, masked_ids, ranks.tensor, device)
        self.to(device)

    @property
    def decoder(self) -> nn.Module:
        """The decoder, where Megatron's schedules look for it."""
        return self.language_model.decoder

    def shared_embedding_or_output_weight(self) -> Tensor:
        """Return what is both embedding and head, for Megatron to add up its gradients over stages."""
        return self.language_model.shared_embedding_or_output_weight()

    def set_input_tensor(self, input_tensor: list[Tensor | None]) -> None:
        """Take the hidden states of the stage before."""
        self.language_model.set_input_tensor(input_tensor)  # pyright: ignore[reportArgumentType]

    def forward(self, row: Row, batch: MicroBatch) -> Tensor:
        """Return the hidden states [L, 1, H] behind this stage; under sequence parallelism, this rank's."""
        hidden, features = self._embed(row, batch) if self.pre_process else (None, None)
        return self.language_model.decoder(
            hidden_states=hidden,
            attention_mask=None,
            context=features,
            rotary_pos_emb=self.rotary(row.positions[:, row.local], self.config.params_dtype),
            packed_seq_params=RowParams(row, self._ranks.sharing),
        )

    def outputs(self, hidden: Tensor, row: Row, batch: MicroBatch) -> ResponseOutputs:
        """Return what a loss may ask for, of the last stage's hidden states."""
        if self.config.sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=True
            )
        else:
            hidden = tensor_parallel.copy_to_tensor_model_parallel_region(hidden)
        head: Any = self.language_model.output_layer.weight
        if self.share_embeddings_and_output_weights:
            head = self.shared_embedding_or_output_weight()
        return ResponseOutputs(
            hidden[:, 0].index_select(0, row.response_local),
            head,
            batch.response_ids,
            row.response_rows,
            self._chunk_size,
            self._vocabulary,
            self._ranks.context,
        )

    def _embed(self, row: Row, batch: MicroBatch) -> tuple[Tensor, Tensor | None]:
        """Return this rank's embeddings [L, 1, H] and, with pictures, the features [levels, L, 1, H]."""
        hidden = self.language_model.embedding(input_ids=row.input_ids[None], position_ids=None)  # [T, 1, H]
        if not batch.picture_rows:
            return self._own_share(hidden, row), None
        pooled, levels = self._see(batch)
        places = row.image_tokens.nonzero()[:, 0]
        hidden = hidden.index_copy(0, places, pooled[:, None].to(hidden.dtype))
        empty = torch.zeros_like(hidden)
        features = [
            self._own_share(empty.index_copy(0, places, level[:, None].to(hidden.dtype)), row)
            for level in levels
        ]
        return self._own_share(hidden, row), torch.stack(features) if features else None

    def _own_share(self, states: Tensor, row: Row) -> Tensor:
        """Return what this rank computes of [T, 1, H]."""
        if self._ranks.sizes.context > 1:
            states = states.index_select(0, row.local)
        if self.config.sequence_parallel:
            states = tensor_parallel.scatter_to_sequence_parallel_region(states)
        return states

    def _see(self, batch: MicroBatch) -> tuple[Tensor, list[Tensor]]:
        """Return the features of all pictures, one after the other, and those for each deepstack level.

        Each distinct picture goes through the tower once.
        """
        if self.vision_model is None:
            raise ValueError(
                f"samples {batch.sample_indices} carry pictures and the model has no vision tower; train a "
                "vision-language model, or drop --multimodal-keys."
            )
        pixels, grids = batch.pixel_values, batch.picture_grids
        if pixels is None or grids is None:
            raise ValueError(
                f"samples {batch.sample_indices} carry pictures and their micro-batch no pixels."
            )
        seen: Any = self.vision_model(pixels.to(self.config.params_dtype), grid_thw=grids)
        sizes = (grids.prod(-1) // self.shape.merge_size**2).tolist()

        def per_picture(features: Tensor) -> Tensor:
            parts = features.split(sizes)
            return torch.cat([parts[picture] for picture in batch.picture_rows])

        return per_picture(seen.pooler_output), [per_picture(level) for level in seen.deepstack_features]


def _vision_tower(config: PreTrainedConfig, dtype: torch.dtype) -> nn.Module:
    """Return transformers' vision tower, its weights not filled. Its buffers are float32 and complete: they
    are made from the config."""
    vision: Any = config.vision_config  # pyright: ignore[reportAttributeAccessIssue]
    tower = Qwen3VLMoeVisionModel if config.model_type == "qwen3_vl_moe" else Qwen3VLVisionModel
    with no_init_weights():
        return tower._from_config(vision, dtype=dtype, attn_implementation="sdpa")
