"""From shards of scored samples to optimizer steps: shard -> micro-batches -> backend verbs -> metrics.

`build_shards` runs once, where the samples are; a `Trainer` runs on every training rank. Whatever shards the
model stays below, in the backend; nothing here calls another process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from slime.backends.base import Metrics, NonFiniteError, TrainBackend
from slime.backends.batching import BatchProcessor, MicroBatch, MicroBatchBuilder
from slime.objective import Objective
from slime.shards import StepPlan, TrainShard, build_shards

if TYPE_CHECKING:
    from slime.arguments import Args

__all__ = ["TrainShard", "Trainer", "build_shards"]


class Trainer:
    """Trains one rank's shard of each rollout through its backend."""

    def __init__(self, args: Args, backend: TrainBackend, processor: BatchProcessor) -> None:
        """Take the rank's backend, and the processor that the prompts were made with."""
        self._args = args
        self._backend = backend
        self._processor = processor

    def train(self, rollout_id: int, shard: TrainShard) -> Metrics:
        """Take all optimizer steps of one rollout; return its metrics, the same on every rank. Collective.

        Means are exact over each step's global batch; with several steps, over the steps.

        Raises:
            NonFiniteError: a loss or gradient is not finite; the message names rollout, step and micro-batch.
        """
        builder = MicroBatchBuilder(self._processor, shard.pictures)
        steps = [
            [builder.build([shard.samples[index] for index in batch]) for batch in step.micro_batches]
            for step in shard.steps
        ]
        if len(steps) > 1:
            steps = [self._with_log_probs(batches, "old_log_probs") for batches in steps]
        if self._args.kl_loss_coef > 0:
            steps = [self._with_log_probs(batches, "reference_log_probs") for batches in steps]
        taken: list[Metrics] = []
        for number, (plan, batches) in enumerate(zip(shard.steps, steps, strict=True)):
            try:
                metrics = self._backend.forward_backward(batches, self._objective(plan))
                taken.append(metrics | self._backend.optim_step())
            except NonFiniteError as error:
                raise NonFiniteError(f"rollout {rollout_id}, optimizer step {number}: {error}") from error
        means = {name: sum(metrics[name] for metrics in taken) / len(taken) for name in taken[0]}
        return means | {
            "lr": taken[-1]["lr"],
            "tokens": float(sum(plan.num_tokens for plan in shard.steps)),
            "samples": float(sum(plan.num_samples for plan in shard.steps)),
            "optimizer_steps": float(len(steps)),
            "micro_batches": float(sum(len(batches) for batches in steps)),
        }

    def _with_log_probs(self, batches: Sequence[MicroBatch], name: str) -> list[MicroBatch]:
        """Return the micro-batches with the log-probs that one more forward pass gives."""
        model = "reference" if name == "reference_log_probs" else "student"
        log_probs = self._backend.compute_log_probs(batches, model)
        return [replace(batch, **{name: values}) for batch, values in zip(batches, log_probs, strict=True)]

    def _objective(self, plan: StepPlan) -> Objective:
        args = self._args
        return Objective(
            num_tokens=plan.num_tokens,
            num_samples=plan.num_samples,
            mean_over_tokens=args.calculate_per_token_loss,
            eps_clip=args.eps_clip,
            eps_clip_high=args.eps_clip_high,
            opd_kl_coef=args.opd_kl_coef if args.use_opd else None,
            entropy_coef=args.entropy_coef,
            kl_loss_coef=args.kl_loss_coef,
            kl_loss_type=args.kl_loss_type,
            tis_clip=(args.tis_clip_low, args.tis_clip) if args.use_tis else None,
            rollout_temperature=args.rollout_temperature,
        )
