"""Truncated importance weights: learning about one distribution from tokens that another one drew.

At a prefix s, a token y is drawn from q(.|s), the engine's student as it sampled: at the rollout
temperature, in the engine's arithmetic, perhaps under older weights. `rollout_log_probs` are log q(y|s).
What is learned is about p(.|s), the trainer's student at temperature 1, because a teacher's scores are at
temperature 1. With

    w(s, y) = p(y|s) / q(y|s)        E_{y~q}[w f(y)] = E_{y~p}[f(y)]        for every f

a weighted mean over sampled tokens is the mean that on-policy sampling would have given. For
f = (log p - log p_T) grad log p it is the exact gradient of the reverse KL of the position,
KL(p(.|s) || p_T(.|s)). Without the weight it is the gradient of nothing: grad log p has no zero mean under
q, so that even a signal which is the same for all tokens would move the student.

For q at temperature t, q = p^(1/t) / Z with Z the sum of p^(1/t) over the vocabulary, and
w = Z p^(1 - 1/t). Above temperature 1 no weight exceeds Z; below 1 the weights of rare tokens have no bound.
A bound C trades that variance for a bias of known size, and a lower bound c, 0 unless asked for, adds one of
the other sign:

    E_q[clip(w, c, C) f] - E_p[f] = - sum_y max(p - C q, 0) f(y) + sum_y max(c q - p, 0) f(y)

What the weights leave as it is: the prefixes, which are those that q visits. To weigh them too would take
the product of all earlier weights of the response, of a variance that grows exponentially with its length;
so a per-position loss (the distillation signal) is exact at every prefix, and an advantage of a whole
response (the task reward) is corrected in its last factor only. And the policy ratio p_new / p_old, which
is between two students at temperature 1 and is clipped on its own.

Weights are detached and unnormalised: their expectation is 1, so denominators stay counts of tokens.
Whatever is a mean over sampled tokens takes them, losses and metrics alike; the entropy, which is summed
over the vocabulary, and counts of tokens do not.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class ImportanceWeights(NamedTuple):
    """Per-token weights and which of them were cut, both [P] and detached."""

    weights: Tensor
    clipped: Tensor
    """1.0 where the ratio lay outside the bounds."""


def truncated_weights(
    log_probs: Tensor, rollout_log_probs: Tensor, high: float, low: float = 0.0
) -> ImportanceWeights:
    """Return `clip(exp(log_probs - rollout_log_probs), low, high)`: [P], [P] -> [P].

    `log_probs` belong to the policy that is learned about, as it is before the first step on these tokens:
    the old ones where a batch is used for several steps. Where the engine sampled with weights one rollout
    older (`--async-rollout`), the ratio holds the steps between as well, and corrects for them.

    Raises:
        ValueError: trainer and engine do not cover the same positions, or the bounds leave no room.
    """
    if log_probs.shape != rollout_log_probs.shape:
        raise ValueError(
            f"trainer log-probs {tuple(log_probs.shape)} and engine log-probs "
            f"{tuple(rollout_log_probs.shape)} given; both must cover exactly the response tokens."
        )
    if not 0 <= low < high:
        raise ValueError(f"bounds {low:g} and {high:g} given; 0 <= --tis-clip-low < --tis-clip is needed.")
    ratio = (log_probs.detach() - rollout_log_probs.detach()).exp()
    weights = ratio.clamp(low, high)
    return ImportanceWeights(weights, (weights != ratio).to(weights.dtype))
