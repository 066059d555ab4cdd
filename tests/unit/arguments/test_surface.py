"""The public flags: those that slime's users know are all there, and no flag is declared twice."""

from __future__ import annotations

import dataclasses

from slime.arguments import GROUPS, Args
from slime.arguments.flags import flags_of

SLIME_FLAGS = {
    "--hf-checkpoint",
    "--prompt-data",
    "--input-key",
    "--label-key",
    "--multimodal-keys",
    "--apply-chat-template",
    "--rollout-shuffle",
    "--num-rollout",
    "--rollout-batch-size",
    "--n-samples-per-prompt",
    "--rollout-max-response-len",
    "--rollout-temperature",
    "--global-batch-size",
    "--micro-batch-size",
    "--use-dynamic-batch-size",
    "--max-tokens-per-gpu",
    "--rm-type",
    "--rm-url",
    "--reward-key",
    "--custom-rm-path",
    "--custom-reward-post-process-path",
    "--custom-generate-function-path",
    "--advantage-estimator",
    "--use-opd",
    "--opd-type",
    "--opd-kl-coef",
    "--opd-teacher-load",
    "--kl-loss-coef",
    "--entropy-coef",
    "--eps-clip",
    "--eps-clip-high",
    "--use-tis",
    "--tis-clip",
    "--tis-clip-low",
    "--lr",
    "--weight-decay",
    "--adam-beta1",
    "--adam-beta2",
    "--eval-interval",
    "--eval-rm-type",
    "--eval-prompt-data",
    "--n-samples-per-eval-prompt",
    "--eval-max-response-len",
    "--save",
    "--load",
    "--save-interval",
    "--train-backend",
    "--colocate",
    "--actor-num-nodes",
    "--actor-num-gpus-per-node",
    "--rollout-num-gpus",
    "--rollout-num-gpus-per-engine",
    "--use-wandb",
    "--wandb-project",
    "--wandb-group",
    "--system-prompt",
    "--seed",
    "--calculate-per-token-loss",
    "--save-debug-rollout-data",
    "--load-debug-rollout-data",
    "--custom-reward-function",
    "--custom-post-process-rewards",
    "--tensor-model-parallel-size",
    "--sequence-parallel",
    "--pipeline-model-parallel-size",
    "--context-parallel-size",
    "--expert-model-parallel-size",
    "--expert-tensor-parallel-size",
    "--use-distributed-optimizer",
}


def test_every_flag_that_slime_users_know_is_declared() -> None:
    spelled = {word for group in GROUPS for flag in flags_of(group) for word in flag.spellings}
    assert SLIME_FLAGS - spelled == set()


def test_no_flag_and_no_attribute_is_declared_twice() -> None:
    flags = [flag for group in GROUPS for flag in flags_of(group)]
    spelled = [word for flag in flags for word in flag.spellings]
    attributes = [flag.attribute for flag in flags]
    assert len(set(spelled)) == len(spelled)
    assert len(set(attributes)) == len(attributes)


def test_args_is_exactly_its_groups_and_the_pass_through() -> None:
    flags = {flag.attribute for group in GROUPS for flag in flags_of(group)}
    assert {field.name for field in dataclasses.fields(Args)} == flags | {"sglang"}


def test_every_flag_has_a_help_text_that_is_a_sentence() -> None:
    for group in GROUPS:
        for flag in flags_of(group):
            assert flag.spec.help.endswith((".", ")")), flag.cli
            assert len(flag.spec.help) > 5, flag.cli
