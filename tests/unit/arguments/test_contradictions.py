"""Flags that do not go together are refused by a sentence that names them all."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from slime.arguments import Args
from slime.arguments.pending import PENDING

MINIMAL = ("--hf-checkpoint", "student", "--prompt-data", "train.parquet", "--num-rollout", "3")
URL = ("--rm-url", "http://127.0.0.1:13141/generate")
DISTIL = ("--use-opd", "--opd-type", "sglang", *URL)
MEGATRON = (*DISTIL, "--train-backend", "megatron")

CONTRADICTIONS = {
    "opd without a type": (("--use-opd", *URL), ("--use-opd", "--opd-type")),
    "a type without opd": (("--opd-type", "sglang", *URL, "--rm-type", "math"), ("--use-opd", "--opd-type")),
    "a checkpoint for a served teacher": (
        (*DISTIL, "--opd-teacher-load", "t"),
        ("--opd-teacher-load", "--rm-url"),
    ),
    "a megatron teacher under fsdp": (
        ("--use-opd", "--opd-type", "megatron", "--train-backend", "fsdp"),
        ("--opd-type megatron", "--train-backend", "--rm-url"),
    ),
    "megatron's flags under fsdp": (
        (*DISTIL, "--tensor-model-parallel-size", "2", "--actor-num-gpus-per-node", "2"),
        ("--tensor-model-parallel-size", "--train-backend fsdp", "--train-backend megatron"),
    ),
    "a teacher in the trainer without its checkpoint": (
        ("--use-opd", "--opd-type", "megatron", "--train-backend", "megatron"),
        ("--opd-type megatron", "--opd-teacher-load"),
    ),
    "ranks that do not divide into models": (
        (*MEGATRON, "--tensor-model-parallel-size", "2", "--actor-num-gpus-per-node", "3"),
        ("3 training ranks", "models of 2", "--tensor-model-parallel-size 2"),
    ),
    "ranks that do not divide into groups of experts": (
        (*MEGATRON, "--expert-model-parallel-size", "4", "--actor-num-gpus-per-node", "2"),
        ("2 training ranks of a pipeline stage", "groups of 4", "--expert-model-parallel-size"),
    ),
    "sequence parallelism alone": (
        (*MEGATRON, "--sequence-parallel"),
        ("--sequence-parallel", "--tensor-model-parallel-size is 1"),
    ),
    "full recomputation of nothing": (
        (*MEGATRON, "--recompute-granularity", "full"),
        ("--recompute-granularity full", "--recompute-num-layers"),
    ),
    "layers of a recomputation that is not full": (
        (*MEGATRON, "--recompute-granularity", "selective", "--recompute-num-layers", "1"),
        ("--recompute-num-layers", "--recompute-granularity full"),
    ),
    "coefficient zero": ((*DISTIL, "--opd-kl-coef", "0"), ("--opd-kl-coef is 0", "--use-opd")),
    "coefficient negative": ((*DISTIL, "--opd-kl-coef", "-1"), ("--opd-kl-coef is -1", "--use-opd")),
    "coefficient without opd": (("--rm-type", "math", "--opd-kl-coef", "2"), ("--opd-kl-coef", "--use-opd")),
    "a served teacher without address": (
        ("--use-opd", "--opd-type", "sglang"),
        ("--opd-type sglang", "--rm-url"),
    ),
    "an address without path": (
        ("--use-opd", "--opd-type", "sglang", "--rm-url", "http://127.0.0.1:13141"),
        ("--rm-url", "/generate"),
    ),
    "an address that is none": (
        ("--use-opd", "--opd-type", "sglang", "--rm-url", "127.0.0.1:1/generate"),
        ("--rm-url",),
    ),
    "rollout does not divide": (
        (*DISTIL, "--rollout-batch-size", "3", "--n-samples-per-prompt", "4", "--global-batch-size", "8"),
        ("--rollout-batch-size", "--n-samples-per-prompt", "--global-batch-size"),
    ),
    "ranks do not divide": (
        (*DISTIL, "--actor-num-gpus-per-node", "3", "--global-batch-size", "32"),
        ("--global-batch-size", "--actor-num-gpus-per-node"),
    ),
    "micro batches do not divide": (
        (*DISTIL, "--global-batch-size", "32", "--micro-batch-size", "5"),
        ("--global-batch-size", "--micro-batch-size"),
    ),
    "dynamic without a budget": (
        (*DISTIL, "--use-dynamic-batch-size"),
        ("--use-dynamic-batch-size", "--max-tokens-per-gpu"),
    ),
    "a budget without dynamic": (
        (*DISTIL, "--max-tokens-per-gpu", "64"),
        ("--use-dynamic-batch-size", "--max-tokens-per-gpu"),
    ),
    "two sizes of a micro batch": (
        (*DISTIL, "--use-dynamic-batch-size", "--max-tokens-per-gpu", "64", "--micro-batch-size", "1"),
        ("--use-dynamic-batch-size", "--micro-batch-size"),
    ),
    "task weight without grader": (
        (*DISTIL, "--task-reward-weight", "0.5"),
        ("--task-reward-weight", "--rm-type"),
    ),
    "task weight on the task alone": (
        ("--rm-type", "math", "--task-reward-weight", "1"),
        ("--task-reward-weight", "--use-opd"),
    ),
    "one sample in a group": (
        (*DISTIL, "--task-reward-weight", "0.5", "--rm-type", "math", "--n-samples-per-prompt", "1"),
        ("--advantage-estimator", "--n-samples-per-prompt"),
    ),
    "nothing to learn from": ((), ("--use-opd", "--rm-type", "--custom-rm-path")),
    "evaluation without data": ((*DISTIL, "--eval-interval", "2"), ("--eval-interval", "--eval-prompt-data")),
    "a set without path": ((*DISTIL, "--eval-prompt-data", "name"), ("--eval-prompt-data",)),
    "a set twice": ((*DISTIL, "--eval-prompt-data", "a", "x", "a", "y"), ("--eval-prompt-data",)),
    "teacher evaluated on nothing": ((*DISTIL, "--eval-teacher"), ("--eval-teacher", "--eval-prompt-data")),
    "two ways to name teachers": (
        (*DISTIL, "--opd-teachers", "a=http://127.0.0.1:2/generate"),
        ("--rm-url", "--opd-teachers"),
    ),
    "a teacher without a name": (
        ("--use-opd", "--opd-type", "sglang", "--opd-teachers", "http://127.0.0.1:2/generate"),
        ("--opd-teachers", "NAME=URL"),
    ),
    "several teachers evaluated": (
        (
            *("--use-opd", "--opd-type", "sglang", "--opd-teachers", "a=http://127.0.0.1:2/generate"),
            *("--eval-teacher", "--eval-prompt-data", "a", "b"),
        ),
        ("--eval-teacher", "--opd-teachers"),
    ),
    "top-k of nobody": (("--rm-type", "math", "--opd-top-k", "8"), ("--opd-top-k", "--use-opd")),
    "teacher evaluated nowhere": (
        ("--rm-type", "math", "--eval-teacher", "--eval-prompt-data", "a", "b"),
        ("--eval-teacher", "--rm-url"),
    ),
    "many greedy answers": (
        (*DISTIL, "--n-samples-per-eval-prompt", "4"),
        ("--n-samples-per-eval-prompt", "--eval-temperature"),
    ),
    "an interval without a folder": ((*DISTIL, "--save-interval", "2"), ("--save-interval", "--save")),
    "system prompt without template": (
        (*DISTIL, "--system-prompt", "be brief"),
        ("--system-prompt", "--apply-chat-template"),
    ),
    "pictures neither small nor large": (
        (*DISTIL, "--image-min-pixels", "9000", "--image-max-pixels", "100"),
        ("--image-min-pixels", "--image-max-pixels"),
    ),
    "schedule that rises": ((*DISTIL, "--lr", "1e-5", "--min-lr", "1e-4"), ("--lr", "--min-lr")),
    "weights without room": (
        (*DISTIL, "--use-tis", "--tis-clip-low", "2"),
        ("--tis-clip-low", "--tis-clip"),
    ),
    "bounds of no weights": ((*DISTIL, "--tis-clip", "3"), ("--tis-clip", "--use-tis")),
    "top-k loss without top-k": (
        (*DISTIL, "--opd-loss", "topk", "--opd-top-k", "0"),
        ("--opd-loss topk", "--opd-top-k"),
    ),
    "a divergence of no use": ((*DISTIL, "--opd-divergence", "jsd"), ("--opd-divergence", "--opd-loss")),
    "a clip of no use": (
        (*DISTIL, "--opd-loss", "topk", "--opd-kl-clip", "1"),
        ("--opd-kl-clip", "--opd-loss sampled"),
    ),
    "a discount of no use": (
        (*DISTIL, "--opd-loss", "topk", "--opd-kl-discount", "1"),
        ("--opd-kl-discount", "--opd-loss sampled"),
    ),
    "a mixture of no use": (
        (*DISTIL, "--opd-loss", "topk", "--opd-jsd-beta", "0.2"),
        ("--opd-jsd-beta", "--opd-divergence jsd"),
    ),
    "a mixture that is none": (
        (*DISTIL, "--opd-loss", "topk", "--opd-divergence", "jsd", "--opd-jsd-beta", "1"),
        ("--opd-jsd-beta is 1",),
    ),
    "an end without a schedule": (
        (*DISTIL, "--opd-kl-coef-end", "0.1"),
        ("--opd-kl-coef-end", "--opd-kl-coef-schedule"),
    ),
    "a gate without grades": ((*DISTIL, "--opd-gate", "wrong"), ("--opd-gate", "--rm-type")),
    "a clip without distillation": (
        ("--rm-type", "math", "--opd-kl-clip", "1"),
        ("--opd-kl-clip", "--use-opd"),
    ),
    "a schedule without distillation": (
        ("--rm-type", "math", "--opd-kl-coef-schedule", "linear"),
        ("--opd-kl-coef-schedule", "--use-opd"),
    ),
    "rewards for imitation": (
        (*URL, "--loss-type", "sft_loss", "--sample-from", "teacher", "--custom-rm-path", "a.b"),
        ("--custom-rm-path", "--loss-type sft_loss"),
    ),
    "a reference for the teacher's text": (
        (*DISTIL, "--opd-loss", "topk", "--sample-from", "teacher", "--kl-loss-coef", "0.1"),
        ("--kl-loss-coef", "--sample-from"),
    ),
    "a deterministic teacher": (
        (*DISTIL, "--opd-loss", "topk", "--sample-from", "teacher", "--deterministic-rollout"),
        ("--deterministic-rollout", "teacher"),
    ),
    "a gate without distillation": (
        ("--rm-type", "math", "--opd-gate", "wrong"),
        ("--opd-gate", "--use-opd"),
    ),
    "imitating oneself": (
        ("--loss-type", "sft_loss", *URL),
        ("--loss-type sft_loss", "--sample-from teacher"),
    ),
    "imitating and distilling": (
        (*DISTIL, "--loss-type", "sft_loss", "--sample-from", "teacher"),
        ("--loss-type sft_loss", "--use-opd"),
    ),
    "a teacher that writes without address": (
        ("--loss-type", "sft_loss", "--sample-from", "teacher"),
        ("--sample-from teacher", "--rm-url"),
    ),
    "several teachers that write": (
        (*("--loss-type", "sft_loss", "--sample-from", "teacher"), "--opd-teachers", "a=http://h/generate"),
        ("--sample-from teacher", "--opd-teachers"),
    ),
    "rewards for the teacher's text": (
        (*URL, "--rm-type", "math", "--sample-from", "teacher"),
        ("--sample-from teacher", "sft_loss", "--opd-loss topk"),
    ),
    "the sampled signal on the teacher's text": (
        (*DISTIL, "--sample-from", "teacher"),
        ("--sample-from teacher", "sft_loss", "--opd-loss topk"),
    ),
    "a hybrid of the teacher's text": (
        (
            *(*DISTIL, "--opd-loss", "topk", "--sample-from", "teacher"),
            *("--rm-type", "math", "--task-reward-weight", "1"),
        ),
        ("--task-reward-weight", "--sample-from"),
    ),
    "weights for the teacher's text": (
        (*DISTIL, "--opd-loss", "topk", "--sample-from", "teacher", "--use-tis"),
        ("--use-tis", "teacher"),
    ),
    "a tempered rollout without weights": (
        (*DISTIL, "--rollout-temperature", "0.7", "--no-use-tis"),
        ("--rollout-temperature", "--use-tis"),
    ),
    "a deterministic deadline": (
        (*DISTIL, "--deterministic-rollout", "--rollout-deadline", "60"),
        ("--rollout-deadline 60", "--deterministic-rollout"),
    ),
    "deterministic sglang": (
        (*DISTIL, "--engine", "sglang", "--deterministic-rollout"),
        ("--deterministic-rollout", "--engine"),
    ),
    "sglang flags for another engine": (
        (*DISTIL, "--engine", "transformers", "--sglang-log-level", "info"),
        ("--sglang-log-level", "--engine"),
    ),
    "engines that leave GPUs over": (
        (*DISTIL, "--rollout-num-gpus", "6", "--rollout-num-gpus-per-engine", "4"),
        ("--rollout-num-gpus", "--rollout-num-gpus-per-engine"),
    ),
    "memory for engines elsewhere": (
        (*DISTIL, "--weight-sync", "tensor", "--rollout-engine-urls", "http://h:1"),
        ("--weight-sync tensor", "--rollout-engine-urls", "--weight-sync distributed"),
    ),
    "a group on shared GPUs": (
        (*DISTIL, "--colocate", "--weight-sync", "distributed"),
        ("--weight-sync distributed", "--colocate", "--weight-sync tensor"),
    ),
    "taking turns and working at once": (
        (*DISTIL, "--colocate", "--async-rollout"),
        ("--async-rollout", "--colocate", "Drop either"),
    ),
    "sharing GPUs with engines elsewhere": (
        (*DISTIL, "--colocate", "--weight-sync", "disk", "--rollout-engine-urls", "http://h:1"),
        ("--colocate", "--rollout-engine-urls", "Drop either"),
    ),
    "sharing GPUs with nobody": (
        (*DISTIL, "--colocate", "--load-debug-rollout-data", "a"),
        ("--load-debug-rollout-data", "Drop --colocate"),
    ),
    "more GPUs to generate than are shared": (
        (*DISTIL, "--colocate", "--actor-num-gpus-per-node", "4", "--rollout-num-gpus", "2"),
        ("--colocate", "the 4 GPUs that train", "--rollout-num-gpus is 2"),
    ),
    "engines over the border of a node": (
        (*DISTIL, "--colocate", "--actor-num-gpus-per-node", "4", "--rollout-num-gpus-per-engine", "3"),
        ("--rollout-num-gpus-per-engine 3", "the 4 GPUs", "--colocate"),
    ),
    "buckets without room": (
        (*DISTIL, "--update-weight-buffer-size", "0"),
        ("--update-weight-buffer-size",),
    ),
    "a file for a plugin": (
        (*DISTIL, "--custom-rm-path", "plugins/reward.py"),
        ("--custom-rm-path", "package.module"),
    ),
    "a strange placeholder": (
        (*DISTIL, "--save-debug-rollout-data", "runs/{step}/{rollout_id}"),
        ("--save-debug-rollout-data", "{step}", "{rollout_id}"),
    ),
    "a nameless placeholder": (
        (*DISTIL, "--load-debug-rollout-data", "runs/{}.parquet"),
        ("--load-debug-rollout-data", "{}", "{rollout_id}"),
    ),
    "a lone brace": (
        (*DISTIL, "--save-debug-rollout-data", "runs/{rollout_id"),
        ("--save-debug-rollout-data", "braces", "{rollout_id}"),
    ),
    "a format that is none": (
        (*DISTIL, "--save-debug-rollout-data", "runs/{rollout_id:many}"),
        ("--save-debug-rollout-data", "braces"),
    ),
    "a format that hides the number": (
        (*DISTIL, "--save-debug-rollout-data", "runs/{rollout_id.real.imag}"),
        ("--save-debug-rollout-data", "{rollout_id.real.imag}"),
    ),
    "one file for every rollout": (
        (*DISTIL, "--save-debug-rollout-data", "rollout.parquet"),
        ("--save-debug-rollout-data", "overwrite", "{rollout_id}"),
    ),
    "writing what is read": (
        (*DISTIL, "--save-debug-rollout-data", "a", "--load-debug-rollout-data", "b"),
        ("--save-debug-rollout-data", "--load-debug-rollout-data", "Drop one"),
    ),
    "a replay that is evaluated": (
        (*DISTIL, "--load-debug-rollout-data", "a", "--eval-prompt-data", "a", "b"),
        ("--eval-prompt-data", "--load-debug-rollout-data", "--load its checkpoint"),
    ),
    "a replay whose teacher is evaluated": (
        (*DISTIL, "--load-debug-rollout-data", "a", "--eval-prompt-data", "a", "b", "--eval-teacher"),
        ("--eval-teacher", "--load-debug-rollout-data"),
    ),
    "a replay that generates ahead": (
        (*DISTIL, "--load-debug-rollout-data", "a", "--async-rollout"),
        ("--async-rollout", "--load-debug-rollout-data"),
    ),
    "an engine url without scheme": (
        (*DISTIL, "--rollout-engine-urls", "localhost:1"),
        ("--rollout-engine-urls",),
    ),
}


@pytest.mark.parametrize(("flags", "named"), CONTRADICTIONS.values(), ids=CONTRADICTIONS.keys())
def test_contradiction_is_refused_and_names_its_flags(
    refusal: Callable[..., str], flags: tuple[str, ...], named: tuple[str, ...]
) -> None:
    message = refusal(*flags, base=MINIMAL)
    assert [name for name in named if name not in message] == []
    assert "not available yet" not in message


@pytest.mark.parametrize(
    ("flags", "gpus", "way"),
    [
        ((), 0, "disk"),
        ((), 8, "distributed"),
        (("--colocate",), 0, "tensor"),
        (("--colocate",), 8, "tensor"),
        (("--colocate", "--weight-sync", "disk"), 8, "disk"),
        (("--rollout-engine-urls", "http://h:1"), 8, "distributed"),
    ],
)
def test_how_weights_are_sent_follows_from_what_there_is(
    parsed: Callable[..., Args], monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], gpus: int, way: str
) -> None:
    monkeypatch.setattr("slime.arguments.weight_sync.visible_gpus", lambda: gpus)
    assert parsed(*flags).weight_sync == way


def test_all_problems_are_told_at_once(refusal: Callable[..., str]) -> None:
    message = refusal("--opd-kl-coef", "0", "--save-interval", "2", "--eval-interval", "3")
    assert "3 problems" in message
    assert all(flag in message for flag in ("--opd-kl-coef", "--save-interval", "--eval-interval"))


PENDING_FLAGS = {
    "--rollout-top-p below 1": ("--rollout-top-p", "0.9"),
    "--rollout-top-k": ("--rollout-top-k", "20"),
}


def test_every_entry_of_the_pending_table_has_its_case_here() -> None:
    assert [name for name, _, _ in PENDING] == list(PENDING_FLAGS)


@pytest.mark.parametrize(("name", "flags"), PENDING_FLAGS.items(), ids=PENDING_FLAGS.keys())
def test_pending_flag_is_refused_and_names_what_is_missing(
    refusal: Callable[..., str], name: str, flags: tuple[str, ...]
) -> None:
    missing = next(sentence for entry, _, sentence in PENDING if entry == name)
    message = refusal(*flags)
    assert f"not available yet: {name}" in message
    assert " ".join(missing.split()) in message


def test_ranks_that_share_a_model_share_a_shard(parsed: Callable[..., Args]) -> None:
    args = parsed(
        *("--actor-num-gpus-per-node", "8", "--train-backend", "megatron", "--sequence-parallel"),
        *("--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"),
    )
    assert args.ranks_per_model == 4
    assert args.num_data_ranks == 2
    assert [args.data_rank(rank) for rank in range(8)] == [0, 0, 1, 1, 0, 0, 1, 1]


def test_a_full_run_of_the_recipe_is_accepted(parsed: Callable[..., Args]) -> None:
    args = parsed(
        *("--apply-chat-template", "--rollout-shuffle", "--system-prompt", "Think first."),
        *("--rollout-batch-size", "32", "--n-samples-per-prompt", "4", "--global-batch-size", "128"),
        *(
            "--use-dynamic-batch-size",
            "--max-tokens-per-gpu",
            "8192",
            "--rm-type",
            "math",
            "--task-reward-weight",
            "0.5",
        ),
        *("--custom-rm-path", "examples.opd_vlm.opd_vlm_reward.reward_func"),
        *("--custom-reward-post-process-path", "examples.opd_vlm.opd_vlm_reward.post_process_rewards"),
        *("--eval-interval", "5", "--eval-prompt-data", "geo3k", "test.parquet", "--eval-teacher"),
        *(
            "--save",
            "ckpt",
            "--save-interval",
            "10",
            "--actor-num-gpus-per-node",
            "4",
            "--rollout-num-gpus",
            "4",
        ),
    )
    assert args.num_train_ranks == 4
