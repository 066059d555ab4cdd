"""`examples/opd_vlm/opd_vlm_reward.py`: pure by default, hybrid by its marked lines."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.opd_vlm import opd_vlm_reward
from slime.rollout.rm_hub.math_rm import compute_math_reward
from slime.utils.types import Sample
from tests.fakes.rollouts import answered_sample, rollout_args

ANSWER = {
    "meta_info": {
        "input_token_logprobs": [[None, 42, None], [-1.0, 11, None], [-2.0, 12, None], [-3.0, 2, None]]
    }
}


def samples() -> list[Sample]:
    return [answered_sample(0, reward=ANSWER), answered_sample(1, reward=ANSWER, label="5")]


def test_pure_distillation_returns_zeros() -> None:
    batch = samples()
    assert opd_vlm_reward.post_process_rewards(rollout_args(), batch) == ([0.0, 0.0], [0.0, 0.0])
    for sample in batch:
        assert sample.teacher_log_probs is not None
        assert sample.teacher_log_probs.tolist() == [-1.0, -2.0, -3.0]


def test_hybrid_by_the_marked_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opd_vlm_reward, "TASK_REWARD_WEIGHT", 0.5)
    batch = samples()
    assert [compute_math_reward(sample) for sample in batch] == [1.0, 0.0]
    assert opd_vlm_reward.post_process_rewards(rollout_args(), batch) == ([1.0, 0.0], [0.5, 0.0])


def test_it_stays_a_page() -> None:
    assert len(Path(opd_vlm_reward.__file__).read_text(encoding="utf-8").splitlines()) <= 60
