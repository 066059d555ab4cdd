"""What a training backend promises: the same few verbs, whatever shards the model.

A backend computes, it does not decide: it knows models, sharding and micro-batches; it knows nothing of rewards,
teachers, advantages or rollouts. Those live in the `loss_fn` that it is handed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from torch import Tensor

if TYPE_CHECKING:  # batching builds micro-batches from samples; the protocol needs only the type
    from slime.backends.batching import MicroBatch

Metrics = dict[str, float]
ModelTag = Literal["student", "reference", "teacher"]


class LossInputs(Protocol):
    """What a loss may ask of the model's outputs, at the P packed response tokens of one micro-batch.

    All are differentiable, computed in chunks that are recomputed in the backward pass: no saved tensor is `[P, V]`.
    """

    @property
    def log_probs(self) -> Tensor:
        """[P], float32: log-prob of each sampled token at temperature 1."""
        ...

    @property
    def entropy(self) -> Tensor:
        """[P], float32: entropy in nats of the distribution that each token was drawn from."""
        ...

    def gather(self, ids: Tensor) -> Tensor:
        """Return the log-probs [P, K] of `ids` [P, K] at each position."""
        ...


LossFn = Callable[[LossInputs, "MicroBatch"], tuple[Tensor, Mapping[str, Tensor]]]
"""(outputs, micro-batch) -> (loss, sums): the loss is this micro-batch's share of the global mean, already divided by
the global denominator; the sums are detached scalars that the backend adds up over micro-batches and ranks."""


class TrainBackend(Protocol):
    """Computes for one rank. Every verb is collective: all ranks call it in the same order."""

    rank: int
    world_size: int

    def compute_log_probs(self, micro_batches: Sequence[MicroBatch], model: ModelTag = "student") -> list[Tensor]:
        """Return, per micro-batch, the log-probs [P] of its response tokens, without gradient, on the CPU."""
        ...

    def forward_backward(self, micro_batches: Sequence[MicroBatch], loss_fn: LossFn) -> Metrics:
        """Accumulate the gradients of all micro-batches of one optimizer step; return the sums over all ranks."""
        ...

    def optim_step(self) -> Metrics:
        """Clip, step, advance the schedule, zero the gradients. Return `grad_norm` (before clipping) and `lr`."""
        ...

    def hf_named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the full (gathered) student weights under Hugging Face names, in a fixed order."""
        ...

    def save_checkpoint(self, path: Path) -> None:
        """Write model, optimizer and schedule below `path`."""
        ...

    def load_checkpoint(self, path: Path) -> None:
        """Read what `save_checkpoint` wrote."""
        ...
