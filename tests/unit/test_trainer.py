"""From samples to shards, and the steps of a rollout."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from slime.arguments import Args
from slime.trainer import TrainShard, build_shards
from slime.utils.types import Sample, SampleStatus
from tests.fakes.tiny_model import make_samples
from tests.fakes.training import DISTILL, ONE_BATCH, make_args


def args(*flags: str, samples: int = 8, distill: bool = True) -> Args:
    signal = DISTILL if distill else ("--rm-type", "math")
    return make_args(Path("model"), *signal, *flags, samples=samples)


def shards(given: list[Sample], pictures: dict[str, bytes], *flags: str, ranks: int = 1) -> list[TrainShard]:
    return build_shards(args(*(flags or ONE_BATCH)), given, pictures, ranks, 5)


def trained(shard: TrainShard, step: int = 0) -> list[int]:
    """Return the indices of the samples in one step."""
    return sorted(shard.samples[local].index for batch in shard.steps[step].micro_batches for local in batch)


def test_shards_share_samples_denominators_and_counts() -> None:
    samples, pictures = make_samples(8)
    built = shards(samples, pictures, "--micro-batch-size", "2", ranks=3)
    assert sorted(index for shard in built for index in trained(shard)) == list(range(8))
    assert {shard.steps[0].num_tokens for shard in built} == {
        sum(sum(sample.loss_mask or []) for sample in samples)
    }
    assert {shard.steps[0].num_samples for shard in built} == {8}
    assert len({len(shard.steps[0].micro_batches) for shard in built}) == 1
    for shard in built:
        assert shard.rollout_id == 5
        assert set(shard.pictures) == {sha256 for sample in shard.samples for sha256 in sample.image_hashes}
        assert pickle.loads(pickle.dumps(shard)).steps == shard.steps


def test_several_steps_split_the_rollout_in_order() -> None:
    samples, pictures = make_samples(8)
    (shard,) = shards(samples, pictures, *ONE_BATCH, "--global-batch-size", "4")
    assert [trained(shard, 0), trained(shard, 1)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [step.num_samples for step in shard.steps] == [4, 4]


def test_the_budget_is_that_of_one_rank_of_a_shared_row() -> None:
    samples, pictures = make_samples(8, with_pictures=(False,))
    budget = ("--use-dynamic-batch-size", "--max-tokens-per-gpu", "20")
    shared = ("--train-backend", "megatron", "--context-parallel-size", "2", "--actor-num-gpus-per-node", "2")
    counts = []
    for flags, limit in (((*budget,), 20), ((*budget, *shared), 40)):
        (shard,) = shards(samples, pictures, *flags)
        sizes = [
            sum(shard.samples[local].expanded_length(2) for local in batch)
            for batch in shard.steps[0].micro_batches
        ]
        assert limit / 2 < max(sizes) <= limit
        counts.append(len(sizes))
    assert counts[1] <= counts[0] / 2 + 1


def spoil(sample: Sample, how: str) -> None:
    match how:
        case "failed":
            sample.status, sample.teacher_log_probs = SampleStatus.FAILED, None
        case "aborted":
            sample.status = SampleStatus.ABORTED
        case "masked":
            sample.loss_mask = [0] * sample.response_length
        case "empty":
            sample.tokens = sample.prompt_tokens
            sample.response_length, sample.loss_mask, sample.teacher_log_probs = 0, [], None


@pytest.mark.parametrize("how", ["failed", "aborted", "masked", "empty"])
def test_a_sample_without_a_signal_counts_nowhere(how: str) -> None:
    samples, pictures = make_samples(8)
    before = shards(samples, pictures)[0].steps[0]
    tokens = sum(samples[3].loss_mask or [])
    spoil(samples[3], how)
    (shard,) = shards(samples, pictures)
    assert trained(shard) == [0, 1, 2, 4, 5, 6, 7]
    assert shard.steps[0].num_samples == 7
    assert shard.steps[0].num_tokens == before.num_tokens - tokens


def test_what_is_left_is_spread_over_the_steps() -> None:
    samples, pictures = make_samples(8)
    for sample in samples[:4]:
        spoil(sample, "failed")
    (shard,) = shards(samples, pictures, *ONE_BATCH, "--global-batch-size", "4")
    assert [trained(shard, 0), trained(shard, 1)] == [[4, 5], [6, 7]]


def test_a_rollout_with_nothing_to_learn_is_an_error() -> None:
    samples, pictures = make_samples(8)
    for sample in samples:
        spoil(sample, "failed")
    with pytest.raises(ValueError, match=r"rollout 5: 0 of 8 samples .*'failed': 8"):
        shards(samples, pictures)


def test_group_advantages_leave_failed_samples_out() -> None:
    samples, pictures = make_samples(8, group_size=4)
    for sample, reward in zip(samples, [1, 0, 0, 99, 1, 1, 1, 1], strict=True):
        sample.metadata["train_reward"] = reward
    spoil(samples[3], "failed")
    (shard,) = shards(samples, pictures, *ONE_BATCH, "--disable-grpo-std-normalization")
    advantages = {sample.index: sample.advantages for sample in shard.samples}
    assert advantages[0][0].item() == pytest.approx(2 / 3)
    assert advantages[1][0].item() == pytest.approx(-1 / 3)
    assert all(advantages[index].abs().max() == 0 for index in (4, 5, 6, 7))


@pytest.mark.parametrize("flags", [(), ("--disable-grpo-std-normalization",)])
def test_the_task_stream_keeps_its_weight_through_normalisation(flags: tuple[str, ...]) -> None:
    samples, pictures = make_samples(8, group_size=4)
    for sample in samples:
        sample.metadata["task_reward"] = sample.metadata["train_reward"]
    stream = ("--rm-type", "math", "--task-reward-weight")
    (light,) = shards(samples, pictures, *ONE_BATCH, *flags, *stream, "0.5")
    (heavy,) = shards(samples, pictures, *ONE_BATCH, *flags, *stream, "2")
    assert max(sample.advantages.abs().max() for sample in light.samples) > 0
    for one, other in zip(light.samples, heavy.samples, strict=True):
        torch.testing.assert_close(4 * one.advantages, other.advantages)


@pytest.mark.parametrize(("gate", "kept"), [("wrong", False), ("right", True)])
def test_a_gate_chooses_what_is_distilled_by_the_tasks_grade(gate: str, kept: bool) -> None:
    samples, pictures = make_samples(8)
    (shard,) = shards(samples, pictures, *ONE_BATCH, "--rm-type", "math", "--opd-gate", gate)
    for sample in shard.samples:
        solved = samples[sample.index].metadata["task_reward"] == 1
        assert sample.distill_mask is not None
        assert sample.distill_mask.equal(sample.loss_mask * (solved == kept))
    (step,) = shard.steps
    chosen = [sample for sample in samples if (sample.metadata["task_reward"] == 1) == kept]
    assert step.num_distilled_samples == len(chosen) < step.num_samples
    assert step.num_distilled_tokens == sum(sum(sample.loss_mask or []) for sample in chosen)
    (whole,) = shards(samples, pictures, *ONE_BATCH)[0].steps
    assert (whole.num_distilled_tokens, whole.num_distilled_samples) == (step.num_tokens, step.num_samples)


def test_a_gate_needs_grades() -> None:
    samples, pictures = make_samples(8)
    del samples[5].metadata["task_reward"]
    with pytest.raises(ValueError, match=r"sample 5 has no metadata\['task_reward'\].*--label-key"):
        shards(samples, pictures, *ONE_BATCH, "--rm-type", "math", "--opd-gate", "wrong")


def test_the_teachers_top_k_goes_along_where_it_is_asked_for() -> None:
    samples, pictures = make_samples(4, top_k=3)
    (shard,) = build_shards(args(*ONE_BATCH, "--opd-top-k", "3", samples=4), samples, pictures, 1, 0)
    assert {"teacher_top_ids", "teacher_top_log_probs", "teacher_tail_mass"} <= shard.carried
    (without,) = build_shards(args(*ONE_BATCH, samples=4), samples, pictures, 1, 0)
    assert without.carried == {"rollout_log_probs", "teacher_log_probs"}
    samples[1].teacher_top_ids = None
    for flags in (("--opd-top-k", "3"), ("--opd-top-k", "3", "--opd-loss", "topk")):
        with pytest.raises(ValueError, match="sample 1 has no top-k of the teacher, and --opd-top-k"):
            build_shards(args(*ONE_BATCH, *flags, samples=4), samples, pictures, 1, 0)


def test_a_wider_top_k_is_cut_and_a_narrower_one_refused() -> None:
    samples, pictures = make_samples(4, top_k=5)
    two = ("--opd-top-k", "2")
    (shard,) = build_shards(args(*ONE_BATCH, *two, samples=4), samples, pictures, 1, 0)
    for sample in shard.samples:
        assert sample.teacher_top_log_probs is not None
        assert sample.teacher_tail_mass is not None
        assert sample.teacher_top_log_probs.shape == (sample.response_length, 2)
        whole = sample.teacher_top_log_probs.exp().sum(1) + sample.teacher_tail_mass
        torch.testing.assert_close(whole[sample.loss_mask > 0], torch.ones(int(sample.loss_mask.sum())))
    with pytest.raises(ValueError, match="has the teacher's top-5, and --opd-top-k is 6"):
        build_shards(args(*ONE_BATCH, "--opd-top-k", "6", samples=4), samples, pictures, 1, 0)


@pytest.mark.parametrize(
    ("name", "value"),
    [("teacher_top_log_probs", float("nan")), ("teacher_top_ids", -1), ("teacher_tail_mass", -5.0)],
)
def test_a_top_k_must_be_a_distribution_where_it_is_trained_on(name: str, value: float) -> None:
    samples, pictures = make_samples(4, top_k=3)
    flags = (*ONE_BATCH, "--opd-top-k", "3")
    assert samples[0].loss_mask is not None
    assert samples[0].loss_mask[-1] == 0
    if name != "teacher_top_ids":
        getattr(samples[0], name)[-1] = value
        build_shards(args(*flags, samples=4), samples, pictures, 1, 0)
    getattr(samples[0], name)[0] = value
    with pytest.raises(ValueError, match="sample 0 has a top-k of the teacher that is no distribution"):
        build_shards(args(*flags, samples=4), samples, pictures, 1, 0)


def test_rewards_without_anything_to_compare_them_with_are_refused() -> None:
    samples, pictures = make_samples(4, group_size=1)
    samples[2].metadata["train_reward"] = 1.0
    flags = ("--n-samples-per-prompt", "1", "--rollout-batch-size", "4")
    with pytest.raises(ValueError, match="--n-samples-per-prompt is 1: every task advantage would be zero"):
        build_shards(args(*ONE_BATCH, *flags, samples=4), samples, pictures, 1, 0)


def test_what_the_teacher_wrote_it_has_scored() -> None:
    samples, pictures = make_samples(4)
    wrote = ("--loss-type", "sft_loss", "--sample-from", "teacher", "--rm-url", "http://h/generate")
    flags = (*ONE_BATCH, *wrote)
    (shard,) = build_shards(args(*flags, samples=4, distill=False), samples, pictures, 1, 0)
    assert shard.carried == {"teacher_log_probs"}, "the student's engine has sampled nothing"
    for sample in shard.samples:
        assert sample.teacher_log_probs is not None
        expected = torch.tensor(samples[sample.index].rollout_log_probs) * sample.loss_mask
        torch.testing.assert_close(sample.teacher_log_probs, expected)
    tempered = (*flags, "--rollout-temperature", "0.7")
    (shard,) = build_shards(args(*tempered, samples=4, distill=False), samples, pictures, 1, 0)
    assert shard.carried == set(), "scores at another temperature are not compared"


def test_reinforce_plus_plus_discounts_and_whitens_over_the_batch() -> None:
    samples, pictures = make_samples(8)
    flags = (*ONE_BATCH, "--advantage-estimator", "reinforce_plus_plus", "--gamma", "0.9")
    (shard,) = shards(samples, pictures, *flags)
    values = torch.cat([sample.advantages[sample.loss_mask > 0] for sample in shard.samples])
    assert values.mean().abs() < 1e-5
    assert values.std() == pytest.approx(1.0, abs=1e-4)
    good = next(sample for sample in shard.samples if samples[sample.index].metadata["train_reward"] == 1)
    assert good.advantages[0] < good.advantages[1]


def test_pure_distillation_has_no_task_advantage_under_any_estimator() -> None:
    samples, pictures = make_samples(8)
    for sample in samples:
        sample.metadata["train_reward"] = 0.0
    for flags in ((), ("--advantage-estimator", "reinforce_plus_plus"), ("--normalize-advantages",)):
        (shard,) = shards(samples, pictures, *ONE_BATCH, *flags)
        assert all(sample.advantages.abs().max() == 0 for sample in shard.samples)


def test_scores_of_masked_tokens_may_be_anything() -> None:
    samples, pictures = make_samples(2)
    scores = samples[0].teacher_log_probs
    assert scores is not None
    assert samples[0].loss_mask is not None
    assert samples[0].loss_mask[-1] == 0
    scores[-1] = float("nan")
    shard = build_shards(args(*ONE_BATCH, samples=2), samples, pictures, 1, 0)[0]
    assert all(sample.teacher_log_probs is not None for sample in shard.samples)


def test_engine_log_probs_are_used_only_if_all_samples_have_them() -> None:
    samples, pictures = make_samples(8)
    samples[2].rollout_log_probs = None
    assert shards(samples, pictures)[0].carried == {"teacher_log_probs"}


@pytest.mark.parametrize("flags", [("--use-tis",), ("--rollout-temperature", "0.8")])
def test_importance_weights_need_the_engines_log_probs_of_every_sample(flags: tuple[str, ...]) -> None:
    samples, pictures = make_samples(8)
    assert all(
        sample.rollout_log_probs is not None
        for sample in shards(samples, pictures, *ONE_BATCH, *flags)[0].samples
    )
    samples[2].rollout_log_probs = None
    with pytest.raises(
        ValueError, match=r"sample 2 \(\d+ response tokens\) has no rollout_log_probs.*--use-tis"
    ):
        shards(samples, pictures, *ONE_BATCH, *flags)
    spoil(samples[2], "failed")
    assert len(shards(samples, pictures, *ONE_BATCH, *flags)[0].samples) == 7


def test_without_distillation_no_teacher_is_asked_for() -> None:
    samples, pictures = make_samples(8)
    for sample in samples:
        sample.teacher_log_probs = None
    built = build_shards(args(*ONE_BATCH, distill=False), samples, pictures, 1, 0)
    assert len(built[0].samples) == 8


def set_field(name: str, value: Any) -> Callable[[Sample], None]:
    return lambda sample: setattr(sample, name, value)


def nan_score(sample: Sample) -> None:
    assert sample.teacher_log_probs is not None
    sample.teacher_log_probs[1] = float("nan")


def no_reward(sample: Sample) -> None:
    sample.metadata.clear()


@pytest.mark.parametrize(
    ("spoiled", "message"),
    [
        (set_field("teacher_log_probs", None), r"sample 3 \(\d+ response tokens\) has no teacher_log_probs"),
        (
            set_field("teacher_log_probs", torch.zeros(99)),
            r"sample 3 has 99 values in teacher_log_probs and a resp",
        ),
        (set_field("rollout_log_probs", [0.0] * 98), r"sample 3 has 98 values in rollout_log_probs"),
        (set_field("loss_mask", [1] * 97), r"sample 3 has 97 values in loss_mask"),
        (nan_score, r"sample 3 has teacher_log_probs\[1\] = nan"),
        (no_reward, r"sample 3 has no metadata\['train_reward'\]"),
        (set_field("group_index", None), "sample 3 has no group_index"),
        (set_field("index", None), "a sample has no index"),
        (
            set_field("multimodal_train_inputs", {"image_hashes": ["ab"], "image_grid_thw": []}),
            "sample 3 has 1 image_hashes and 0 image_grid_thw",
        ),
    ],
)
def test_parts_that_do_not_fit_are_named(spoiled: Callable[[Sample], None], message: str) -> None:
    samples, pictures = make_samples(8)
    spoiled(samples[3])
    with pytest.raises(ValueError, match=message):
        shards(samples, pictures)


def test_missing_pictures_are_named() -> None:
    samples, _ = make_samples(8)
    with pytest.raises(ValueError, match="rollout 5: the bytes of 2 pictures are missing"):
        shards(samples, {})
