"""From scored samples to one shard a training rank: who trains what, denominators, micro-batches.

Runs once a rollout, where the samples are; pure, and its result is plain data that can be sent anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from slime.backends.batching import TrainSample, carried_by_all
from slime.backends.planning import plan_micro_batches
from slime.train_samples import task_advantages, to_train_sample
from slime.utils.types import TRAINED, Sample, SampleStatus

if TYPE_CHECKING:
    from slime.arguments import Args


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """One optimizer step of one rank."""

    micro_batches: tuple[tuple[int, ...], ...]
    """Indices into the shard's samples; as many micro-batches on every rank, an empty one is a dummy."""
    num_tokens: int
    """Loss tokens of the step over all ranks."""
    num_samples: int
    """Samples of the step over all ranks."""
    num_distilled_tokens: int
    """Those of the loss tokens that the teacher's stream is trained on."""
    num_distilled_samples: int
    """Samples with such a token."""


@dataclass(frozen=True, kw_only=True)
class TrainShard:
    """What one training rank needs of one rollout: plain data that can be sent to it."""

    rollout_id: int
    samples: tuple[TrainSample, ...]
    pictures: Mapping[str, bytes]
    """Content hash -> encoded bytes, of this shard's pictures alone."""
    steps: tuple[StepPlan, ...]
    carried: frozenset[str]
    """What every sample of the rollout, on all ranks, has for each token (`CARRIED`)."""


def build_shards(
    args: Args,
    samples: Sequence[Sample],
    pictures: Mapping[str, bytes],
    num_ranks: int,
    rollout_id: int,
    *,
    merge_size: int = 2,
) -> list[TrainShard]:
    """Turn one rollout's samples into one shard a rank.

    Advantages, denominators and the plan of micro-batches are made over all samples of all ranks. A sample
    that failed, was aborted or has no token to train on is left out and counts in no mean; the others are
    spread evenly over the rollout's optimizer steps. `merge_size` is the model's; it tells how long a picture
    is when micro-batches are filled.

    Raises:
        ValueError: a sample's parts do not fit together, or fewer samples are left than there are steps.
    """
    usable = [sample for sample in samples if _is_trained(sample)]
    num_steps = max(1, len(samples) // args.global_batch_size)
    if len(usable) < num_steps:
        raise ValueError(
            f"rollout {rollout_id}: {len(usable)} of {len(samples)} samples can be trained on, fewer than "
            f"its {num_steps} optimizer steps; states: {_status_counts(samples)}. " + _reason(samples)
        )
    advantages = task_advantages(args, usable)
    train_samples = [
        to_train_sample(args, sample, advantage) for sample, advantage in zip(usable, advantages, strict=True)
    ]
    return _plan_shards(args, train_samples, pictures, num_ranks, rollout_id, num_steps, merge_size)


def _is_trained(sample: Sample) -> bool:
    if sample.status not in TRAINED or sample.response_length == 0:
        return False
    return sample.loss_mask is None or any(sample.loss_mask)


def _reason(samples: Sequence[Sample]) -> str:
    """Say why too few samples of a rollout can be trained on."""
    errors = [sample.metadata["error"] for sample in samples if "error" in sample.metadata]
    if errors:
        return f"The first error: {errors[0]}"
    if any(sample.status is SampleStatus.ABORTED for sample in samples):
        return "Responses were cut off: raise --rollout-deadline, or lower --rollout-max-response-len."
    return "Their loss masks are all zero."


def _status_counts(samples: Sequence[Sample]) -> dict[str, int]:
    names = [sample.status.value for sample in samples]
    return {name: names.count(name) for name in sorted(set(names))}


def _plan_shards(
    args: Args,
    samples: Sequence[TrainSample],
    pictures: Mapping[str, bytes],
    num_ranks: int,
    rollout_id: int,
    num_steps: int,
    merge_size: int,
) -> list[TrainShard]:
    """Cut the samples into optimizer steps, each step into ranks and micro-batches."""
    lengths = [sample.expanded_length(merge_size) for sample in samples]
    owned: list[list[int]] = [[] for _ in range(num_ranks)]
    steps: list[list[StepPlan]] = [[] for _ in range(num_ranks)]
    for number in range(num_steps):
        chosen = range(len(samples) * number // num_steps, len(samples) * (number + 1) // num_steps)
        plan = plan_micro_batches(
            [lengths[index] for index in chosen],
            num_ranks,
            max_tokens=_max_tokens(args),
            micro_batch_size=None if args.use_dynamic_batch_size else args.micro_batch_size or 1,
            packed=args.train_layout == "packed",
        )
        masks = [samples[index].loss_mask for index in chosen]
        distilled = [_distill_mask(samples[index]) for index in chosen]
        counts = {
            "num_tokens": sum(int(mask.sum()) for mask in masks),
            "num_samples": len(chosen),
            "num_distilled_tokens": sum(int(mask.sum()) for mask in distilled),
            "num_distilled_samples": sum(bool(mask.any()) for mask in distilled),
        }
        for rank, batches in enumerate(plan):
            local: list[tuple[int, ...]] = []
            for batch in batches:
                start = len(owned[rank])
                owned[rank].extend(chosen[index] for index in batch)
                local.append(tuple(range(start, start + len(batch))))
            steps[rank].append(StepPlan(micro_batches=tuple(local), **counts))
    return [
        _shard(rollout_id, [samples[index] for index in mine], pictures, plans, carried_by_all(samples))
        for mine, plans in zip(owned, steps, strict=True)
    ]


def _max_tokens(args: Args) -> int | None:
    """Return how many tokens a micro-batch may have; context-parallel ranks share them."""
    if args.max_tokens_per_gpu is None:
        return None
    return args.max_tokens_per_gpu * args.context_parallel_size


def _distill_mask(sample: TrainSample) -> Tensor:
    return sample.loss_mask if sample.distill_mask is None else sample.distill_mask


def _shard(
    rollout_id: int,
    samples: Sequence[TrainSample],
    pictures: Mapping[str, bytes],
    steps: Sequence[StepPlan],
    carried: frozenset[str],
) -> TrainShard:
    """Put one rank's samples together with the bytes of their pictures."""
    hashes = sorted({sha256 for sample in samples for sha256 in sample.image_hashes})
    missing = [sha256 for sha256 in hashes if sha256 not in pictures]
    if missing:
        raise ValueError(
            f"rollout {rollout_id}: the bytes of {len(missing)} pictures are missing, {missing[0][:12]}… "
            f"among them; {len(pictures)} were given."
        )
    return TrainShard(
        rollout_id=rollout_id,
        samples=tuple(samples),
        pictures={sha256: pictures[sha256] for sha256 in hashes},
        steps=tuple(steps),
        carried=carried,
    )
