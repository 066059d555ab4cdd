"""What a model that is only asked says of responses: its log-probs, and its likeliest tokens with the rest.

Shape letters: P response tokens of a micro-batch, K likeliest tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from slime.backends.base import LossInputs


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The scores of one micro-batch, on the CPU, without gradient."""

    log_probs: Tensor
    """float32 [P], of the response's tokens."""
    top_ids: Tensor | None = None
    """int64 [P, K], likeliest first; None where they were not asked for, as the two below."""
    top_log_probs: Tensor | None = None
    """float32 [P, K]."""
    tail_mass: Tensor | None = None
    """float32 [P], the probability of all other tokens together."""


@torch.no_grad()
def scores_of(outputs: LossInputs, top_k: int) -> Scores:
    """Read the scores off the model's outputs, with the `top_k` likeliest tokens where that is above 0."""
    log_probs = outputs.log_probs.cpu()
    if top_k == 0:
        return Scores(log_probs=log_probs)
    ids = outputs.top_ids(top_k)
    top_log_probs, log_rest = outputs.gather_with_rest(ids)
    return Scores(
        log_probs=log_probs,
        top_ids=ids.cpu(),
        top_log_probs=top_log_probs.cpu(),
        tail_mass=log_rest.exp().cpu(),
    )
