"""Are the longest samples taken whole, and how long does scoring take?"""

from __future__ import annotations

import asyncio
import time

from slime.engines.doctor.outcome import Fault, Finding
from slime.engines.doctor.receipt import Probe
from slime.engines.doctor.state import State

RESERVED_TOKENS = 7
"""What SGLang keeps of its context: a request may have 7 tokens less."""
LONGEST_PROBE = 32_768
AT_ONCE = 8
TAIL = 4


async def context(state: State) -> Finding:
    """The longest sample fits, and one that does not is refused, not cut."""
    stated = state.context
    capacity = state.server_info.get("max_total_num_tokens")
    needed = state.options.max_tokens
    if needed is not None and stated is not None and needed > stated - RESERVED_TOKENS:
        raise Fault(
            "context-short",
            f"the run's samples have up to {needed} tokens and the teacher takes {stated - RESERVED_TOKENS}",
            f"start it with --context-length {needed + RESERVED_TOKENS} or more, or shorten "
            "--rollout-max-response-len",
        )
    if needed is not None and isinstance(capacity, int) and needed > capacity - RESERVED_TOKENS:
        raise Fault(
            "context-short",
            f"the run's samples have up to {needed} tokens and the teacher's KV cache holds {capacity}",
            "raise --mem-fraction-static or --tp-size",
        )
    seen = f"the server states {stated if stated is not None else 'no'} tokens"
    if needed is not None:
        probe = _long_probe(state, min(needed, LONGEST_PROBE))
        await state.score(probe)
        seen += f"; {probe.length} were scored whole ({needed} needed)"
    if stated is not None and stated <= LONGEST_PROBE and "allow_auto_truncate" not in state.server_info:
        await _refuses(state, _long_probe(state, stated + 16))
        seen += f"; {stated + 16} are refused"
    if stated is None and needed is None:
        return Finding(seen, warning="context-unknown", remedy="give --max-tokens, so that it can be tried")
    return Finding(seen, values={"context_length": stated, "needed": needed})


def _long_probe(state: State, length: int) -> Probe:
    """Return a text probe of `length` tokens, of which a few at the end are scored."""
    prompt = state.own.prompt_ids(0)
    filler = state.own.response(state.known_ids)
    missing = max(length - TAIL - len(prompt), 0)
    filled = (*(filler * (missing // len(filler) + 1))[:missing], *prompt)
    return Probe(prompt=filled, response=filler[:TAIL], vocab_size=state.vocab_size)


async def _refuses(state: State, probe: Probe) -> None:
    """Send what is too long: an error status is right, scores of a part are not."""
    try:
        await state.score(probe)
    except Fault as fault:
        if not fault.name.startswith("http-"):
            raise


async def latency(state: State) -> Finding:
    """Round trips, alone and several at once, and what they mean for a rollout."""
    probe = state.base()
    started = time.perf_counter()
    turned = [(*probe.response[i:], *probe.response[:i]) for i in range(AT_ONCE)]
    await asyncio.gather(*(state.score(state.base(response)) for response in turned))
    rate = AT_ONCE / (time.perf_counter() - started)
    cold, warm = state.seconds["cold"], state.seconds["warm"]
    rollout = state.options.samples / rate
    return Finding(
        f"first {cold * 1000:.0f} ms, then {warm * 1000:.0f} ms; {AT_ONCE} at once: {rate:.1f} samples/s of "
        f"{probe.length} tokens; a rollout of {state.options.samples} in about {rollout:.1f} s at that",
        values={"cold_seconds": cold, "warm_seconds": warm, "samples_per_second": rate},
    )
