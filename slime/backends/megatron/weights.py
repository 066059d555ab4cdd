"""One table between a Hugging Face checkpoint and Megatron's parameters, read in both directions.

A rank's shard of a Megatron parameter is made of blocks of checkpoint tensors: `Weight.pieces` says which
block lies in which of its rows. Loading copies blocks into shards, export copies the shards of all ranks into
blocks, so a round trip is the identity whatever the parallelism. Nothing here needs megatron or a process
group. Names are Megatron's without TransformerEngine and count layers and experts over the whole model;
`canonical_name` brings a rank's own names there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from slime.backends.megatron.shape import ModelShape

Split = Literal["whole", "tensor", "expert"]
"""Which ranks share a parameter: none (each has all of it), those of tensor parallelism, those of experts."""

VISION = "vision_model."
TEXT = "language_model."
EMBEDDING = "language_model.embedding.word_embeddings.weight"
HEAD = "language_model.output_layer.weight"

_LAYER = re.compile(r"language_model\.decoder\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(linear_fc[12])\.weight")
_GROUPED_EXPERT = re.compile(r"mlp\.experts\.(linear_fc[12])\.weight(\d+)")
_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
"""TransformerEngine's names of a norm that is one module with the linear layer behind it."""
_WHOLE = {
    "input_layernorm.weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "mlp.router.weight": "mlp.gate.weight",
}


@dataclass(frozen=True)
class Piece:
    """A block of a checkpoint tensor that fills rows of a shard."""

    source: str
    """The checkpoint tensor."""
    block: tuple[slice, ...]
    """Of its dimensions; () is all of it."""
    rows: slice
    """Of the shard."""
    expert: int | None = None
    """Where the checkpoint tensor holds all experts, which one; `block` is of the two other dimensions."""
    transposed: bool = False
    """Whether the block is [in, out] and the shard [out, in]."""


@dataclass(frozen=True)
class Weight:
    """One Megatron parameter as the checkpoint knows it."""

    unit: str
    """What is exported together: experts of a layer, which may share a tensor, or the parameter alone."""
    split: Split
    dim: int
    """The dimension along which ranks share it; of no meaning where it is whole."""
    sources: Mapping[str, tuple[int, ...]]
    """The checkpoint tensors that it is made of, with their whole shapes."""
    pieces: Callable[[int, int], list[Piece]]
    """(rank, size) of the ranks that share it -> what the shard of that rank is made of."""


def canonical_name(name: str, first_layer: int, first_expert: int) -> str:
    """Return the name of a rank's parameter over the whole model.

    `first_layer` and `first_expert` are the numbers of the rank's first ones.
    """
    match = _LAYER.fullmatch(name)
    if match is None:
        return name
    layer, rest = int(match[1]) + first_layer, match[2]
    rest = _FUSED_NORMS.get(rest, rest)
    if expert := _EXPERT.fullmatch(rest):
        rest = f"mlp.experts.local_experts.{int(expert[1]) + first_expert}.{expert[2]}.weight"
    elif expert := _GROUPED_EXPERT.fullmatch(rest):
        rest = f"mlp.experts.local_experts.{int(expert[2]) + first_expert}.{expert[1]}.weight"
    return f"language_model.decoder.layers.{layer}.{rest}"


def of_expert(name: str, expert: int) -> str:
    """Return the canonical name of the same parameter of another expert."""
    return re.sub(r"local_experts\.\d+\.", f"local_experts.{expert}.", name)


def describe(
    shape: ModelShape, name: str, size: tuple[int, ...], *, published_experts: bool = True
) -> Weight:
    """Return what the table says of the parameter `name` (canonical).

    `size` is the parameter's own, needed where the model's shape does not tell: in the vision tower. Experts
    of Qwen3-VL are [experts, in, out] in published checkpoints; transformers 5.19 saves them the other way
    round, which `published_experts` False reads.

    Raises:
        ValueError: the table does not know the name.
    """
    if name.startswith(VISION):
        return _whole(name, "model.visual." + name.removeprefix(VISION), size)
    if name == EMBEDDING:
        return _vocabulary(shape, name, f"{shape.text_prefix}embed_tokens.weight")
    if name == HEAD:
        tied = f"{shape.text_prefix}embed_tokens.weight"
        return _vocabulary(shape, name, tied if shape.tied else "lm_head.weight")
    if name == "language_model.decoder.final_layernorm.weight":
        return _whole(name, f"{shape.text_prefix}norm.weight", (shape.hidden,))
    match = _LAYER.fullmatch(name)
    if match is None:
        raise ValueError(
            f"the model has a parameter {name}, and the table knows no checkpoint tensor for it."
        )
    return _of_layer(shape, name, f"{shape.text_prefix}layers.{match[1]}.", match[2], published_experts)


def _of_layer(shape: ModelShape, name: str, prefix: str, rest: str, published_experts: bool) -> Weight:
    hidden = shape.hidden
    if rest in _WHOLE:
        size = {
            "mlp.router.weight": (shape.experts, hidden),
            "self_attention.q_layernorm.weight": (shape.head_dim,),
            "self_attention.k_layernorm.weight": (shape.head_dim,),
        }.get(rest, (hidden,))
        return _whole(name, prefix + _WHOLE[rest], size)
    if rest == "self_attention.linear_qkv.weight":
        return _qkv(shape, name, prefix + "self_attn.")
    if rest == "self_attention.linear_proj.weight":
        return _columns(name, prefix + "self_attn.o_proj.weight", (hidden, shape.heads * shape.head_dim))
    if rest == "mlp.linear_fc1.weight":
        return _gate_and_up(name, "tensor", prefix + "mlp.", shape.ffn, hidden)
    if rest == "mlp.linear_fc2.weight":
        return _columns(name, prefix + "mlp.down_proj.weight", (hidden, shape.ffn))
    if match := _EXPERT.fullmatch(rest):
        expert, layer = int(match[1]), match[2]
        unit = name.replace(f"local_experts.{expert}.", "local_experts.")
        if shape.fused_experts:
            fused = _fused_gate_and_up if layer == "linear_fc1" else _fused_down
            return fused(shape, unit, prefix + "mlp.experts.", expert, published_experts)
        alone = f"{prefix}mlp.experts.{expert}."
        if layer == "linear_fc1":
            return _gate_and_up(unit, "expert", alone, shape.expert_ffn, hidden)
        return _columns(unit, alone + "down_proj.weight", (hidden, shape.expert_ffn), "expert")
    raise ValueError(f"the model has a parameter {name}, and the table knows no checkpoint tensor for it.")


def _whole(unit: str, source: str, size: tuple[int, ...]) -> Weight:
    return Weight(unit, "whole", 0, {source: size}, lambda rank, ranks: [Piece(source, (), slice(None))])


def _share(total: int, rank: int, ranks: int) -> slice:
    """Return the part of `total` that belongs to one of `ranks`."""
    if total % ranks:
        raise ValueError(f"{total} rows or columns of a weight do not divide over {ranks} ranks.")
    each = total // ranks
    return slice(rank * each, (rank + 1) * each)


def padded_vocabulary(vocabulary: int, ranks: int) -> int:
    """Return how many rows embedding and head have over `ranks` tensor-parallel ranks: equally many each."""
    return -(-vocabulary // ranks) * ranks


def _vocabulary(shape: ModelShape, unit: str, source: str) -> Weight:
    """Rows of tokens; those beyond the checkpoint's vocabulary are filling."""

    def pieces(rank: int, ranks: int) -> list[Piece]:
        mine = _share(padded_vocabulary(shape.vocabulary, ranks), rank, ranks)
        stop = min(mine.stop, shape.vocabulary)
        if mine.start >= stop:
            return []
        return [Piece(source, (slice(mine.start, stop),), slice(0, stop - mine.start))]

    return Weight(unit, "tensor", 0, {source: (shape.vocabulary, shape.hidden)}, pieces)


def _columns(unit: str, source: str, size: tuple[int, int], split: Split = "tensor") -> Weight:
    def pieces(rank: int, ranks: int) -> list[Piece]:
        return [Piece(source, (slice(None), _share(size[1], rank, ranks)), slice(None))]

    return Weight(unit, split, 1, {source: size}, pieces)


def _gate_and_up(unit: str, split: Split, prefix: str, ffn: int, hidden: int) -> Weight:
    """Each rank has its rows of the gate above its rows of the up projection."""
    names = (prefix + "gate_proj.weight", prefix + "up_proj.weight")

    def pieces(rank: int, ranks: int) -> list[Piece]:
        mine, each = _share(ffn, rank, ranks), ffn // ranks
        return [
            Piece(source, (mine,), slice(half * each, (half + 1) * each)) for half, source in enumerate(names)
        ]

    return Weight(unit, split, 0, dict.fromkeys(names, (ffn, hidden)), pieces)


def _qkv(shape: ModelShape, unit: str, prefix: str) -> Weight:
    """Group by group: its query heads, its key head, its value head."""
    queries = shape.heads // shape.kv_heads * shape.head_dim
    widths = {"q_proj": queries, "k_proj": shape.head_dim, "v_proj": shape.head_dim}

    def pieces(rank: int, ranks: int) -> list[Piece]:
        found, row = [], 0
        groups = _share(shape.kv_heads, rank, ranks)
        for group in range(groups.start, groups.stop):
            for name, width in widths.items():
                block = (slice(group * width, (group + 1) * width),)
                found.append(Piece(f"{prefix}{name}.weight", block, slice(row, row + width)))
                row += width
        return found

    sources = {
        f"{prefix}{name}.weight": (shape.kv_heads * width, shape.hidden) for name, width in widths.items()
    }
    return Weight(unit, "tensor", 0, sources, pieces)


def _fused_gate_and_up(shape: ModelShape, unit: str, prefix: str, expert: int, published: bool) -> Weight:
    source, ffn = prefix + "gate_up_proj", shape.expert_ffn
    size = (shape.experts, *_as_stored((2 * ffn, shape.hidden), published))

    def pieces(rank: int, ranks: int) -> list[Piece]:
        mine, each = _share(ffn, rank, ranks), ffn // ranks
        found = []
        for half in (0, 1):
            block = (slice(half * ffn + mine.start, half * ffn + mine.stop), slice(None))
            rows = slice(half * each, (half + 1) * each)
            found.append(Piece(source, _as_stored(block, published), rows, expert, published))
        return found

    return Weight(unit, "expert", 0, {source: size}, pieces)


def _fused_down(shape: ModelShape, unit: str, prefix: str, expert: int, published: bool) -> Weight:
    source, ffn = prefix + "down_proj", shape.expert_ffn
    size = (shape.experts, *_as_stored((shape.hidden, ffn), published))

    def pieces(rank: int, ranks: int) -> list[Piece]:
        block = (slice(None), _share(ffn, rank, ranks))
        return [Piece(source, _as_stored(block, published), slice(None), expert, published)]

    return Weight(unit, "expert", 1, {source: size}, pieces)


def _as_stored(out_and_in: tuple[Any, Any], published: bool) -> tuple[Any, Any]:
    """Return what belongs to [out, in] in the order in which the checkpoint has the two."""
    return (out_and_in[1], out_and_in[0]) if published else out_and_in
