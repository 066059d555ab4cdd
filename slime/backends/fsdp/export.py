"""Sharded weights back into the tensors of a Hugging Face folder, one at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion


def hf_named_parameters(hf: PreTrainedModel, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yield name and gathered tensor of each weight, in `dtype`, as `save_pretrained` would write it.

    A tied weight comes once, under the name of the module that owns it; layouts that transformers changes while it
    loads (the experts of a mixture) are changed back. Collective: every rank goes through all of them.
    """
    for name, parameter in hf.named_parameters():
        full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        yield from revert_weight_conversion(hf, {name: full.detach().to(dtype)}).items()
