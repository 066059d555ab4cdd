"""From words to values: types, aliases, repeated flags, pass-through, derived defaults, unknown flags."""

from __future__ import annotations

import dataclasses
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from slime.arguments import Args, ArgumentsError, devices, parse_args

ROOT = Path(__file__).resolve().parents[3]
Parse = Callable[..., Args]
Refuse = Callable[..., str]


def test_values_have_the_declared_types(parsed: Parse) -> None:
    args = parsed(
        "--lr",
        "1e-4",
        "--n-samples-per-prompt",
        "8",
        "--rollout-stop-token-ids",
        "5",
        "7",
        "--rollout-shuffle",
    )
    assert (args.lr, args.n_samples_per_prompt) == (1e-4, 8)
    assert args.rollout_stop_token_ids == (5, 7)
    assert args.rollout_shuffle is True


def test_the_alias_of_the_published_recipe_sets_the_same_argument(parsed: Parse) -> None:
    args = parsed("--custom-reward-function", "a.b.reward", "--custom-post-process-rewards", "a.b.post")
    assert (args.custom_rm_path, args.custom_reward_post_process_path) == ("a.b.reward", "a.b.post")


def test_rm_url_is_one_string_and_rm_urls_has_all(parsed: Parse) -> None:
    args = parsed()
    assert args.rm_url == "http://127.0.0.1:13141/generate"
    assert args.rm_urls == (args.rm_url,)
    assert (
        parse_args(
            ["--hf-checkpoint", "m", "--prompt-data", "d", "--num-rollout", "1", "--rm-type", "math"]
        ).rm_url
        is None
    )


def test_disable_flag_turns_its_argument_off(parsed: Parse) -> None:
    assert parsed().grpo_std_normalization is True
    assert parsed("--disable-grpo-std-normalization").grpo_std_normalization is False


def test_eval_sets_are_pairs(parsed: Parse) -> None:
    assert parsed("--eval-prompt-data", "a", "a.parquet", "b", "b.jsonl").eval_sets == (
        ("a", "a.parquet"),
        ("b", "b.jsonl"),
    )


def test_multimodal_keys_are_json(parsed: Parse, refusal: Refuse) -> None:
    assert parsed().multimodal_keys == {"image": "images"}
    assert parsed("--multimodal-keys", '{"image": "pictures"}').multimodal_keys == {"image": "pictures"}
    assert parsed("--multimodal-keys", "{}").multimodal_keys == {}
    assert "--multimodal-keys" in refusal("--multimodal-keys", "images")
    assert "video" in refusal("--multimodal-keys", '{"video": "clips"}')


def test_sglang_flags_are_passed_through(parsed: Parse) -> None:
    args = parsed(
        *("--engine", "sglang", "--sglang-mem-fraction-static", "0.5", "--sglang-disable-radix-cache"),
        *(
            "--sglang-chunked-prefill-size=-1",
            "--lr",
            "1e-5",
            "--sglang-allowed-media-domains",
            "a.org",
            "b.org",
        ),
    )
    assert args.sglang == {
        "mem_fraction_static": "0.5",
        "disable_radix_cache": True,
        "chunked_prefill_size": "-1",
        "allowed_media_domains": ("a.org", "b.org"),
    }
    assert args.lr == 1e-5
    assert " ".join(args.sglang_command_line()) == (
        "--mem-fraction-static 0.5 --disable-radix-cache --chunked-prefill-size -1 "
        "--allowed-media-domains a.org b.org"
    )


@pytest.mark.parametrize(
    ("flag", "word"),
    [
        ("--sglang-api-key", "SLIME_ENGINE_API_KEY"),
        ("--sglang-admin-api-key", "SLIME_ENGINE_ADMIN_KEY"),
        ("--sglang-port", "slime itself"),
    ],
)
def test_sglang_flags_that_are_not_the_users_are_refused(refusal: Refuse, flag: str, word: str) -> None:
    message = refusal("--engine", "sglang", flag, "value")
    assert flag in message
    assert word in message


def test_derived_defaults_follow_what_they_derive_from(parsed: Parse) -> None:
    args = parsed(
        "--rollout-batch-size", "6", "--n-samples-per-prompt", "2", "--eps-clip", "0.1", "--seed", "7"
    )
    assert (args.global_batch_size, args.eps_clip_high, args.rollout_seed) == (12, 0.1, 7)
    assert args.eval_max_response_len == args.rollout_max_response_len
    assert (args.steps_per_rollout, args.total_train_steps) == (1, 3)
    assert parsed("--rollout-batch-size", "6", "--global-batch-size", "8").steps_per_rollout == 3


@pytest.mark.parametrize(
    ("flags", "weighted"),
    [
        ((), False),
        (("--use-tis",), True),
        (("--rollout-temperature", "0.8"), True),
        (("--global-batch-size", "64"), True),
        (("--global-batch-size", "128"), False),
        (("--global-batch-size", "64", "--opd-loss", "topk"), False),
        (
            (
                "--global-batch-size",
                "64",
                "--opd-loss",
                "topk",
                "--rm-type",
                "math",
                "--task-reward-weight",
                "1",
            ),
            True,
        ),
        (("--global-batch-size", "64", "--no-use-tis"), False),
        (("--async-rollout",), True),
        (("--async-rollout", "--no-use-tis"), False),
        (("--async-rollout", "--opd-loss", "topk", "--sample-from", "teacher"), False),
        (("--opd-loss", "topk", "--sample-from", "teacher", "--global-batch-size", "64"), False),
    ],
)
def test_importance_weights_are_on_where_they_are_needed(
    parsed: Parse, flags: tuple[str, ...], weighted: bool
) -> None:
    args = parsed(*flags)
    assert (args.use_tis, args.tis_clip, args.tis_clip_low) == (weighted, 2.0, 0.0)


@pytest.mark.parametrize(
    ("flags", "top_k"),
    [((), 0), (("--opd-top-k", "8"), 8), (("--opd-loss", "topk"), 64)],
)
def test_the_teachers_top_k_is_asked_for_where_it_is_learned_from(
    parsed: Parse, flags: tuple[str, ...], top_k: int
) -> None:
    assert parsed(*flags).opd_top_k == top_k


def test_a_rule_is_one_of_ours_or_a_dotted_path(parsed: Parse, refusal: Callable[..., str]) -> None:
    args = parsed("--rm-type", "my.rules.grade", "--eval-rm-type", "my.rules.other")
    assert (args.rm_type, args.eval_rm_type) == ("my.rules.grade", "my.rules.other")
    for wrong in ("mathe", "rules/grade.py"):
        assert "math nor a dotted path" in refusal("--rm-type", wrong)


@pytest.mark.parametrize(
    ("gpus", "engine", "precision"), [(0, "transformers", "float32"), (8, "sglang", "bfloat16")]
)
def test_engine_and_precision_follow_the_machine(
    monkeypatch: pytest.MonkeyPatch, parsed: Parse, gpus: int, engine: str, precision: str
) -> None:
    for module in ("engine", "optim"):
        monkeypatch.setattr(f"slime.arguments.{module}.visible_gpus", lambda: gpus)
    args = parsed()
    assert (args.engine, args.precision) == (engine, precision)
    assert parsed("--engine", "transformers", "--train-dtype", "float32").precision == "float32"


def test_visible_gpus_counts_cuda_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    devices.visible_gpus.cache_clear()
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    assert devices.visible_gpus() == 3
    devices.visible_gpus.cache_clear()


def test_args_are_frozen_and_cross_process_borders(parsed: Parse) -> None:
    args = parsed("--engine", "sglang", "--sglang-log-level", "info")
    assert pickle.loads(pickle.dumps(args)) == args
    with pytest.raises(dataclasses.FrozenInstanceError):
        args.lr = 1.0  # pyright: ignore[reportAttributeAccessIssue]


def test_args_can_be_varied_in_code_and_are_checked_again(parsed: Parse) -> None:
    args = parsed()
    assert dataclasses.replace(args, lr=0.5).lr == 0.5
    with pytest.raises(ArgumentsError, match="--opd-kl-coef is 0"):
        dataclasses.replace(args, opd_kl_coef=0.0)
    with pytest.raises(ArgumentsError, match=r"--rollout-temperature 0\.8 .*--use-tis"):
        dataclasses.replace(args, rollout_temperature=0.8)
    assert dataclasses.replace(args, rollout_temperature=0.8, use_tis=True).use_tis


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--opd-kl-coeff", "--opd-kl-coef"),
        ("--custom-reward-funtion", "--custom-reward-function"),
        ("--rollout-batchsize", "--rollout-batch-size"),
        ("--n-sample-per-prompt", "--n-samples-per-prompt"),
        ("--hf-chekpoint", "--hf-checkpoint"),
    ],
)
def test_unknown_flag_names_the_nearest(refusal: Refuse, typed: str, meant: str) -> None:
    assert f"unknown flag {typed}; did you mean {meant}?" in refusal(typed, "1")


def test_unknown_flag_is_named_even_where_required_ones_are_missing(refusal: Refuse) -> None:
    assert "did you mean --hf-checkpoint?" in refusal("--hf-chekpoint", "m", base=())


def test_abbreviations_are_unknown_flags(refusal: Refuse) -> None:
    assert "unknown flag --opd-kl" in refusal("--opd-kl", "0.5")


def test_words_without_a_flag_are_refused(refusal: Refuse) -> None:
    assert "unexpected words: extra" in refusal("--lr", "1e-4", "extra")


def test_missing_required_flags_are_all_named(refusal: Refuse) -> None:
    message = refusal("--lr", "1e-4", base=())
    assert all(flag in message for flag in ("--hf-checkpoint", "--prompt-data", "--num-rollout"))


REPLAY = ("--hf-checkpoint", "m", "--num-rollout", "3", "--load-debug-rollout-data", "recorded")


def test_a_replay_needs_neither_prompts_nor_a_teacher(refusal: Refuse) -> None:
    args = parse_args([*REPLAY, "--use-opd", "--opd-type", "sglang"])
    assert args.replays
    assert (args.prompt_data, args.rm_url) == ("", None)
    without = ("--hf-checkpoint", "m", "--num-rollout", "3", "--rm-type", "math")
    assert "--prompt-data" in refusal(base=without)
    with pytest.raises(ArgumentsError, match="--prompt-data"):
        dataclasses.replace(args, load_debug_rollout_data=None)


def test_where_rollouts_are_recorded_does_not_depend_on_the_process(parsed: Parse) -> None:
    args = parsed("--save-debug-rollout-data", "runs/a/{rollout_id}.parquet")
    assert args.save_debug_rollout_data == str(Path.cwd() / "runs/a/{rollout_id}.parquet")
    assert not args.replays


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--lr", "much"), "--lr"),
        (("--lr", "nan"), "--lr is nan; it must be a finite number"),
        (("--num-rollout", "-1"), "--num-rollout is -1; it must be at least 0"),
        (("--rollout-top-p", "1.5"), "--rollout-top-p is 1.5; it must be at most 1"),
        (("--adam-eps", "0"), "--adam-eps is 0.0; it must be greater than 0"),
        (("--advantage-estimator", "ppo"), "--advantage-estimator"),
        (("--opd-type", "local"), "--opd-type"),
        (("--save-interval", "0", "--save", "s"), "--save-interval is 0; it must be at least 1"),
    ],
)
def test_values_out_of_range_are_refused(refusal: Refuse, flags: tuple[str, ...], words: str) -> None:
    assert words in refusal(*flags)


def test_help_lists_every_group_and_ends_well(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_args(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    for words in ("Distillation:", "--opd-kl-coef", "(default: 1.0)", "(required)", "--sglang-NAME"):
        assert words in printed


def test_a_command_line_is_checked_before_anything_is_installed() -> None:
    heavy = ("torch", "numpy", "transformers", "ray", "PIL", "pyarrow")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({heavy!r}))\n"
        "from slime.arguments import parse_args\n"
        "parse_args(['--hf-checkpoint', 'm', '--prompt-data', 'd', '--num-rollout', '1', '--rm-type', 'math',"
        " '--engine', 'sglang', '--train-dtype', 'bfloat16', '--weight-sync', 'distributed'])"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
