"""Are scores those of the sampled tokens, at the right places, with the picture seen, at temperature 1?"""

from __future__ import annotations

import asyncio
import time

from slime.engines.api import generate_payload, parse_generate, sampling_params
from slime.engines.doctor.outcome import Fault, Finding
from slime.engines.doctor.receipt import Probe
from slime.engines.doctor.state import State, difference
from slime.engines.errors import EngineError

SAMPLED_RESPONSES = 4
SAMPLED_TOKENS = 24
LEAST_MOVE = 1e-3
SEES_REMEDY = "serve the checkpoint with its vision tower (see the log for missing vision weights)"


async def text_receipt(state: State) -> Finding:
    """The ids of a text come back verbatim, one entry each."""
    probe = state.probe([])
    scores = await state.score(probe)
    return Finding(
        f"{len(probe.response)} ids came back verbatim, {scores.entries} entries, "
        f"{probe.length} tokens as we count"
    )


async def image_receipt(state: State) -> Finding:
    """So do those behind a picture, whose tokens are counted as we count them."""
    if not state.pictures:
        return Finding(state.why_no_pictures, skipped=True)
    picture = state.own.picture()
    probe = state.probe([picture])
    started = time.perf_counter()
    try:
        state.cold = await state.score(probe)
    except Fault as fault:
        if fault.name == "http-500":
            raise Fault(
                "picture-refused",
                f"text is scored and a picture is not: {fault.message}",
                "the server must take one <|image_pad|> a picture and PNG data URIs; look for a proxy that "
                "expands pads itself, and for an SGLang older than 0.5.4",
            ) from fault
        raise
    state.seconds["cold"] = time.perf_counter() - started
    state.picture = picture
    return Finding(
        f"{len(probe.response)} ids came back verbatim, {picture.tokens} image tokens as we count, "
        f"{scores_text(state.cold.entries, probe.length)}"
    )


def scores_text(entries: int, length: int) -> str:
    """Return the counts of an answer as a phrase."""
    return f"{entries} entries of {length} tokens"


async def prefix_cache(state: State) -> Finding:
    """A second response to the same prompt finds prompt and picture in the cache; the scores stay."""
    probe = state.base()
    if state.cold is None:
        started = time.perf_counter()
        state.cold = await state.score(probe)
        state.seconds["cold"] = time.perf_counter() - started
    other = await state.score(state.base(tuple(reversed(probe.response))))
    started = time.perf_counter()
    again = await state.score(probe)
    state.seconds["warm"] = time.perf_counter() - started
    state.noise = difference(state.cold.log_probs, again.log_probs)
    if state.noise[0] > 0.3:
        raise Fault(
            "unsteady",
            f"the same request gave log-probs that differ by {state.noise[0]:.2g} on average",
            "a teacher's weights must not change, and no cache may be stale: restart it",
        )
    page = state.server_info.get("page_size")
    page = page if isinstance(page, int) and page > 0 else 1
    reusable = (probe.prompt_length - 1) // page * page
    seen = f"{other.cached_tokens} of {reusable} reusable tokens were cached"
    values = {"cached_tokens": other.cached_tokens, "prompt_tokens": probe.prompt_length}
    if other.cached_tokens >= reusable:
        included = ", the picture's among them" if state.picture else ""
        return Finding(
            f"{seen}{included}; repeated scores differ by {state.noise[1]:.1g} at most", values=values
        )
    remedy = "start SGLang without --disable-radix-cache"
    if state.server_info.get("engine") == "transformers":
        remedy = "the transformers engine keeps none between requests; an SGLang server does"
    return Finding(
        f"{seen}: every sample of a group pays for the prompt again",
        warning="no-prefix-cache" if not other.cached_tokens else "prefix-cache-partial",
        remedy=remedy,
        values=values,
    )


async def sees(state: State) -> Finding:
    """A blank picture in its place moves the log-probs."""
    if state.picture is None or state.cold is None:
        return Finding(state.why_no_pictures, skipped=True)
    blank = await state.score(state.probe([state.own.blank(state.picture)]))
    mean, largest = difference(state.cold.log_probs, blank.log_probs)
    seen = f"a blank picture moves log-probs by {largest:.3g} at most, {mean:.3g} on average"
    if largest <= max(LEAST_MOVE, 1.5 * state.noise[1]):
        raise Fault("blind", f"{seen}; noise is {state.noise[1]:.1g}: the teacher does not see", SEES_REMEDY)
    return Finding(seen, values={"largest": largest, "mean": mean})


async def start_length(state: State) -> Finding:
    """Scores from the prompt's end are those from the sequence's beginning."""
    probe = state.base()
    whole = await state.score(probe, start=0)
    part = state.cold or await state.score(probe)
    mean, largest = difference(whole.log_probs, part.log_probs)
    seen = f"scores from position 0 and from {probe.prompt_length - 1} differ by {mean:.2g} on average"
    if mean > state.tolerance:
        raise Fault(
            "off-by-one",
            f"{seen}, {largest:.2g} at most: logprob_start_len moves the scores",
            "use SGLang 0.5.4 or newer; look for a proxy that changes logprob_start_len",
        )
    return Finding(f"{seen}; {whole.entries} and {part.entries} entries, the first null")


async def temperature(state: State) -> Finding:
    """The request's temperature does not touch scores."""
    probe = state.base()
    part = state.cold or await state.score(probe)
    cool = await state.score(probe, temperature=0.5)
    mean, largest = difference(part.log_probs, cool.log_probs)
    seen = f"scores with temperature 0.5 differ by {mean:.2g} on average"
    if mean > state.tolerance:
        raise Fault(
            "temperature-applied",
            f"{seen}, {largest:.2g} at most: the server divides logits by the temperature",
            "use a server whose input log-probs are at temperature 1, as SGLang's are",
        )
    return Finding(seen)


async def generation(state: State) -> Finding:
    """Scores of what the teacher samples are the log-probs that it sampled with: nothing is shifted."""
    sampled = await asyncio.gather(*(_sample(state) for _ in range(SAMPLED_RESPONSES)))
    used = [(probe, log_probs) for probe, log_probs in sampled if probe.response]
    if not used:
        return Finding("the teacher sampled nothing to compare", warning="no-samples", remedy="see its log")
    scores = await asyncio.gather(*(state.score(probe) for probe, _ in used))
    state.samples = [(probe, score.log_probs) for (probe, _), score in zip(used, scores, strict=True)]
    ours = [value for _, log_probs in used for value in log_probs]
    theirs = [value for score in scores for value in score.log_probs]
    mean, largest = difference(ours, theirs)
    seen = f"{len(ours)} sampled tokens: scores and sampling log-probs differ by {mean:.2g} on average"
    if mean > max(state.tolerance, 0.1):
        raise Fault(
            "scores-wrong",
            f"{seen}, {largest:.2g} at most: scores are shifted, stale or of other weights",
            "restart the teacher; look for a proxy that changes scores and for --preferred-sampling-params",
        )
    return Finding(seen, values={"mean": mean, "largest": largest})


async def _sample(state: State) -> tuple[Probe, list[float]]:
    """Return a probe whose response the teacher sampled at temperature 1, and their log-probs then."""
    base = state.base(())
    params = sampling_params(max_new_tokens=SAMPLED_TOKENS, temperature=1.0)
    answer = await state.teacher.ask(generate_payload(base.prompt, params, base.images))
    try:
        read = parse_generate(answer, vocab_size=state.vocab_size)
    except EngineError as error:
        raise Fault("unreadable-answer", str(error), "see the teacher's log") from error
    decoder = state.own.tokenizer.added_tokens_decoder
    special = {id_ for id_, token in decoder.items() if token.special}  # <think> is an added token, too
    end = state.own.tokenizer.eos_token_id
    # A sampled pad would be taken for a picture, so the response ends before the first special token.
    cut = next((i for i, id_ in enumerate(read.tokens) if id_ in special and id_ != end), len(read.tokens))
    return state.base(tuple(read.tokens[:cut])), read.log_probs[:cut]
