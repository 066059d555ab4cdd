"""What the backend knows of a model: the numbers of its config, checked for what is built here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, PreTrainedConfig

if TYPE_CHECKING:
    from slime.arguments import Args

VISION_TYPES = ("qwen3_vl", "qwen3_vl_moe")
TEXT_TYPES = ("qwen3", "qwen3_moe")
MROPE_SECTION = (24, 20, 20)
"""Of a config that does not say: transformers' default."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes and names of a Qwen3 or Qwen3-VL, dense or a mixture of experts."""

    layers: int
    hidden: int
    ffn: int
    """Inner width of the dense MLP."""
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    """Whether the LM head is the embedding."""
    norm_eps: float
    rope_theta: float
    experts: int = 0
    """0: dense."""
    experts_per_token: int = 0
    expert_ffn: int = 0
    fused_experts: bool = False
    """Whether a checkpoint holds all experts of a layer in one tensor (Qwen3-VL) or each alone (Qwen3)."""
    mrope_section: tuple[int, int, int] | None = None
    """Frequencies of time, height and width; None without vision."""
    deepstack_levels: int = 0
    """Feature maps of the vision tower that are added after the first text layers, one each."""
    merge_size: int = 1
    """Patches of a picture's side that become one token."""

    @property
    def sees(self) -> bool:
        """Whether the model has a vision tower."""
        return self.mrope_section is not None

    @property
    def text_prefix(self) -> str:
        """Where the text model's weights are in a checkpoint."""
        return "model.language_model." if self.sees else "model."


def read_config(path: str | Path) -> PreTrainedConfig:
    """Return the config of a Hugging Face folder."""
    return AutoConfig.from_pretrained(path)


def shape_of(config: PreTrainedConfig) -> ModelShape:
    """Return the shape that a config describes.

    Raises:
        ValueError: a kind of model, or a feature of it, that this backend does not build.
    """
    kind = config.model_type
    if kind not in (*VISION_TYPES, *TEXT_TYPES):
        raise ValueError(
            f"--train-backend megatron builds {', '.join((*VISION_TYPES, *TEXT_TYPES))}, and the checkpoint "
            f"is a {kind}; use --train-backend fsdp."
        )
    text: Any = config.get_text_config()
    vision: Any = config.vision_config if kind in VISION_TYPES else None
    rope = text.rope_parameters
    mixture = kind.endswith("_moe")
    _require_known(text, rope, mixture=mixture, sees=vision is not None)
    return ModelShape(
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        ffn=text.intermediate_size,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_dim=text.head_dim,
        vocabulary=text.vocab_size,
        tied=bool(config.tie_word_embeddings),
        norm_eps=text.rms_norm_eps,
        rope_theta=rope["rope_theta"],
        experts=text.num_experts if mixture else 0,
        experts_per_token=text.num_experts_per_tok if mixture else 0,
        expert_ffn=text.moe_intermediate_size if mixture else 0,
        fused_experts=mixture and vision is not None,
        mrope_section=tuple(rope.get("mrope_section", MROPE_SECTION)) if vision is not None else None,
        deepstack_levels=len(vision.deepstack_visual_indexes) if vision is not None else 0,
        merge_size=vision.spatial_merge_size if vision is not None else 1,
    )


def require_declared(args: Args, shape: ModelShape) -> None:
    """Hold the model that the flags expect (MODEL_ARGS of scripts/models) against the checkpoint's.

    Raises:
        ValueError: they differ.
    """
    declared: dict[str, tuple[float | None, float]] = {
        "--num-layers": (args.num_layers, shape.layers),
        "--hidden-size": (args.hidden_size, shape.hidden),
        "--ffn-hidden-size": (args.ffn_hidden_size, shape.ffn),
        "--num-attention-heads": (args.num_attention_heads, shape.heads),
        "--num-query-groups": (args.num_query_groups, shape.kv_heads),
        "--kv-channels": (args.kv_channels, shape.head_dim),
        "--vocab-size": (args.vocab_size, shape.vocabulary),
        "--rotary-base": (args.rotary_base, shape.rope_theta),
        "--norm-epsilon": (args.norm_epsilon, shape.norm_eps),
        "--num-experts": (args.num_experts, shape.experts),
        "--moe-router-topk": (args.moe_router_topk, shape.experts_per_token),
        "--moe-ffn-hidden-size": (args.moe_ffn_hidden_size, shape.expert_ffn),
    }
    wrong = [
        f"{flag} is {given:g} and the checkpoint has {has:g}"
        for flag, (given, has) in declared.items()
        if given is not None and given != has
    ]
    if args.num_layers is not None and args.untie_embeddings_and_output_weights == shape.tied:
        flag = "--untie-embeddings-and-output-weights"
        wrong.append(f"{flag} is {'not ' if not shape.tied else ''}set and the checkpoint says otherwise")
    if wrong:
        raise ValueError(
            f"{args.hf_checkpoint} is not the model that the flags expect: {'; '.join(wrong)}. Give its own "
            "MODEL_ARGS (scripts/models), or none."
        )


def require_same_tokens(
    path: str, config: PreTrainedConfig, other_path: str, other: PreTrainedConfig
) -> None:
    """Refuse a second model that would read the first one's tokens and pixels as something else.

    Raises:
        ValueError: the two are not of one family.
    """
    for name in ("vocab_size", "image_token_id", "patch_size", "spatial_merge_size", "temporal_patch_size"):
        values = [_find(each, name) for each in (config, other)]
        if values[0] != values[1]:
            raise ValueError(
                f"{other_path} has {name} {values[1]} and {path} has {values[0]}: the models do not read the "
                "same tokens and pixels. Take a model of the same family, or serve the teacher (--opd-type "
                "sglang)."
            )


def _find(config: PreTrainedConfig, name: str) -> Any:
    """Return a number of the model's, text's or vision's config; None where there is none."""
    parts = (config, config.get_text_config(), getattr(config, "vision_config", None))
    return next((getattr(part, name) for part in parts if part is not None and hasattr(part, name)), None)


def _require_known(text: Any, rope: Any, *, mixture: bool, sees: bool) -> None:
    """Refuse what would be left out of the model without a word."""
    unknown = {
        "rope_type": rope["rope_type"] != "default",
        "mrope_interleaved": sees and not rope.get("mrope_interleaved", True),
        "attention_bias": bool(text.attention_bias),
        "hidden_act": text.hidden_act != "silu",
        "use_sliding_window": bool(getattr(text, "use_sliding_window", False)),
        "norm_topk_prob": mixture and not getattr(text, "norm_topk_prob", True),
        "decoder_sparse_step": mixture and text.decoder_sparse_step != 1,
        "mlp_only_layers": mixture and bool(text.mlp_only_layers),
    }
    found = [name for name, is_unknown in unknown.items() if is_unknown]
    if found:
        values = ", ".join(f"{name} {getattr(text, name, rope.get(name))}" for name in found)
        raise ValueError(
            f"the checkpoint's config has {values}, which --train-backend megatron does not build; use "
            "--train-backend fsdp."
        )
