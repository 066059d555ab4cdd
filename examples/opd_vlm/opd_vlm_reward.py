"""Distil a vision-language teacher; optionally add the task's own reward. Copy this file and edit it.

`--custom-rm-path examples.opd_vlm.opd_vlm_reward.reward_func` is called once per response, as soon as it
ends; `--custom-reward-post-process-path examples.opd_vlm.opd_vlm_reward.post_process_rewards` once per
rollout.
"""

from __future__ import annotations

from typing import Any

from slime.rollout.on_policy_distillation import TeacherArgs, attach_scores, score_response
from slime.utils.types import Sample

# Hybrid, line 1 of 2: above 0 the task's reward is trained on beside the teacher, with this weight. Edit it
# here, or leave it 0 and pass --task-reward-weight, which needs no edit; a run refuses both at once.
# A weight here needs --disable-grpo-std-normalization (the launcher passes it): division would undo it.
TASK_REWARD_WEIGHT = 0.0


def task_reward(sample: Sample) -> float:
    """Grade one response. Hybrid, line 2 of 2: your own rule goes here; this one reads the last \\boxed{}."""
    # imported here, so that pure distillation needs no grader
    from slime.rollout.rm_hub.math_rm import compute_math_reward

    return compute_math_reward(sample)


async def reward_func(args: TeacherArgs, sample: Sample, **kwargs: Any) -> dict[str, Any]:
    """Send the sampled ids and the pictures to the teacher at `--rm-url`; R log-probs come back."""
    return await score_response(args, sample)


def post_process_rewards(
    args: TeacherArgs, samples: list[Sample], **kwargs: Any
) -> tuple[list[float], list[float]]:
    """Attach the teacher's scores to each sample; return (raw rewards, rewards to train on).

    The reverse KL to the teacher is no reward: the trainer subtracts it, token by token, from the advantages
    that it makes of these rewards. With zero rewards that leaves pure distillation.
    """
    for sample in samples:
        attach_scores(args, sample)
    if TASK_REWARD_WEIGHT == 0.0:
        zeros = [0.0] * len(samples)
        return zeros, zeros
    raw_rewards = [task_reward(sample) for sample in samples]
    return raw_rewards, [TASK_REWARD_WEIGHT * reward for reward in raw_rewards]
