"""Who judges a response: the task's rule, the reward plugin, and what of their verdicts is trained on.

`judge` runs as each response ends, beside the generation of the others; `finish` once per rollout. Afterwards
a sample holds numbers alone: `teacher_log_probs`, and in its metadata `task_reward` (the rule's grade),
`raw_reward` and `train_reward` (the plugin's). Which of them advantages are made of (`trains_on_grades`), and
the stream's weight on them, is the trainer's business.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

import aiohttp
import torch

from slime.engines.api import finish_type
from slime.engines.errors import AnswerError, EngineAbortedError, ScoreMismatchError
from slime.engines.model_facts import ModelFacts
from slime.engines.scores import check_receipt
from slime.rollout import on_policy_distillation
from slime.rollout.concurrency import together
from slime.rollout.failures import SCORING_ERRORS, Failures
from slime.rollout.rm_hub import Rule, rule_named
from slime.utils.misc import load_function
from slime.utils.types import TRAINED, Sample

if TYPE_CHECKING:
    from slime.arguments import Args

RewardFunction = Callable[..., Awaitable[Any]]
PostProcess = Callable[..., tuple[Sequence[float], Sequence[float]]]


KEY_STATUSES = (401, 403)


class TeacherKeyError(RuntimeError):
    """The teacher asks for a key that the plugin does not send; asking again would not help."""


class Rewards:
    """The judges of a run, chosen once from the flags."""

    def __init__(self, args: Args, facts: ModelFacts) -> None:
        self._args = args
        self._facts = facts
        self._places = asyncio.Semaphore(args.teacher_concurrency * max(1, len(args.teacher_urls)))
        self._needs_teacher = args.use_opd and args.opd_type == "sglang"
        self._rule: Rule = rule_named(args.rm_type or args.eval_rm_type)
        self._reward = self._reward_function()
        self._post_process = self._post_process_function()

    def _reward_function(self) -> RewardFunction | None:
        """Return the plugin; without one the teacher scores, and without a teacher the rule judges."""
        if self._args.custom_rm_path is not None:
            return load_function(self._args.custom_rm_path, "--custom-rm-path")
        return on_policy_distillation.reward_func if self._needs_teacher else None

    def _post_process_function(self) -> PostProcess:
        if self._args.custom_reward_post_process_path is not None:
            return load_function(
                self._args.custom_reward_post_process_path, "--custom-reward-post-process-path"
            )
        if self._needs_teacher:
            return on_policy_distillation.post_process_rewards
        # A teacher in the trainer: as with a served one, grades are trained on by --task-reward-weight alone.
        return ungraded_rewards if self._args.use_opd and self._reward is None else plain_rewards

    async def judge(self, sample: Sample, failures: Failures) -> None:
        """Grade the response by the task's rule and hand it to the plugin; one that failed is left alone.

        Raises:
            EngineError: a score is misaligned, or too many are missing (see `Failures.record`).
            TeacherKeyError: the plugin's request was refused for its key.
        """
        if sample.status not in TRAINED:
            return
        await together([self._grade(sample), self._ask_plugin(sample, failures)])
        if self._reward is None:
            sample.reward = sample.metadata.get("task_reward", 0.0)

    async def _grade(self, sample: Sample) -> None:
        if sample.label is not None or self._args.rm_type is not None:
            grade = float(await self._rule(self._args, sample))
            if not math.isfinite(grade):
                raise ValueError(
                    f"the rule {self._args.rm_type or self._args.eval_rm_type} gave sample {sample.index} "
                    f"the grade {grade}; a finite number is needed."
                )
            sample.metadata["task_reward"] = grade

    async def _ask_plugin(self, sample: Sample, failures: Failures) -> None:
        if self._reward is None:
            return
        try:
            async with self._places:
                sample.reward = await self._reward(self._args, sample)
            self._check_receipt(sample)
        except SCORING_ERRORS as error:
            if isinstance(error, aiohttp.ClientResponseError) and error.status in KEY_STATUSES:
                raise self._no_key() from error
            failures.record(sample, error)

    def _no_key(self) -> TeacherKeyError:
        name = self._args.custom_rm_path or "the reward function"
        return TeacherKeyError(
            f"the teacher asks for a key, and {name} sent none that it takes: plugins of upstream's form "
            "post without a header. Let the plugin call slime.rollout.on_policy_distillation.reward_func (or "
            "score_response, as examples/opd_vlm/opd_vlm_reward.py does), which sends SLIME_ENGINE_API_KEY, "
            "or serve the teacher on 127.0.0.1, where /generate needs no key."
        )

    async def finish(self, samples: list[Sample]) -> None:
        """Let the plugin post-process the rollout, check what it left, and reduce rewards to numbers.

        Raises:
            ValueError: the plugin left something else than its signature promises, or task reward comes
                twice.
            ScoreMismatchError: teacher log-probs do not cover exactly the response.
        """
        judged = [sample for sample in samples if sample.status in TRAINED]
        # a plugin may grade, and wait for the grader
        raw, rewards = await asyncio.to_thread(self._post_process, self._args, judged)
        raw, rewards = self._numbers("raw rewards", raw, judged), self._numbers("rewards", rewards, judged)
        self._refuse_task_reward_twice(rewards)
        for sample, raw_reward, reward in zip(judged, raw, rewards, strict=True):
            if self._needs_teacher:
                sample.teacher_log_probs = self._log_probs(sample)
            graded = self._args.trains_on_grades
            sample.reward = sample.metadata.get("task_reward", 0.0) if graded else reward
            sample.metadata["raw_reward"] = raw_reward
            sample.metadata["train_reward"] = 0.0 if graded else reward
        for sample in samples:
            if sample.status not in TRAINED:
                mask_out(sample, with_teacher=self._needs_teacher)

    def _refuse_task_reward_twice(self, rewards: Sequence[float]) -> None:
        weight = self._args.task_reward_weight
        own = next((reward for reward in rewards if reward != 0), None)
        if weight > 0 and own is not None:
            name = self._args.custom_reward_post_process_path or "the reward function"
            raise ValueError(
                f"--task-reward-weight is {weight:g} and {name} returns rewards of its own (such as "
                f"{own:g}): the task would be rewarded twice. Drop --task-reward-weight, or let the plugin "
                "return zeros (TASK_REWARD_WEIGHT = 0)."
            )

    def _numbers(self, what: str, values: Any, samples: Sequence[Sample]) -> list[float]:
        """Return a plugin's list as floats, one a sample."""
        numbers = [float(value) for value in values]
        if len(numbers) != len(samples):
            raise ValueError(
                f"post-processing returned {len(numbers)} {what} for {len(samples)} samples; one each is "
                "needed."
            )
        if not all(math.isfinite(number) for number in numbers):
            raise ValueError(f"post-processing returned {what} that are not finite numbers.")
        return numbers

    def _check_receipt(self, sample: Sample) -> None:
        """Hold a plugin's answer to the token receipt, where it has the server's form.

        Raises:
            EngineAbortedError: the server cut the request off.
            AnswerError: a log-prob is missing or no log-prob.
            ScoreMismatchError: the teacher scored other ids than were sampled.
            TeacherKeyError: the answer is that a key is missing.
        """
        if isinstance(sample.reward, dict) and sample.reward.get("error") == "Unauthorized":
            raise self._no_key()
        triples = _scored_triples(sample.reward)
        if triples is None or sample.response_length == 0:
            return
        meta = sample.reward["meta_info"] if isinstance(sample.reward, dict) else {}
        try:
            if "finish_reason" in meta:
                finish_type(meta)
            check_receipt(triples[-sample.response_length :], sample.response_tokens, self._facts.vocab_size)
        except (EngineAbortedError, AnswerError, ScoreMismatchError) as error:
            raise type(error)(f"sample {sample.index}: {error}") from error

    def _log_probs(self, sample: Sample) -> torch.Tensor:
        """Return the sample's teacher log-probs, float32 [R], in memory of their own."""
        values = sample.teacher_log_probs
        if not isinstance(values, torch.Tensor):
            name = self._args.custom_reward_post_process_path
            raise ValueError(
                f"--use-opd is set and {name} left sample.teacher_log_probs {values!r:.100}; it must write a "
                "float32 tensor [response_length]. See "
                "slime.rollout.on_policy_distillation.post_process_rewards."
            )
        if tuple(values.shape) != (sample.response_length,) or not bool(torch.isfinite(values).all()):
            raise ScoreMismatchError(
                f"sample {sample.index} has {sample.response_length} response tokens and teacher log-probs "
                f"of shape {tuple(values.shape)}, {int(torch.isfinite(values).sum())} of them finite; one "
                "finite number a token is needed."
            )
        return values.detach().to("cpu", torch.float32).clone()


def plain_rewards(args: Any, samples: list[Sample], **kwargs: Any) -> tuple[list[float], list[float]]:
    """Return each sample's own reward, twice: what post-processing does where no plugin and no teacher is."""
    rewards = [sample.get_reward_value(args) for sample in samples]
    for sample, reward in zip(samples, rewards, strict=True):
        if not isinstance(reward, (int, float)):
            raise ValueError(
                f"the reward of sample {sample.index} is {reward!r:.200}; a number is needed. Name the "
                "entry by --reward-key, or make numbers of it by --custom-reward-post-process-path."
            )
    return rewards, rewards


def ungraded_rewards(args: Any, samples: list[Sample], **kwargs: Any) -> tuple[list[float], list[float]]:
    """Return each sample's own reward, and none to train on: what pure distillation needs."""
    return plain_rewards(args, samples)[0], [0.0] * len(samples)


def mask_out(sample: Sample, *, with_teacher: bool) -> None:
    """Keep a sample that failed or was cut off in its place in the batch, with nothing of it trained on."""
    length = sample.response_length
    sample.loss_mask = [0] * length
    sample.reward = 0.0
    for name in ("raw_reward", "train_reward"):
        sample.metadata[name] = 0.0
    sample.rollout_log_probs = sample.rollout_log_probs or [0.0] * length
    if with_teacher:
        sample.teacher_log_probs = torch.zeros(length, dtype=torch.float32)


def _scored_triples(reward: Any) -> list[Any] | None:
    """Return the triples of an answer in the server's form; None for any other reward."""
    meta = reward.get("meta_info") if isinstance(reward, dict) else None
    triples = meta.get("input_token_logprobs") if isinstance(meta, dict) else None
    return (
        triples if isinstance(triples, list) and all(isinstance(t, list | tuple) for t in triples) else None
    )
