"""The student answers: one sample (`generate`), or all samples of a rollout or an evaluation
(`generate_all`).

What was sampled is taken by its ids, never by its text. Nothing here grades or scores.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import sys
from collections.abc import Awaitable, Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from slime.engines.api import GenerateAnswer, generate_payload, parse_generate
from slime.engines.client import EngineClient
from slime.engines.errors import AnswerError, EngineAbortedError, ScoreMismatchError
from slime.engines.model_facts import ModelFacts
from slime.engines.pictures import data_uris
from slime.rollout.concurrency import together
from slime.rollout.waves import Wave, plan_waves
from slime.utils.types import Sample, SampleStatus

GenerateFunction = Callable[[Any, Sample, dict[str, Any]], Awaitable[Sample]]


@dataclass(frozen=True, slots=True)
class Sampler:
    """The servers that answer, and what must be known of their model."""

    client: EngineClient
    facts: ModelFacts
    has_deadline: bool = False
    """Whether responses may be cut off; their requests are then ended at the server too."""


_sampler: ContextVar[Sampler] = ContextVar("sampler")
"""Who answers inside `generate_all`: a custom generate function calls `generate` without being handed the
servers."""


async def generate(args: Any, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
    """Sample a continuation of `sample.tokens`, in the form of `--custom-generate-function-path`.

    A custom function may call it more than once: the response grows by each answer.

    Raises:
        EngineError: the engine cannot be reached, refuses, aborts, or saw another picture than was sent.
    """
    sampler = _sampler.get()
    images = await data_uris((sample.multimodal_inputs or {}).get("images") or ())
    payload = generate_payload(sample.tokens, sampling_params, images)
    raw = await sampler.client.generate(
        payload, group=sample.group_index, abort_when_cancelled=sampler.has_deadline
    )
    try:
        answer = parse_generate(raw, vocab_size=sampler.facts.vocab_size)
        _check_prompt(sample, answer, sampler.facts)
    except (AnswerError, EngineAbortedError, ScoreMismatchError) as error:
        raise type(error)(f"sample {sample.index}, answered by the {sampler.client.role}: {error}") from error
    _append(sample, answer)
    return sample


def _append(sample: Sample, answer: GenerateAnswer) -> None:
    """Let the response grow by what was sampled."""
    sample.tokens = sample.tokens + answer.tokens
    sample.response += answer.text
    sample.response_length += len(answer.tokens)
    sample.rollout_log_probs = (sample.rollout_log_probs or []) + answer.log_probs
    sample.weight_versions = list(dict.fromkeys(sample.weight_versions + answer.weight_versions))
    sample.status = SampleStatus.TRUNCATED if answer.truncated else SampleStatus.COMPLETED


def _check_prompt(sample: Sample, answer: GenerateAnswer, facts: ModelFacts) -> None:
    """Compare the engine's count of prompt tokens with ours: the picture must arrive, at our grid."""
    grids = (sample.multimodal_train_inputs or {}).get("image_grid_thw")
    if grids is None or facts.image_token_id is None:
        return
    expected = len(sample.tokens) - sample.tokens.count(facts.image_token_id) + facts.image_tokens(grids)
    if answer.prompt_tokens != expected:
        raise ScoreMismatchError(
            f"the engine counts {answer.prompt_tokens} prompt tokens and we count {expected}: the picture "
            "did not arrive, or its processor resizes it otherwise than ours."
        )


def sampling_seed(run_seed: int, label: str, sample_index: int) -> int:
    """Return a sample's own seed, 31 bits, which depends on nothing else that happens in a run."""
    digest = hashlib.blake2b(f"{run_seed}/{label}/{sample_index}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1


async def generate_all(
    args: Any,
    samples: Sequence[Sample],
    sampling_params: dict[str, Any],
    sampler: Sampler,
    *,
    label: str,
    seed_label: str,
    after: Callable[[Sample], Awaitable[None]],
    function: GenerateFunction = generate,
    deadline: float | None = None,
) -> list[Sample]:
    """Answer all samples at once, the client bounding how many are in flight; call `after` as each ends.

    Args:
        args: handed to `function`.
        samples: their groups go to one server each.
        sampling_params: SGLang's; each sample's own seed is added.
        sampler: who answers.
        label: of the progress bar.
        seed_label: what the seeds depend on besides run seed and sample index.
        after: scores or grades one answered sample.
        function: generates one sample.
        deadline: seconds from now on after which unfinished responses are aborted; None: there is none.

    Returns:
        What `function` returned, in the order of `samples`; an aborted sample has no response.
    """
    end = None if deadline is None else asyncio.get_running_loop().time() + deadline
    token = _sampler.set(dataclasses.replace(sampler, has_deadline=deadline is not None))
    waves = plan_waves(args, samples, sampler.client, seed_label) if args.deterministic_rollout else {}

    async def one(sample: Sample, bar: tqdm[Any]) -> Sample:
        seed = sampling_seed(args.rollout_seed, seed_label, sample.index or 0)
        params = {**sampling_params, "sampling_seed": seed}
        wave: Wave | None = waves.get(id(sample))
        if wave is None:
            answered = await _before(end, function, args, sample, params)
        else:
            async with wave.member():
                custom = wave.custom_params(sample) if function is generate else {}
                answered = await function(args, sample, params | custom)
        if not isinstance(answered, Sample):
            raise TypeError(
                f"--custom-generate-function-path returned {type(answered).__name__}; it must return a "
                "Sample."
            )
        bar.update()
        await after(answered)
        return answered

    try:
        with _progress(label, len(samples)) as bar:
            return await together([one(sample, bar) for sample in samples])
    finally:
        _sampler.reset(token)


async def _before(
    end: float | None, function: GenerateFunction, args: Any, sample: Sample, params: dict[str, Any]
) -> Sample:
    """Return what `function` makes of a sample before the loop's time is `end`, else the sample as it was,
    aborted.

    A function that is cut off may leave a half-written sample behind, so an untouched copy takes its place.
    """
    if end is None:
        return await function(args, sample, params)
    untouched = dataclasses.replace(
        sample, tokens=list(sample.tokens), metadata=dict(sample.metadata), status=SampleStatus.ABORTED
    )
    limit = asyncio.timeout_at(end)
    try:
        async with limit:
            return await function(args, sample, params)
    except TimeoutError:
        if not limit.expired():
            raise
        return untouched


def _progress(label: str, total: int) -> tqdm[Any]:
    """Return a bar for a terminal; in a log file a line now and then is enough."""
    seconds = 0.2 if sys.stderr.isatty() else 10.0
    return tqdm(total=total, desc=label, unit="sample", mininterval=seconds, dynamic_ncols=True, leave=False)
