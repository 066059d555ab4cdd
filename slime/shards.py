"""From scored samples to one shard a training rank: checks, task advantages, denominators, micro-batches.

Runs once a rollout, where the samples are; pure, and its result is plain data that can be sent anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from slime.backends.batching import TrainSample, carried_by_all
from slime.backends.planning import plan_micro_batches
from slime.losses.advantages import discounted_returns, group_normalized, whitened
from slime.utils.types import TRAINED, Sample, SampleStatus

if TYPE_CHECKING:
    from slime.arguments import Args


TAIL_LEFT = 1e-3
"""A row with less mass outside is the whole vocabulary, for all that a server can say."""
SOLVED = 0.5
"""The grade from which on a response counts as right (`--opd-gate`)."""


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
        errors = [sample.metadata["error"] for sample in samples if "error" in sample.metadata]
        raise ValueError(
            f"rollout {rollout_id}: {len(usable)} of {len(samples)} samples can be trained on, fewer than "
            f"its {num_steps} optimizer steps; states: {_status_counts(samples)}. "
            + (f"The first error: {errors[0]}" if errors else "Their loss masks are all zero.")
        )
    advantages = _task_advantages(args, usable)
    train_samples = [
        _to_train_sample(args, sample, advantage)
        for sample, advantage in zip(usable, advantages, strict=True)
    ]
    return _plan_shards(args, train_samples, pictures, num_ranks, rollout_id, num_steps, merge_size)


def _is_trained(sample: Sample) -> bool:
    if sample.status not in TRAINED or sample.response_length == 0:
        return False
    return sample.loss_mask is None or any(sample.loss_mask)


def _status_counts(samples: Sequence[Sample]) -> dict[str, int]:
    names = [sample.status.value for sample in samples]
    return {name: names.count(name) for name in sorted(set(names))}


def _mask(sample: Sample) -> Tensor:
    """Return the loss mask as float32 [R]."""
    if sample.loss_mask is None:
        return torch.ones(sample.response_length)
    _require_length(sample, "loss_mask", len(sample.loss_mask))
    return torch.tensor(sample.loss_mask, dtype=torch.float32)


def _require_length(sample: Sample, name: str, length: int) -> None:
    if length != sample.response_length:
        raise ValueError(
            f"sample {sample.index} has {length} values in {name} and a response of {sample.response_length} "
            "tokens; one for each is needed."
        )


def _task_advantages(args: Args, samples: Sequence[Sample]) -> list[Tensor]:
    """Return each sample's advantages [R] of the task-reward stream, normalised over the whole rollout.

    `--task-reward-weight` scales the advantages, not the rewards: a normalisation would cancel it there.
    """
    weight = args.task_reward_weight if args.task_reward_weight > 0 else 1.0
    masks = [_mask(sample).double() for sample in samples]
    if args.loss_type == "sft_loss":
        return [torch.zeros_like(mask).float() for mask in masks]
    name = "task_reward" if args.trains_on_grades else "train_reward"
    rewards = torch.tensor([_number(sample, name) for sample in samples], dtype=torch.float64)
    if args.advantage_estimator == "grpo" and args.n_samples_per_prompt == 1 and rewards.any():
        raise ValueError(
            "there are rewards to train on, --advantage-estimator grpo compares the samples of one prompt, "
            "and --n-samples-per-prompt is 1: every task advantage would be zero. Use at least 2, or "
            "--advantage-estimator reinforce_plus_plus."
        )
    if args.advantage_estimator == "grpo":
        groups = torch.tensor([_group(sample) for sample in samples])
        scalars = group_normalized(rewards, groups, divide_by_std=args.grpo_std_normalization)
        advantages = [
            torch.full_like(mask, scalar) for mask, scalar in zip(masks, scalars.tolist(), strict=True)
        ]
    else:
        advantages = [
            discounted_returns(reward, mask, args.gamma)
            for reward, mask in zip(rewards.tolist(), masks, strict=True)
        ]
    if args.advantage_estimator == "reinforce_plus_plus" or args.normalize_advantages:
        flat = whitened(torch.cat(advantages), torch.cat(masks))
        advantages = list(flat.split([len(mask) for mask in masks]))
    return [weight * advantage.float() for advantage in advantages]


def _number(sample: Sample, name: str) -> float:
    """Return a reward that the rollout left in the sample's metadata."""
    if name not in sample.metadata:
        raise ValueError(
            f"sample {sample.index} has no metadata[{name!r}]; "
            + (
                "rewards are post-processed before training, and pure distillation sets it to 0."
                if name == "train_reward"
                else "the task's grade is missing: --rm-type and --label-key say how a response is graded."
            )
        )
    return float(sample.metadata[name])


def _group(sample: Sample) -> int:
    if sample.group_index is None:
        raise ValueError(f"sample {sample.index} has no group_index; --advantage-estimator grpo needs it.")
    return sample.group_index


def _to_train_sample(args: Args, sample: Sample, advantages: Tensor) -> TrainSample:
    """Check that the sample's parts fit together and make tensors of them."""
    if sample.index is None:
        raise ValueError("a sample has no index; the prompt source numbers every sample.")
    mask = _mask(sample)
    inputs = sample.multimodal_train_inputs or {}
    hashes, grids = inputs.get("image_hashes", []), inputs.get("image_grid_thw", [])
    teacher = _teacher_parts(args, sample, mask)
    if len(hashes) != len(grids):
        raise ValueError(
            f"sample {sample.index} has {len(hashes)} image_hashes and {len(grids)} image_grid_thw; one each "
            "a picture."
        )
    if args.use_opd and sample.teacher_log_probs is None:
        raise ValueError(
            f"sample {sample.index} ({sample.response_length} response tokens) has no teacher_log_probs and "
            "--use-opd is set; the post-processing named by --custom-reward-post-process-path must write "
            "them, or mark the sample as failed."
        )
    if args.use_tis and sample.rollout_log_probs is None:
        raise ValueError(
            f"sample {sample.index} ({sample.response_length} response tokens) has no rollout_log_probs, and "
            "importance weights need them (--use-tis, which is on where a rollout is used for several "
            f"steps or --rollout-temperature is not 1, here {args.rollout_temperature:g}; --no-use-tis "
            "turns it off for several steps). A function named by --custom-generate-function-path must "
            "keep the log-probs that the engine returned for the sampled tokens, or mark the sample as "
            "failed."
        )
    return TrainSample(
        index=sample.index,
        tokens=torch.tensor(sample.tokens, dtype=torch.int64),
        response_length=sample.response_length,
        loss_mask=mask,
        advantages=advantages,
        rollout_log_probs=None
        if args.sample_from == "teacher"
        else _log_probs(sample, "rollout_log_probs", mask),
        **teacher,
        finished=sample.status is SampleStatus.COMPLETED,
        image_hashes=tuple(hashes),
        image_grid_thw=tuple((int(t), int(h), int(w)) for t, h, w in grids),
    )


def _teacher_parts(args: Args, sample: Sample, mask: Tensor) -> dict[str, Tensor | None]:
    """Return what the teacher says of the response, as far as the run uses it."""
    if not args.use_opd:
        # what the teacher wrote itself, it has scored while it wrote
        wrote = args.sample_from == "teacher" and args.rollout_temperature == 1.0
        return {"teacher_log_probs": _log_probs(sample, "rollout_log_probs", mask) if wrote else None}
    parts: dict[str, Tensor | None] = {"teacher_log_probs": _log_probs(sample, "teacher_log_probs", mask)}
    if args.opd_top_k > 0:
        parts |= _top_k(args, sample, mask)
    if args.opd_gate != "all":
        solved = _number(sample, "task_reward") >= SOLVED
        parts["distill_mask"] = mask * (solved == (args.opd_gate == "right"))
    return parts


def _top_k(args: Args, sample: Sample, mask: Tensor) -> dict[str, Tensor | None]:
    """Return the teacher's `--opd-top-k` likeliest tokens; what the sample has beyond them joins the tail.

    Raises:
        ValueError: the sample has none, or fewer, or they are no distribution.
    """
    ids, log_probs, tail = sample.teacher_top_ids, sample.teacher_top_log_probs, sample.teacher_tail_mass
    if ids is None or log_probs is None or tail is None:
        raise ValueError(
            f"sample {sample.index} has no top-k of the teacher, and --opd-top-k is {args.opd_top_k}. A "
            "plugin of your own must write teacher_top_ids, teacher_top_log_probs and teacher_tail_mass, as "
            "attach_scores in slime.rollout.on_policy_distillation does; without one, drop --opd-top-k."
        )
    length, width = sample.response_length, ids.shape[-1]
    if ids.shape != (length, width) or log_probs.shape != ids.shape or tail.shape != (length,):
        raise ValueError(
            f"sample {sample.index} has {length} response tokens and a top-k of the shapes "
            f"{tuple(ids.shape)}, {tuple(log_probs.shape)} and {tuple(tail.shape)}; [R, K], [R, K] and [R] "
            "are needed."
        )
    trained = mask != 0
    if width < args.opd_top_k and bool((tail[trained] > TAIL_LEFT).any()):
        raise ValueError(
            f"sample {sample.index} has the teacher's top-{width}, and --opd-top-k is {args.opd_top_k}. Use "
            f"--opd-top-k {width}, or record anew."
        )
    log_probs, tail = log_probs.where(trained[:, None], 0), tail.where(trained, 0)
    if not (log_probs.isfinite().all() and ((tail >= 0) & (tail <= 1)).all() and (ids >= 0).all()):
        raise ValueError(
            f"sample {sample.index} has a top-k of the teacher that is no distribution: log-probs must be "
            "finite, ids not negative, and the tail's mass between 0 and 1."
        )
    kept = slice(None, args.opd_top_k)
    cut = log_probs[:, args.opd_top_k :].double().exp().sum(dim=1).float()
    return {
        "teacher_top_ids": ids[:, kept],
        "teacher_top_log_probs": log_probs[:, kept],
        "teacher_tail_mass": (tail + cut).where(trained, 0),
    }


def _log_probs(sample: Sample, name: str, mask: Tensor) -> Tensor | None:
    """Return the sample's log-probs `name` as float32 [R], 0 where the mask is 0.

    Raises:
        ValueError: another length than the response, or a value on a loss token that is not finite.
    """
    values = getattr(sample, name)
    if values is None:
        return None
    tensor = torch.as_tensor(values, dtype=torch.float32)
    _require_length(sample, name, tensor.numel())
    tensor = tensor.where(mask != 0, 0)
    if not tensor.isfinite().all():
        position = int((~tensor.isfinite()).nonzero()[0])
        raise ValueError(
            f"sample {sample.index} has {name}[{position}] = {tensor[position].item()} on a token that is "
            "trained on; log-probs must be finite."
        )
    return tensor


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
            max_tokens=args.max_tokens_per_gpu if args.use_dynamic_batch_size else None,
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
