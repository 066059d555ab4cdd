"""A rank's parameters under the names of the whole model, each with what the table says of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import nn

from slime.backends.megatron.model import PolicyModel
from slime.backends.megatron.parallel import Ranks
from slime.backends.megatron.weights import Weight, canonical_name, describe


@dataclass(frozen=True)
class Named:
    """One parameter of this rank."""

    name: str
    """Over the whole model, see `weights.canonical_name`."""
    parameter: nn.Parameter
    weight: Weight
    rank: int
    """This rank's among those that share the parameter."""
    ranks: int


def named_parameters(model: PolicyModel, ranks: Ranks, *, published_experts: bool = True) -> list[Named]:
    """Return this rank's parameters in the order of the model."""
    layers: Any = model.language_model.decoder.layers
    first_layer = layers[0].layer_number - 1 if len(layers) else 0
    expert_rank, expert_tensor_rank = ranks.expert_place
    first_expert = expert_rank * (model.shape.experts // ranks.sizes.expert)
    places = {
        "whole": (0, 1),
        "tensor": (ranks.tensor.rank(), ranks.sizes.tensor),
        "expert": (expert_tensor_rank, ranks.sizes.expert_tensor),
    }
    found = []
    for own_name, parameter in model.named_parameters():
        name = canonical_name(own_name, first_layer, first_expert)
        weight = describe(model.shape, name, tuple(parameter.shape), published_experts=published_experts)
        found.append(Named(name, parameter, weight, *places[weight.split]))
    return found


def mark_shared(parameters: list[Named]) -> None:
    """Tell Megatron which parameters are slices, so that gradient norms count each value once.

    It does so itself only where it draws the weights. Experts count on every rank: those of one
    expert-parallel group differ.
    """
    for named in parameters:
        for attribute in ("tensor_model_parallel", "partition_dim", "partition_stride"):
            if hasattr(named.parameter, attribute):
                delattr(named.parameter, attribute)
        is_slice = named.weight.split != "whole"
        set_tensor_model_parallel_attributes(
            named.parameter, is_slice, named.weight.dim if is_slice else -1, 1
        )
