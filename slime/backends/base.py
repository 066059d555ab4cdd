"""What a training backend promises: the same few verbs, whatever shards the model.

A backend computes, it does not decide: it knows models, sharding and micro-batches; it knows nothing of
rewards, teachers, advantages or rollouts. Those live in the `loss_fn` that it is handed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from torch import Tensor

if TYPE_CHECKING:  # batching builds micro-batches from samples; the protocol needs only the type
    from slime.backends.batching import MicroBatch
    from slime.backends.scores import Scores

Metrics = dict[str, float]
ModelTag = Literal["student", "reference", "teacher"]


class LossInputs(Protocol):
    """What a loss may ask of the model's outputs, at the P packed response tokens of one micro-batch.

    The distribution is the one that was sampled from: over all tokens but those that are never sampled.
    All but `log_probs_at` and `top_ids` are differentiable, computed in chunks that are recomputed in the
    backward pass: no saved tensor is `[P, V]`.
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

    def gather_with_rest(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return `gather(ids)` [P, K] of ids that differ, and the log-mass of all other tokens [P]."""
        ...

    def log_probs_at(self, temperature: float) -> Tensor:
        """Return the log-probs [P], float32, of the sampled tokens at another temperature; no gradient."""
        ...

    def top_ids(self, count: int) -> Tensor:
        """Return the likeliest tokens of each position, int64 [P, count], likeliest first; no gradient.

        Of a smaller vocabulary, all.
        """
        ...


@runtime_checkable
class ExpectingInputs(Protocol):
    """Loss inputs that can be told what will be asked, and compute it all in one pass over the LM head.

    It changes no value; a backend may do without.
    """

    def expect(self, ids: Tensor, top: int) -> None:
        """Take note, before anything is asked, that `gather` or `gather_with_rest` of `ids` (this very
        tensor), and `top_ids(top)`, will be asked for beside log-probs and entropy."""
        ...


LossFn = Callable[[LossInputs, "MicroBatch"], tuple[Tensor, Mapping[str, Tensor]]]
"""(outputs, micro-batch) -> (loss, sums): the loss is this micro-batch's share of the global mean, already
divided by the global denominator; it must depend on `outputs`, with weight zero where nothing is to be
learned (a dummy, P = 0), so that every rank runs the same backward pass. The sums are detached scalars, under
the same names in every micro-batch, that the backend adds up over micro-batches and ranks."""


Accepts = Callable[[float], bool]
"""Whether a step with gradients of this norm may be taken; the same answer on every rank."""


class TrainBackend(Protocol):
    """Computes for one rank. Every verb is collective: all ranks call it in the same order."""

    rank: int
    world_size: int

    @property
    def weight_version(self) -> int:
        """Optimizer steps taken since the model's first weights."""
        ...

    def compute_log_probs(
        self, micro_batches: Sequence[MicroBatch], model: ModelTag = "student"
    ) -> list[Tensor]:
        """Return, per micro-batch, the log-probs [P] of its response tokens, without gradient, on the CPU."""
        ...

    def score(self, micro_batches: Sequence[MicroBatch], model: ModelTag, top_k: int = 0) -> list[Scores]:
        """Return, per micro-batch, what the model says of its responses, with its `top_k` likeliest tokens,
        as many as there are tokens at most.

        The distribution is the model's own: a teacher's is over all tokens, as a server's is.
        """
        ...

    def forward_backward(self, micro_batches: Sequence[MicroBatch], loss_fn: LossFn) -> Metrics:
        """Accumulate the gradients of all micro-batches of one optimizer step.

        Gradients add up over micro-batches and ranks. Returns the sums, `loss` among them, over all ranks:
        the same numbers on every rank. A loss that is not finite is returned as it is.
        """
        ...

    def optim_step(self, accepts: Accepts = math.isfinite) -> Metrics:
        """Clip, step, advance the schedule, zero the gradients.

        Where `accepts` refuses the gradient norm, only the gradients are zeroed: weights, the optimizer's
        state, the schedule and `weight_version` stay as they are. The norm has the same bits on every rank,
        so that all of them step or none does. Returns `grad_norm` (before clipping) and `lr`.
        """
        ...

    def hf_named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the full student weights as a Hugging Face folder holds them: names, layout, tied ones once.

        One tensor is gathered at a time, in a fixed order and in the precision that training computes in; it
        is valid until the next one is asked for.
        """
        ...

    def offload_optimizer(self) -> None:
        """Put the optimizer's state into the host's memory, where the GPU is needed for something else."""
        ...

    def offload(self) -> None:
        """Put model and optimizer into the host's memory. No other verb may follow but `onload`."""
        ...

    def onload(self) -> None:
        """Bring all that was put away back."""
        ...

    def save_checkpoint(self, path: Path) -> None:
        """Write model, optimizer, schedule and this rank's random generators below `path`, onto the disk."""
        ...

    def load_checkpoint(self, path: Path) -> None:
        """Read what `save_checkpoint` wrote, under any number of ranks. Under another one than wrote it, the
        generators are seeded anew."""
        ...

    def close(self) -> None:
        """Leave the process group."""
        ...
