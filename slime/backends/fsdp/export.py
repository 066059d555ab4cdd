"""Sharded weights back into the tensors of a Hugging Face folder, one at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

PUBLISHED_EXPERTS = {"qwen3_vl_moe": (".mlp.experts.gate_up_proj", ".mlp.experts.down_proj")}
"""Weights that are [experts, in, out] in published checkpoints and [experts, out, in] in memory.

`save_pretrained` of transformers 5.19 leaves them as in memory, which it can read and SGLang cannot.
"""


def hf_named_parameters(hf: PreTrainedModel, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yield name and gathered tensor of each weight, in `dtype`, as published checkpoints hold it.

    A tied weight comes once, under the name of the module that owns it; layouts that transformers changes
    while it loads (the experts of a mixture) are changed back. Collective: every rank goes through all.
    """
    transposed = PUBLISHED_EXPERTS.get(hf.config.model_type, ())
    for name, parameter in hf.named_parameters():
        full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        tensor = full.detach().to(dtype)
        if name.endswith(transposed):
            yield name, tensor.transpose(1, 2).contiguous()
        else:
            yield from revert_weight_conversion(hf, {name: tensor}).items()
