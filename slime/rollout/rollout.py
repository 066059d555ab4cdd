"""One rollout: the student answers the prompts, each answer is judged as it ends, the verdicts become
numbers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slime.engines.api import sampling_params
from slime.engines.model_facts import ModelFacts
from slime.metrics.trace import Span
from slime.rollout.clock import Clock
from slime.rollout.failures import Failures
from slime.rollout.generate import GenerateFunction, Sampler, generate_all
from slime.rollout.rewards import Rewards
from slime.utils.types import TRAINED, Sample, SampleStatus

if TYPE_CHECKING:
    from slime.arguments import Args


logger = logging.getLogger(__name__)


class DeadlineError(RuntimeError):
    """No response of a rollout ended before `--rollout-deadline`."""


@dataclass(frozen=True, slots=True)
class RolloutBatch:
    """What a rollout yields."""

    samples: list[Sample]
    """In the order of their groups."""
    metrics: dict[str, float]
    spans: tuple[Span, ...] = ()
    """When its stages were."""

    def image_hashes(self) -> list[str]:
        """Return the content hashes of the pictures that the samples show, each once."""
        inputs = [sample.multimodal_train_inputs or {} for sample in self.samples]
        return sorted({name for shown in inputs for name in shown.get("image_hashes", [])})


def rollout_params(args: Args, banned: Sequence[int]) -> dict[str, Any]:
    """Return the sampling parameters of a rollout."""
    return sampling_params(
        max_new_tokens=args.rollout_max_response_len,
        temperature=args.rollout_temperature,
        top_p=args.rollout_top_p,
        top_k=args.rollout_top_k,
        stop=args.rollout_stop,
        stop_token_ids=args.rollout_stop_token_ids,
        banned_ids=banned,
    )


async def run_rollout(
    args: Args,
    rollout_id: int,
    groups: Sequence[Sequence[Sample]],
    sampler: Sampler,
    rewards: Rewards,
    banned: Sequence[int],
    function: GenerateFunction,
) -> RolloutBatch:
    """Answer and judge the groups' samples.

    Raises:
        EngineError: an engine failed for good, a score is misaligned, or too many are missing; the rollout is
            given up.
        DeadlineError: no response ended in time.
    """
    clock = Clock()
    failures = Failures(args, sum(len(group) for group in groups))

    async def judge(sample: Sample) -> None:
        clock.response_ended()
        clock.score_started()
        await rewards.judge(sample, failures)
        clock.score_ended()

    samples = await generate_all(
        args,
        [sample for group in groups for sample in group],
        rollout_params(args, banned),
        sampler,
        label=f"rollout {rollout_id}",
        seed_label=f"rollout-{rollout_id}",
        after=judge,
        function=function,
        deadline=args.rollout_deadline,
    )
    _report_aborted(args, rollout_id, samples)
    await rewards.finish(samples)
    spans = clock.spans(rollout_id)
    if failures.failed:
        logger.warning("rollout %d: %s. They are masked out of the loss.", rollout_id, failures.summary())
    metrics = rollout_metrics(samples, clock, sampler.facts)
    if args.use_opd and args.opd_type == "sglang":
        metrics |= teacher_metrics(args, samples, failures)
    return RolloutBatch(samples, metrics, spans)


def _report_aborted(args: Args, rollout_id: int, samples: Sequence[Sample]) -> None:
    """Tell how many responses the deadline cut off.

    Raises:
        DeadlineError: nothing is left to train on.
    """
    aborted = sum(sample.status is SampleStatus.ABORTED for sample in samples)
    if args.rollout_deadline is None or not aborted:
        return
    limit = f"--rollout-deadline {args.rollout_deadline:g}"
    if not any(sample.status in TRAINED for sample in samples):
        raise DeadlineError(
            f"rollout {rollout_id}: {limit} cut off {aborted} of {len(samples)} responses, and nothing is "
            "left to train on. Give it more seconds, lower --rollout-max-response-len, or drop it."
        )
    logger.warning(
        "rollout %d: %s cut off %d of %d responses. They are masked out of the loss.",
        *(rollout_id, limit, aborted, len(samples)),
    )


def rollout_metrics(samples: Sequence[Sample], clock: Clock, facts: ModelFacts) -> dict[str, float]:
    """Return what a rollout was like; shares are of 1, times in seconds."""
    ended = [sample for sample in samples if sample.status is not SampleStatus.ABORTED]
    lengths = [sample.response_length for sample in ended]
    trained = [sample for sample in samples if sample.status in TRAINED]
    graded = [sample.metadata["task_reward"] for sample in trained if "task_reward" in sample.metadata]
    raw = [sample.metadata["raw_reward"] for sample in trained]
    return {
        "reward": _mean(graded or raw),
        "raw_reward": _mean(raw),
        "response_length": _mean(lengths),
        "response_length_max": float(max(lengths, default=0)),
        "truncated_share": _mean([sample.status == SampleStatus.TRUNCATED for sample in ended]),
        "rollout/failed_samples": float(len(ended) - len(trained)),
        "rollout/aborted_samples": float(len(samples) - len(ended)),
        "rollout/mixed_version_samples": float(sum(len(sample.weight_versions) > 1 for sample in samples)),
    } | _times(samples, clock, facts)


def teacher_metrics(args: Args, samples: Sequence[Sample], failures: Failures) -> dict[str, float]:
    """Return how the scoring went, over all teachers and for each named one."""
    metrics = {
        "teacher/aligned_frac": _scored_share(samples),
        "teacher/failed_samples": float(failures.failed),
        "teacher/misaligned_samples": float(failures.misaligned),
    }
    for name in args.named_teachers:
        own = [sample for sample in samples if sample.metadata.get(args.opd_teacher_key) == name]
        metrics |= {
            f"teacher/{name}/samples": float(len(own)),
            f"teacher/{name}/aligned_frac": _scored_share(own),
            f"teacher/{name}/reverse_kl": _engine_reverse_kl(own),
        }
    return metrics


def _scored_share(samples: Sequence[Sample]) -> float:
    """Return the share of those samples with a score that went to the teacher."""
    asked = [sample for sample in samples if sample.status is not SampleStatus.ABORTED]
    return _mean([sample.status in TRAINED for sample in asked])


def _engine_reverse_kl(samples: Sequence[Sample]) -> float:
    """Return the mean of log pi_S - log pi_T over the scored tokens, pi_S being the engine's."""
    gaps = [
        student - teacher
        for sample in samples
        if sample.status in TRAINED and sample.teacher_log_probs is not None and sample.rollout_log_probs
        for student, teacher in zip(sample.rollout_log_probs, sample.teacher_log_probs.tolist(), strict=True)
    ]
    return _mean(gaps)


def _times(samples: Sequence[Sample], clock: Clock, facts: ModelFacts) -> dict[str, float]:
    generation, scoring = clock.last_response - clock.start, max(clock.scoring_seconds, 1e-9)
    exposed = clock.exposed_seconds / scoring
    return {
        "perf/generation_seconds": generation,
        "perf/scoring_seconds": scoring,
        "perf/scoring_overlap_share": 1.0 - exposed,
        "perf/scoring_exposed_share": exposed,
        "perf/first_score_before_last_response": float(min(clock.score_starts) < clock.last_response),
        "perf/student_tokens_per_second": sum(sample.response_length for sample in samples) / generation,
        "perf/teacher_tokens_per_second": sum(_seen_tokens(sample, facts) for sample in samples) / scoring,
    }


def _seen_tokens(sample: Sample, facts: ModelFacts) -> int:
    """Return how many tokens a server sees of a sample."""
    grids = (sample.multimodal_train_inputs or {}).get("image_grid_thw") or ()
    return len(sample.tokens) - len(grids) + facts.image_tokens(grids)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
