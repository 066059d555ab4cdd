"""The checkpoint, Qwen3-VL or the text-only Qwen3, and its two forwards: prefill of whole prompts, decode of
one token per row.

It drives transformers' own layers, so its numbers are transformers' numbers; scheduling and sampling are
elsewhere.
"""

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
)
from transformers.utils import logging as transformers_logging

from slime.engines.transformers_engine.images import Pixels
from slime.engines.transformers_engine.kv_cache import DecodeKV, KVCache, PrefillKV
from slime.engines.transformers_engine.prompt import Prompt
from slime.engines.transformers_engine.sampling import SamplingBatch, sample

ATTENTION = "slime_batched"
EMBEDDING = "embed_tokens.weight"
"""How the name of the embedding's tensor ends."""
MODEL_TYPES = ("qwen3_vl", "qwen3_vl_moe", "qwen3", "qwen3_moe")
STORED_AS_SERVED = ("qwen3_vl", "qwen3")
"""Types whose files hold the served tensors as they are; transformers converts those of other types."""


@dataclass
class ForwardCounts:
    """How often each part of the model ran since the start."""

    decode_forwards: int = 0
    prefill_forwards: int = 0
    prefill_tokens: int = 0
    """Prompt tokens in the prefills, padding not counted."""
    decode_tokens: int = 0
    vision_forwards: int = 0
    vision_images: int = 0

    def as_dict(self) -> dict[str, int]:
        """The counts by name."""
        return asdict(self)


@dataclass
class Prefill:
    """Final hidden states `[U, T, H]` and per layer keys and values `[U, kv_heads, T, dim]`."""

    hidden: Tensor
    kv: PrefillKV


def batched_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: object,
) -> tuple[Tensor, None]:
    """Attend: causally over a prefill (no mask), or one query per row over a padded past `[B, 1, 1, S]`."""
    batch, heads, length, dim = query.shape
    kv_heads = key.shape[1]
    if attention_mask is None:
        if heads != kv_heads:
            key, value = (t.repeat_interleave(heads // kv_heads, dim=1) for t in (key, value))
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
        return out.transpose(1, 2), None
    # The query heads that share a key head become that head's queries: no copy of the past.
    query = query.reshape(batch, kv_heads, heads // kv_heads, dim)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling)
    return out.reshape(batch, length, heads, dim), None


AttentionInterface.register(ATTENTION, batched_attention)


class EngineModel:
    """A loaded checkpoint on one device. Every method but `read_weights` belongs to the model thread."""

    def __init__(self, path: str, dtype: torch.dtype, device: torch.device):
        transformers_logging.disable_progress_bar()
        self.config = AutoConfig.from_pretrained(path)
        if self.config.model_type not in MODEL_TYPES:
            raise ValueError(
                f"{path} is a {self.config.model_type} checkpoint; the transformers engine serves "
                f"{', '.join(MODEL_TYPES)}. Use an SGLang server for others."
            )
        self.sees: bool = hasattr(self.config, "vision_config")
        self.text_config: Any = self.config.get_text_config()
        if self.text_config.to_dict().get("sliding_window") is not None:
            raise ValueError(
                f"{path} attends within a sliding window, and the transformers engine to the whole past. Use "
                "an SGLang server for it."
            )
        self.dtype, self.device = dtype, device
        self.net = self._load(path).to(device)
        self.net.requires_grad_(False)
        self.text = self.net.get_decoder()
        self.text.config._attn_implementation = ATTENTION
        self.vocab_size: int = self.text_config.vocab_size
        self.eos_ids = _eos_ids(path, self.text_config)
        self.counts = ForwardCounts()

    def new_cache(self) -> KVCache:
        """Return an empty cache of this model's shape."""
        text = self.text_config
        heads = text.num_attention_heads
        dim = text.head_dim or text.hidden_size // heads
        return KVCache(text.num_hidden_layers, text.num_key_value_heads, dim, self.dtype, self.device)

    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values that one token of one row takes."""
        text = self.text_config
        dim = text.head_dim or text.hidden_size // text.num_attention_heads
        return 2 * text.num_hidden_layers * text.num_key_value_heads * dim * self.dtype.itemsize

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Prompt], extras: Sequence[Sequence[int]]) -> Prefill:
        """Forward prompts, each followed by its `extras` (what it had already generated), right-padded.

        Causal attention keeps padding from reaching a real token, so no mask is needed.
        """
        lengths = [p.length + len(extra) for p, extra in zip(prompts, extras, strict=True)]
        shape = (len(prompts), max(lengths))
        ids = np.zeros(shape, dtype=np.int64)
        positions = np.zeros((3, *shape), dtype=np.int64)
        image_mask = np.zeros(shape, dtype=bool)
        for row, (prompt, extra, length) in enumerate(zip(prompts, extras, lengths, strict=True)):
            ids[row, : prompt.length] = prompt.ids
            ids[row, prompt.length : length] = extra
            positions[:, row, : prompt.length] = prompt.positions
            positions[:, row, prompt.length : length] = prompt.next_position + np.arange(len(extra))
            image_mask[row, : prompt.length] = prompt.image_mask
        hidden = self.text.embed_tokens(self._to_device(ids))
        deepstack: list[Tensor] = []
        visual = None
        if image_mask.any():
            visual = self._to_device(image_mask)
            features, deepstack = self._vision([image for prompt in prompts for image in prompt.images])
            hidden[visual] = features
        kv = PrefillKV()
        hidden = self._layers(hidden, self._to_device(positions), None, kv, visual, deepstack)
        self.counts.prefill_forwards += 1
        self.counts.prefill_tokens += sum(lengths)
        return Prefill(hidden, kv)

    @torch.inference_mode()
    def decode(
        self, tokens: Tensor, positions: Tensor, lengths: Tensor, longest: int, cache: KVCache
    ) -> Tensor:
        """Forward a token per row `[B]`, whose past is `lengths` `[B]` long; return final states `[B, H]`.

        `longest` is the greatest of the lengths.
        """
        hidden = self.text.embed_tokens(tokens[:, None])
        places = torch.arange(longest + 1, device=self.device)
        mask = torch.zeros(len(tokens), 1, 1, longest + 1, dtype=self.dtype, device=self.device)
        mask.masked_fill_((places > lengths[:, None])[:, None, None], float("-inf"))
        kv = DecodeKV(cache, lengths, longest + 1)
        hidden = self._layers(hidden, positions[None, :, None].expand(3, -1, 1), mask, kv, None, [])
        self.counts.decode_forwards += 1
        self.counts.decode_tokens += len(tokens)
        return hidden[:, 0]

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Return float32 logits `[N, V]` of final hidden states `[N, H]`."""
        return self.net.lm_head(hidden).float()

    @torch.inference_mode()
    def sample(self, hidden: Tensor, batch: SamplingBatch) -> tuple[Tensor, Tensor]:
        """Return tokens `[B]` and log-probs `[B, V]` of final hidden states `[B, H]`."""
        return sample(self.logits(hidden), batch)

    def read_weights(self, path: str) -> dict[str, Tensor]:
        """Read a checkpoint's weights into host memory, checked against this model; any thread may call it.

        Needs the folder's safetensors files alone. Raises ValueError, OSError or SafetensorError where a file
        is missing, broken or of another model.
        """
        files = sorted(Path(path).glob("*.safetensors"))
        if not files:
            raise ValueError(
                f"{path} has no *.safetensors file; give the folder of a checkpoint of this model."
            )
        weights: dict[str, Tensor] = {}
        for file in files:
            weights |= load_file(file)
        if self.config.model_type in STORED_AS_SERVED:
            self._check_names(path, weights)
        else:
            weights = self._load(path, weights).state_dict()
        own = self.net.state_dict()
        wrong = [name for name, value in own.items() if weights[name].shape != value.shape]
        if wrong:
            raise ValueError(
                f"{path}: {wrong[0]} has shape {tuple(weights[wrong[0]].shape)}, the served model has "
                f"{tuple(own[wrong[0]].shape)} ({len(wrong)} such tensors); give a checkpoint of that model."
            )
        return weights

    def _check_names(self, path: str, weights: dict[str, Tensor]) -> None:
        own = self.net.state_dict().keys()
        embedding = next(name for name in own if name.endswith(EMBEDDING))
        if self.config.tie_word_embeddings and embedding in weights:
            weights.setdefault("lm_head.weight", weights[embedding])
        missing, surplus = sorted(own - weights.keys()), sorted(weights.keys() - own)
        if missing or surplus:
            raise ValueError(
                f"{path} does not hold the served model's tensors: missing {missing[:3]} ({len(missing)}), "
                f"surplus {surplus[:3]} ({len(surplus)}); give a checkpoint of that model."
            )

    def check_part(self, weights: dict[str, Tensor]) -> None:
        """Raise ValueError unless each tensor, in a checkpoint's names, is one of this model's."""
        if self.config.model_type not in STORED_AS_SERVED:
            raise ValueError(
                f"the tensors of a {self.config.model_type} checkpoint are converted as a whole; update its "
                "weights by /update_weights_from_disk."
            )
        own = self.net.state_dict()
        if surplus := sorted(weights.keys() - own.keys()):
            raise ValueError(
                f"the served model has no {surplus[0]} ({len(surplus)} such tensors); send the names of its "
                "checkpoint."
            )
        if wrong := [name for name, value in weights.items() if value.shape != own[name].shape]:
            raise ValueError(
                f"{wrong[0]} has shape {tuple(weights[wrong[0]].shape)}, the served model has "
                f"{tuple(own[wrong[0]].shape)} ({len(wrong)} such tensors)."
            )

    @torch.inference_mode()
    def write_weights(self, weights: dict[str, Tensor]) -> None:
        """Overwrite served weights in place, all or some. On return nothing reads `weights` any more."""
        own = self.net.state_dict()
        for name, value in weights.items():
            own[name].copy_(value)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _load(self, path: str, weights: dict[str, Tensor] | None = None) -> Any:
        """Load a checkpoint folder, or convert `weights` that were read from it; refuse what does not fit."""
        options: Any = {
            "config": copy.deepcopy(self.config),
            "dtype": self.dtype,
            "output_loading_info": True,
        }
        loaded: Any
        if weights is None:
            kind = AutoModelForImageTextToText if self.sees else AutoModelForCausalLM
            loaded = kind.from_pretrained(path, **options)
        else:
            loaded = type(self.net).from_pretrained(None, state_dict=weights, **options)
        net, info = loaded
        wrong = {key: sorted(map(str, names)) for key, names in info.items() if names}
        if wrong:
            shown = "; ".join(f"{key}: {', '.join(names[:3])} ({len(names)})" for key, names in wrong.items())
            raise ValueError(f"{path} does not fit the model that its config describes: {shown}")
        return net.eval()

    def _vision(self, images: Sequence[Pixels]) -> tuple[Tensor, list[Tensor]]:
        """Run the vision tower once per distinct picture; return features `[M, H]` and taps, in order."""
        distinct: dict[bytes, int] = {}
        unique: list[Pixels] = []
        for image in images:
            if image.digest not in distinct:
                distinct[image.digest] = len(unique)
                unique.append(image)
        pixels = torch.cat([image.values for image in unique]).to(self.device, self.dtype)
        grids = torch.tensor([image.grid for image in unique], device=self.device)
        out = self.net.model.visual(pixels, grid_thw=grids, return_dict=True)
        self.counts.vision_forwards += 1
        self.counts.vision_images += len(unique)
        merge = self.config.vision_config.spatial_merge_size
        sizes = [image.merged_tokens(merge) for image in unique]
        order = [distinct[image.digest] for image in images]

        def in_order(features: Tensor) -> Tensor:
            parts = features.split(sizes)
            return torch.cat([parts[index] for index in order])

        return in_order(out.pooler_output), [in_order(tap) for tap in out.deepstack_features]

    def _layers(
        self,
        hidden: Tensor,
        positions: Tensor,
        mask: Tensor | None,
        kv: PrefillKV | DecodeKV,
        visual: Tensor | None,
        deepstack: Sequence[Tensor],
    ) -> Tensor:
        # Without pictures the three axes are one.
        rotary = self.text.rotary_emb(hidden, positions if self.sees else positions[0])
        for index, layer in enumerate(self.text.layers):
            hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary, past_key_values=kv)
            if visual is not None and index < len(deepstack):
                hidden[visual] += deepstack[index]
        return self.text.norm(hidden)

    def _to_device(self, array: Any) -> Tensor:
        return torch.from_numpy(array).to(self.device)


def _eos_ids(path: str, text_config: Any) -> frozenset[int]:
    """Collect the end-of-sequence ids of the model's config and of its generation config."""
    given = [text_config.eos_token_id]
    if (Path(path) / "generation_config.json").exists():
        given.append(GenerationConfig.from_pretrained(path).eos_token_id)
    ids: set[int] = set()
    for value in given:
        ids |= set(value) if isinstance(value, list) else {value}
    return frozenset(id_ for id_ in ids if id_ is not None)
