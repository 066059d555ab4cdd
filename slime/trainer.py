"""From shards of scored samples to optimizer steps: shard -> micro-batches -> backend verbs -> metrics.

`build_shards` runs once, where the samples are; a `Trainer` runs on every training rank. Whatever shards the
model stays below, in the backend; nothing here calls another process.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from slime.backends.base import LossFn, Metrics, ModelTag, TrainBackend
from slime.backends.batching import BatchProcessor, MicroBatch, MicroBatchBuilder
from slime.backends.schedule import decayed
from slime.losses.reduction import GlobalMean
from slime.objective import Distillation, Objective
from slime.objective.ratios import finished
from slime.shards import StepPlan, TrainShard, build_shards
from slime.skipping.account import SkippedStep
from slime.skipping.suspects import Watch
from slime.skipping.verdict import refusal

if TYPE_CHECKING:
    from slime.arguments import Args

MODEL_OF: dict[str, ModelTag] = {"old_log_probs": "student", "reference_log_probs": "reference"}
"""Whose log-probs a field of the micro-batch is made of by a pass of the trainer."""

__all__ = ["TrainShard", "Trainer", "build_shards"]


class Trainer:
    """Trains one rank's shard of each rollout through its backend."""

    def __init__(
        self,
        args: Args,
        backend: TrainBackend,
        processor: BatchProcessor,
        never_sampled: Sequence[int] = (),
    ) -> None:
        """Take the rank's backend, the processor that the prompts were made with, and the ids outside the
        student's distribution."""
        self._args = args
        self._backend = backend
        self._processor = processor
        self._never_sampled = tuple(never_sampled)
        self.skipped: list[SkippedStep] = []
        """The optimizer steps of the last rollout that were not taken, with this rank's suspects."""

    def train(self, rollout_id: int, shard: TrainShard) -> Metrics:
        """Take all optimizer steps of one rollout; return its metrics, the same on every rank. Collective.

        Means are exact over each step's global batch; with several steps, over those that were taken. A step
        whose loss or gradient is not finite, or whose gradient exploded (`--skip-grad`), is skipped: it
        counts in `skipped_steps`, its tokens and samples nowhere.
        """
        builder = MicroBatchBuilder(
            self._processor, shard.pictures, shard.carried, packed=self._args.train_layout == "packed"
        )
        steps = [
            [builder.build([shard.samples[index] for index in batch]) for batch in step.micro_batches]
            for step in shard.steps
        ]
        if len(steps) > 1 and self._args.loss_type == "policy_loss":
            steps = [self._with_log_probs(batches, "old_log_probs") for batches in steps]
        if self._args.kl_loss_coef > 0:
            steps = [self._with_log_probs(batches, "reference_log_probs") for batches in steps]
        if self._args.opd_type == "megatron":
            steps = [self._with_teacher(batches) for batches in steps]
        coef = self._opd_kl_coef(rollout_id)
        self.skipped = []
        taken: list[Metrics] = []
        learned: list[StepPlan] = []
        metrics: Metrics = {}
        for number, (plan, batches) in enumerate(zip(shard.steps, steps, strict=True)):
            watch = Watch(
                self._objective(plan, coef), {sample.index: sample.group for sample in shard.samples}
            )
            metrics, reason = self._step(batches, watch)
            if reason is None:
                taken.append(metrics)
                learned.append(plan)
            else:
                self.skipped.append(self._skipped(rollout_id, number, metrics, reason, watch))
        means = _means(taken) if taken else _what_is_known(metrics)
        if self._args.use_opd:
            means["opd_kl_coef"] = coef
        return means | {
            "lr": metrics["lr"],
            "tokens": float(sum(plan.num_tokens for plan in learned)),
            "samples": float(sum(plan.num_samples for plan in learned)),
            "optimizer_steps": float(len(taken)),
            "skipped_steps": float(len(self.skipped)),
            "micro_batches": float(sum(len(batches) for batches in steps)),
        }

    def _step(self, batches: Sequence[MicroBatch], loss_fn: LossFn) -> tuple[Metrics, str | None]:
        """Take one optimizer step, or say why it was not taken: the same answer on every rank."""
        metrics = self._backend.forward_backward(batches, loss_fn)
        loss, most = metrics["loss"], self._args.skip_grad
        metrics |= self._backend.optim_step(lambda norm: refusal(loss, norm, most) is None)
        return metrics, refusal(loss, metrics["grad_norm"], most)

    def _skipped(
        self, rollout_id: int, number: int, metrics: Metrics, reason: str, watch: Watch
    ) -> SkippedStep:
        return SkippedStep(
            rollout_id=rollout_id,
            number=number,
            version=self._backend.weight_version,
            loss=metrics["loss"],
            grad_norm=metrics["grad_norm"],
            reason=reason,
            suspects=watch.suspects(),
        )

    def _with_log_probs(self, batches: Sequence[MicroBatch], name: str) -> list[MicroBatch]:
        """Return the micro-batches with the log-probs that one more forward pass gives."""
        log_probs = self._backend.compute_log_probs(batches, MODEL_OF[name])
        return [replace(batch, **{name: values}) for batch, values in zip(batches, log_probs, strict=True)]

    def _with_teacher(self, batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        """Return the micro-batches with what the teacher that the trainer holds says of their responses."""
        scored = self._backend.score(batches, "teacher", self._args.opd_top_k)
        return [
            replace(
                batch,
                teacher_log_probs=scores.log_probs,
                teacher_top_ids=scores.top_ids,
                teacher_top_log_probs=scores.top_log_probs,
                teacher_tail_mass=scores.tail_mass,
            )
            for batch, scores in zip(batches, scored, strict=True)
        ]

    def _opd_kl_coef(self, rollout_id: int) -> float:
        """Return the weight of the teacher's stream in this rollout."""
        args = self._args
        done = rollout_id / max(1, args.num_rollout)
        return decayed(args.opd_kl_coef, args.opd_kl_coef_end, args.opd_kl_coef_schedule, done)

    def _objective(self, plan: StepPlan, opd_kl_coef: float) -> Objective:
        args = self._args
        over_tokens = args.calculate_per_token_loss
        distillation = Distillation(
            coef=opd_kl_coef,
            mean=GlobalMean(
                num_tokens=plan.num_distilled_tokens,
                num_samples=plan.num_distilled_samples,
                over_tokens=over_tokens,
            ),
            loss=args.opd_loss,
            divergence=args.opd_divergence,
            jsd_beta=args.opd_jsd_beta,
            kl_clip=args.opd_kl_clip,
            kl_discount=args.opd_kl_discount,
        )
        return Objective(
            mean=GlobalMean(
                num_tokens=plan.num_tokens, num_samples=plan.num_samples, over_tokens=over_tokens
            ),
            eps_clip=args.eps_clip,
            eps_clip_high=args.eps_clip_high,
            loss_type=args.loss_type,
            distillation=distillation if args.use_opd else None,
            entropy_coef=args.entropy_coef,
            kl_loss_coef=args.kl_loss_coef,
            kl_loss_type=args.kl_loss_type,
            tis_clip=(args.tis_clip_low, args.tis_clip) if args.use_tis else None,
            rollout_temperature=args.rollout_temperature,
            teacher_wrote=args.sample_from == "teacher",
            never_sampled=self._never_sampled,
        )


def _means(steps: Sequence[Metrics]) -> Metrics:
    """Return each metric's mean over the steps that were taken."""
    return finished({name: sum(metrics[name] for metrics in steps) / len(steps) for name in steps[0]})


def _what_is_known(metrics: Metrics) -> Metrics:
    """Return the metrics of a rollout in which no step was taken: its last one's, as far as they are numbers.

    Loss and gradient norm, whatever they are, show what happened.
    """
    finite = {name: value for name, value in finished(metrics).items() if math.isfinite(value)}
    return finite | {"loss": metrics["loss"], "grad_norm": metrics["grad_norm"]}
