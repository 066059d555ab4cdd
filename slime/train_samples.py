"""From one scored sample to what a training rank needs of it: checks, the task's advantages, the teacher's
parts.

Pure; whatever does not fit together is an error that names the sample. Shape letters: R response tokens, K
teacher top-k.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from slime.backends.batching import TrainSample
from slime.losses.advantages import discounted_returns, group_normalized, whitened
from slime.utils.types import Sample, SampleStatus

if TYPE_CHECKING:
    from slime.arguments import Args

TAIL_LEFT = 1e-3
"""A row with less mass outside is the whole vocabulary, for all that a server can say."""
SOLVED = 0.5
"""The grade from which on a response counts as right (`--opd-gate`)."""


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


def task_advantages(args: Args, samples: Sequence[Sample]) -> list[Tensor]:
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


def to_train_sample(args: Args, sample: Sample, advantages: Tensor) -> TrainSample:
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
    if args.use_opd and args.opd_type == "sglang" and sample.teacher_log_probs is None:
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
        group=sample.group_index,
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
    parts: dict[str, Tensor | None] = {"teacher_log_probs": None}  # a teacher in the trainer scores there
    if args.opd_type == "sglang":
        parts = {"teacher_log_probs": _log_probs(sample, "teacher_log_probs", mask)}
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
