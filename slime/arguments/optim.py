"""The loss beside distillation, batches and the optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from slime.arguments.devices import visible_gpus
from slime.arguments.flags import flag


def _is_off_policy(args: Any) -> bool:
    """Tell whether tokens are learned from that another distribution than the student's drew."""
    if args.loss_type == "sft_loss" or args.sample_from == "teacher":
        return False
    if args.opd_loss == "topk" and args.task_reward_weight == 0 and args.kl_loss_coef == 0:
        return False  # a divergence is a whole expectation at each prefix: nothing sampled is averaged
    one_step = args.global_batch_size in (None, args.samples_per_rollout)  # None: not derived yet
    return args.rollout_temperature != 1.0 or not one_step or args.async_rollout


@dataclass(frozen=True, kw_only=True)
class LossArgs:
    """Loss"""

    loss_type: Literal["policy_loss", "sft_loss"] = flag(
        "policy_loss",
        help="policy_loss: learn from rewards and the teacher's scores; sft_loss: imitate the sampled "
        "tokens, which the teacher wrote (--sample-from teacher).",
    )
    advantage_estimator: Literal["grpo", "reinforce_plus_plus"] = flag(
        "grpo", help="How task rewards become advantages."
    )
    eps_clip: float = flag(0.2, help="Lower clip range of the policy ratio.", at_least=0)
    eps_clip_high: float = flag(
        help="Upper clip range of the policy ratio.",
        derive=lambda args: args.eps_clip,
        derived_from="--eps-clip",
        at_least=0,
    )
    use_tis: bool = flag(
        help="Weigh each sampled token by its truncated importance ratio, trainer over engine.",
        derive=_is_off_policy,
        derived_from="where --rollout-temperature is not 1, a rollout is used for several steps, or it is "
        "sampled ahead (--async-rollout)",
    )
    tis_clip: float = flag(2.0, help="Largest importance weight.", above=0)
    tis_clip_low: float = flag(0.0, help="Smallest importance weight.", at_least=0)
    entropy_coef: float = flag(0.0, help="Weight of the entropy bonus.", at_least=0)
    kl_loss_coef: float = flag(0.0, help="Weight of the KL to the initial student (--ref-load).", at_least=0)
    kl_loss_type: Literal["k1", "k2", "k3", "low_var_kl"] = flag(
        "k3", help="Estimator of that KL; low_var_kl is k3."
    )
    calculate_per_token_loss: bool = flag(
        False,
        help="Mean over the tokens of the whole batch. Without it: mean over samples of each sample's mean.",
    )
    grpo_std_normalization: bool = flag(
        True,
        name="--disable-grpo-std-normalization",
        help="Do not divide a group's advantages by their standard deviation.",
    )
    normalize_advantages: bool = flag(False, help="Whiten the advantages over the batch.")
    gamma: float = flag(1.0, help="Discount of rewards along a response.", above=0, at_most=1)

    def validate(self) -> Iterator[str]:
        """Yield what is wrong inside this group."""
        if self.tis_clip_low >= self.tis_clip:
            yield (
                f"--tis-clip-low {self.tis_clip_low:g} is not below --tis-clip {self.tis_clip:g}: importance "
                "weights would have no room. Lower the one or raise the other."
            )
        if not self.use_tis and (self.tis_clip, self.tis_clip_low) != (2.0, 0.0):
            yield (
                "--tis-clip and --tis-clip-low bound importance weights, and none are used. Add --use-tis, "
                "or drop them."
            )


@dataclass(frozen=True, kw_only=True)
class BatchArgs:
    """Batches"""

    global_batch_size: int = flag(
        help="Samples of one optimizer step, over all ranks.",
        derive=lambda args: args.samples_per_rollout,
        derived_from="--rollout-batch-size times --n-samples-per-prompt: one step a rollout",
        at_least=1,
    )
    micro_batch_size: int | None = flag(
        None,
        help="Samples of one forward pass. Default: 1, or as many as fit with --use-dynamic-batch-size.",
        at_least=1,
    )
    use_dynamic_batch_size: bool = flag(False, help="Fill micro-batches up to --max-tokens-per-gpu.")
    max_tokens_per_gpu: int | None = flag(
        None,
        help="Tokens of one micro-batch on one rank, padding counted where there is any.",
        at_least=1,
    )
    train_layout: Literal["packed", "padded"] = flag(
        "packed",
        help="packed: the samples of a micro-batch lie end to end, without padding; padded: one row each, "
        "padded to the longest, for models whose layers are not all full attention.",
    )

    def validate(self) -> Iterator[str]:
        """Yield what is wrong inside this group."""
        if self.use_dynamic_batch_size and self.max_tokens_per_gpu is None:
            yield (
                "--use-dynamic-batch-size is set without --max-tokens-per-gpu: it does not say how full a "
                "micro-batch may be. Add for example --max-tokens-per-gpu 8192."
            )
        if self.max_tokens_per_gpu is not None and not self.use_dynamic_batch_size:
            yield (
                "--max-tokens-per-gpu is set without --use-dynamic-batch-size and would be ignored. "
                "Add --use-dynamic-batch-size or drop it."
            )
        if self.use_dynamic_batch_size and self.micro_batch_size is not None:
            yield (
                f"--micro-batch-size {self.micro_batch_size} and --use-dynamic-batch-size both say how "
                "large a micro-batch is. Choose one."
            )


@dataclass(frozen=True, kw_only=True)
class OptimArgs:
    """Optimizer"""

    optimizer: Literal["adam"] = flag("adam", help="AdamW.")
    lr: float = flag(1e-6, help="Peak learning rate.", at_least=0)
    min_lr: float = flag(0.0, help="Learning rate at the end of the decay.", at_least=0)
    lr_decay_style: Literal["constant", "linear", "cosine"] = flag(
        "constant", help="Schedule after the warm-up."
    )
    lr_warmup_iters: int = flag(0, help="Optimizer steps of linear warm-up.", at_least=0)
    weight_decay: float = flag(0.0, help="Decoupled weight decay.", at_least=0)
    adam_beta1: float = flag(0.9, help="Adam's first moment.", at_least=0, at_most=1)
    adam_beta2: float = flag(0.98, help="Adam's second moment.", at_least=0, at_most=1)
    adam_eps: float = flag(1e-8, help="Adam's epsilon.", above=0)
    clip_grad: float = flag(1.0, help="Largest gradient norm; 0 does not clip.", at_least=0)
    skip_grad: float = flag(
        0.0,
        help="Take no optimizer step whose gradient norm, before clipping, is above this; 0: skip only those "
        "whose loss or gradient is not finite.",
        at_least=0,
    )
    max_skipped_steps: int = flag(5, help="Skipped optimizer steps in a row that end the run.", at_least=1)
    precision: Literal["float32", "bfloat16"] = flag(
        name="--train-dtype",
        help="Precision of the training forward and backward.",
        derive=lambda args: "bfloat16" if visible_gpus() else "float32",
        derived_from="bfloat16 on GPUs, float32 without",
    )
    gradient_checkpointing: bool = flag(
        False, help="Recompute layers in the backward pass: less memory, more time."
    )
    logprob_chunk_size: int = flag(
        help="Response positions that go through the LM head at once.",
        derive=lambda args: 1024 if args.precision == "bfloat16" else 256,
        derived_from="1024 with --train-dtype bfloat16, else 256",
        at_least=1,
    )
    train_threads: int = flag(2, help="CPU threads of one training rank, where it runs on a CPU.", at_least=1)
    freeze_vision_tower: bool = flag(False, help="Do not train the vision tower.")

    def validate(self) -> Iterator[str]:
        """Yield what is wrong inside this group."""
        if self.min_lr > self.lr:
            yield (
                f"--min-lr {self.min_lr:g} is above --lr {self.lr:g}; the schedule decays, so --min-lr must "
                "be at most --lr."
            )
        if 0 < self.skip_grad <= self.clip_grad:
            yield (
                f"--skip-grad {self.skip_grad:g} is not above --clip-grad {self.clip_grad:g}: no gradient "
                "would ever be clipped, and ordinary steps be skipped. Use a --skip-grad of many times a "
                "usual grad_norm, or drop it."
            )
        for name, beta in (("--adam-beta1", self.adam_beta1), ("--adam-beta2", self.adam_beta2)):
            if beta == 1:
                yield f"{name} is 1; it must be below 1."
