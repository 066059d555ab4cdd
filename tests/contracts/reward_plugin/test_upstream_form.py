"""A plugin in upstream's form runs unmodified, and gives the trainer what ours gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from slime.engines.errors import ScoreMismatchError
from slime.rollout.manager import RolloutManager
from slime.rollout.rollout import RolloutBatch
from tests.fakes.engine_server import FakeEngine, serve
from tests.fakes.rollouts import fake_engine, rollout_args, write_prompts

UPSTREAM = "tests.contracts.reward_plugin.upstream_form"
LIBRARY = "slime.rollout.on_policy_distillation"
EXAMPLE = "examples.opd_vlm.opd_vlm_reward"


def rollout(folder: Path, teacher: FakeEngine, reward: str, post: str) -> RolloutBatch:
    data = str(write_prompts(folder))
    with serve(fake_engine(responses=[[11, 12, 2], [13, 14, 15, 16, 2]])) as student:
        flags = (
            *("--custom-rm-path", f"{reward}.reward_func"),
            *("--custom-reward-post-process-path", f"{post}.post_process_rewards"),
        )
        manager = RolloutManager(
            rollout_args(*flags, data=data, rm_url=teacher.url + "/generate"), [student.url]
        )
        batch = manager.generate(0)
        manager.close()
        return batch


@pytest.mark.parametrize(
    ("reward", "post"),
    [(UPSTREAM, UPSTREAM), (EXAMPLE, EXAMPLE), (LIBRARY, UPSTREAM), (UPSTREAM, LIBRARY)],
    ids=["upstream", "example", "our reward, upstream's post-processing", "upstream's reward, ours"],
)
def test_every_mix_of_plugins_gives_the_same_log_probs(tmp_path: Path, reward: str, post: str) -> None:
    with serve(fake_engine()) as teacher:
        ours = rollout(tmp_path, teacher, LIBRARY, LIBRARY)
        theirs = rollout(tmp_path, teacher, reward, post)
    assert [sample.tokens for sample in theirs.samples] == [sample.tokens for sample in ours.samples]
    for mine, other in zip(ours.samples, theirs.samples, strict=True):
        assert mine.teacher_log_probs is not None
        assert other.teacher_log_probs is not None
        torch.testing.assert_close(other.teacher_log_probs, mine.teacher_log_probs, rtol=0, atol=0)
        assert (other.reward, other.metadata["train_reward"]) == (0.0, 0.0)


def test_the_token_receipt_holds_for_an_upstream_plugin_too(tmp_path: Path) -> None:
    with serve(fake_engine(fault="shift")) as teacher, pytest.raises(ScoreMismatchError, match="sampled ids"):
        rollout(tmp_path, teacher, UPSTREAM, UPSTREAM)
