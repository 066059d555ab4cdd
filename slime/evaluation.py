"""Accuracy on held-out sets, by the task's own rule, under one version of the weights.

Never through the reward plugin: a teacher's log-probs are no grade. The student's engines or, once, the
teacher's server answer; who it is, the caller says by the `Sampler`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from slime.engines.api import sampling_params
from slime.engines.errors import EngineError
from slime.rollout.generate import GenerateFunction, Sampler, generate_all
from slime.rollout.rm_hub import rule_named
from slime.utils.types import Sample, SampleStatus

if TYPE_CHECKING:
    from slime.arguments import Args


async def evaluate(
    args: Args,
    sets: Mapping[str, list[Sample]],
    sampler: Sampler,
    banned: Sequence[int],
    function: GenerateFunction,
) -> dict[str, float]:
    """Answer and grade every sample of every set.

    Returns:
        `eval/accuracy` over all samples; per set `eval/NAME/accuracy`, `response_length`, `truncated_share`,
        `samples`; `eval/weight_version` where the version is a number; `perf/eval_seconds`.

    Raises:
        EngineError: a server failed, or the weights changed in the middle.
    """
    rule = rule_named(args.eval_rm_type)
    start = time.perf_counter()
    grades: list[float] = []
    versions: set[str] = set()
    metrics: dict[str, float] = {}

    async def grade(sample: Sample) -> None:
        sample.metadata["task_reward"] = float(await rule(args, sample))

    for name, samples in sets.items():
        answered = await generate_all(
            args,
            samples,
            eval_params(args, banned),
            sampler,
            label=f"eval {name}",
            seed_label=f"eval-{name}",
            after=grade,
            function=function,
        )
        own = [sample.metadata["task_reward"] for sample in answered]
        grades += own
        versions.update(version for sample in answered for version in sample.weight_versions)
        metrics[f"eval/{name}/accuracy"] = sum(own) / len(own)
        metrics |= _lengths(name, answered)
    metrics["eval/accuracy"] = sum(grades) / len(grades)
    version = _one_version(versions)
    if version.isdecimal():
        metrics["eval/weight_version"] = float(version)
    metrics["perf/eval_seconds"] = time.perf_counter() - start
    return metrics


def eval_params(args: Args, banned: Sequence[int]) -> dict[str, Any]:
    """Return the sampling parameters of an evaluation: greedy at `--eval-temperature` 0."""
    return sampling_params(
        max_new_tokens=args.eval_max_response_len,
        temperature=args.eval_temperature,
        stop=args.rollout_stop,
        stop_token_ids=args.rollout_stop_token_ids,
        banned_ids=banned,
    )


def _lengths(name: str, samples: Sequence[Sample]) -> dict[str, float]:
    count = len(samples)
    truncated = sum(sample.status == SampleStatus.TRUNCATED for sample in samples)
    return {
        f"eval/{name}/response_length": sum(sample.response_length for sample in samples) / count,
        f"eval/{name}/truncated_share": truncated / count,
        f"eval/{name}/samples": float(count),
    }


def _one_version(versions: set[str]) -> str:
    """Return the version that answered the whole pass."""
    if len(versions) != 1:
        raise EngineError(
            "the evaluation was answered by weights of the versions "
            f"{', '.join(sorted(versions)) or 'none'}; an accuracy belongs to one. Weights must not be "
            "updated while it runs."
        )
    return versions.pop()
