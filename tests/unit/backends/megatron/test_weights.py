"""The table between checkpoint and parameters: every value of a checkpoint is somewhere exactly once."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch

from slime.backends.megatron.shape import ModelShape
from slime.backends.megatron.weights import EMBEDDING, HEAD, Weight, canonical_name, describe, of_expert

DENSE = ModelShape(
    layers=2,
    hidden=12,
    ffn=20,
    heads=8,
    kv_heads=4,
    head_dim=6,
    vocabulary=29,
    tied=False,
    norm_eps=1e-6,
    rope_theta=1e4,
    mrope_section=(1, 1, 1),
)
FUSED = replace(DENSE, experts=4, experts_per_token=2, expert_ffn=8, fused_experts=True)
SINGLE = replace(FUSED, fused_experts=False, mrope_section=None)
LAYER = "language_model.decoder.layers.1."
ATTENTION = ("self_attention.linear_qkv.weight", "self_attention.linear_proj.weight")
FIRST_EXPERT = "mlp.experts.local_experts.0.linear_fc1.weight"
SECOND = "mlp.experts.local_experts.0.linear_fc2.weight"


def weights(shape: ModelShape, name: str) -> list[Weight]:
    """Return a parameter's entry, or those of all experts."""
    if "local_experts" not in name:
        return [describe(shape, name, ())]
    return [describe(shape, of_expert(name, expert), ()) for expert in range(shape.experts)]


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(
    ("shape", "name"),
    [
        *((DENSE, LAYER + name) for name in (*ATTENTION, "mlp.linear_fc1.weight", "mlp.linear_fc2.weight")),
        *((shape, LAYER + name) for shape in (FUSED, SINGLE) for name in (FIRST_EXPERT, SECOND)),
        (DENSE, EMBEDDING),
        (DENSE, HEAD),
    ],
)
def test_ranks_share_every_value_of_the_checkpoint_once(shape: ModelShape, name: str, ranks: int) -> None:
    seen = {
        source: torch.zeros(size, dtype=torch.int64)
        for weight in weights(shape, name)
        for source, size in weight.sources.items()
    }
    rows: Counter[tuple[int, int]] = Counter()
    for number, weight in enumerate(weights(shape, name)):
        for rank in range(ranks):
            for piece in weight.pieces(rank, ranks):
                target = seen[piece.source]
                block = target if piece.expert is None else target[piece.expert]
                block[piece.block] += 1
                filled = block[piece.block].T if piece.transposed else block[piece.block]
                start, stop, _ = piece.rows.indices(10**6)
                rows[number, rank] += len(filled)
                assert stop == 10**6 or stop - start == len(filled)
    assert all(bool((counts == 1).all()) for counts in seen.values())
    if name not in (EMBEDDING, HEAD):  # whose last rank has filling
        assert len(set(rows.values())) == 1


def test_filling_of_the_vocabulary_belongs_to_no_token() -> None:
    pieces = [describe(DENSE, EMBEDDING, ()).pieces(rank, 4) for rank in range(4)]
    assert [sum(piece.rows.stop for piece in of_rank) for of_rank in pieces] == [8, 8, 8, 5]
    tiny = replace(DENSE, vocabulary=5)
    assert [len(describe(tiny, HEAD, ()).pieces(rank, 4)) for rank in range(4)] == [1, 1, 1, 0]


def test_a_tied_head_is_the_embedding() -> None:
    tied = replace(DENSE, tied=True)
    assert list(describe(tied, HEAD, ()).sources) == ["model.language_model.embed_tokens.weight"]
    assert list(describe(DENSE, HEAD, ()).sources) == ["lm_head.weight"]


def test_query_heads_stand_beside_their_keys() -> None:
    pieces = describe(DENSE, LAYER + ATTENTION[0], ()).pieces(1, 4)
    found = [(piece.source.split(".")[-2], piece.block[0].start, piece.rows.start) for piece in pieces]
    assert found == [("q_proj", 12, 0), ("k_proj", 6, 12), ("v_proj", 6, 18)]


def test_experts_lie_as_published_or_as_transformers_saves_them() -> None:
    name = LAYER + of_expert(FIRST_EXPERT, 2)
    published = describe(FUSED, name, ())
    stored = describe(FUSED, name, (), published_experts=False)
    source = "model.language_model.layers.1.mlp.experts.gate_up_proj"
    assert published.sources == {source: (4, 12, 16)}
    assert stored.sources == {source: (4, 16, 12)}
    up = published.pieces(1, 2)[1]
    assert (up.expert, up.block, up.rows) == (2, (slice(None), slice(12, 16)), slice(4, 8))
    assert up.transposed
    assert stored.pieces(1, 2)[1].block == (slice(12, 16), slice(None))
    assert published.unit == describe(FUSED, LAYER + FIRST_EXPERT, ()).unit


@pytest.mark.parametrize(
    ("own", "canonical"),
    [
        ("decoder.layers.0.mlp.linear_fc1.weight", "decoder.layers.3.mlp.linear_fc1.weight"),
        (
            "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight",
            "decoder.layers.4.input_layernorm.weight",
        ),
        ("decoder.layers.1.mlp.linear_fc1.layer_norm_weight", "decoder.layers.4.pre_mlp_layernorm.weight"),
        (
            "decoder.layers.0.mlp.experts.local_experts.1.linear_fc2.weight",
            "decoder.layers.3.mlp.experts.local_experts.9.linear_fc2.weight",
        ),
        (
            "decoder.layers.0.mlp.experts.linear_fc1.weight0",
            "decoder.layers.3.mlp.experts.local_experts.8.linear_fc1.weight",
        ),
        ("embedding.word_embeddings.weight", "embedding.word_embeddings.weight"),
    ],
)
def test_a_ranks_own_names_come_to_the_models(own: str, canonical: str) -> None:
    """Names of TransformerEngine's fused modules among them."""
    assert canonical_name(f"language_model.{own}", 3, 8) == f"language_model.{canonical}"


def test_an_unknown_parameter_is_refused() -> None:
    with pytest.raises(ValueError, match=r"has a parameter .*linear_fc1\.bias, and the table knows"):
        describe(DENSE, LAYER + "mlp.linear_fc1.bias", (20,))
    with pytest.raises(ValueError, match="4 rows or columns of a weight do not divide over 3 ranks"):
        describe(DENSE, LAYER + ATTENTION[0], ()).pieces(0, 3)


def test_a_whole_parameter_is_whole() -> None:
    weight = describe(DENSE, "vision_model.blocks.0.norm1.weight", (7,))
    assert weight.sources == {"model.visual.blocks.0.norm1.weight": (7,)}
    assert [math.prod(size) for size in weight.sources.values()] == [7]
    assert weight.pieces(0, 1)[0].block == ()
