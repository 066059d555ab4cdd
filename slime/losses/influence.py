"""How strongly a loss pulls at the logits: the one scale on which streams of any form can be compared."""

from __future__ import annotations

from torch import Tensor


def logit_pull(gradient: Tensor, log_probs: Tensor) -> Tensor:
    """Return the 1-norm of the gradient on a position's logits: [P, K], [P, K] -> [P], detached.

    `gradient` belongs to the log-probs [P, K] of K different tokens. With p = softmax(z) and G its sum, the
    gradient on the logit of one of them is `gradient - p G` and on any other `-p G`, so that all the others
    together add `(1 - sum of p) |G|`. A sampled token (K = 1) comes to `2 |gradient| (1 - p)`.
    """
    gradient, probs = gradient.detach(), log_probs.detach().exp()
    total = gradient.sum(dim=1, keepdim=True)
    others = (1 - probs.sum(dim=1)).clamp(min=0) * total[:, 0].abs()
    return (gradient - probs * total).abs().sum(dim=1) + others
