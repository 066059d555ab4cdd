"""A reward plugin of a user's making that leaves a teacher's score in some rollouts which no float32 gradient
survives. It is finite, so nothing refuses it before the training."""

from __future__ import annotations

from typing import Any

from slime.rollout.on_policy_distillation import TeacherArgs, attach_scores
from slime.utils.types import Sample

PLANTED = (1, 3, 4)
"""Rollouts."""
SCORE = -3e38
_seen: list[int] = []
"""Numbers of samples of the rollouts so far."""


def post_process_rewards(
    args: TeacherArgs, samples: list[Sample], **kwargs: Any
) -> tuple[list[float], list[float]]:
    """Attach the teacher's scores, and spoil one token's in the rollouts of `PLANTED`."""
    for sample in samples:
        attach_scores(args, sample)
    if len(_seen) in PLANTED:
        scores = samples[0].teacher_log_probs
        assert scores is not None
        scores[0] = SCORE
    _seen.append(len(samples))
    zeros = [0.0] * len(samples)
    return zeros, zeros
