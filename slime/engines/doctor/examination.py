"""The order of the checks and what each of them needs; every teacher is examined alike, all at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

from slime.engines.doctor import agreement, capacity, connection, sameness, scoring
from slime.engines.doctor.material import Material
from slime.engines.doctor.outcome import Fault, Finding, Outcome
from slime.engines.doctor.state import Options, State, difference
from slime.engines.doctor.teacher import Teacher

Report = Callable[[Outcome], None]


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the report."""

    name: str
    run: Callable[[State], Awaitable[Finding]]
    needs: tuple[str, ...] = ()
    """Checks without whose success this one tells nothing."""


CHECKS = (
    Check("reachable", connection.reachable),
    Check("model", connection.model, ("reachable",)),
    Check("settings", connection.settings, ("model",)),
    Check("vocabulary", agreement.vocabulary, ("model",)),
    Check("chat-template", agreement.chat_template, ("model",)),
    Check("image-processor", agreement.picture_processor, ("model",)),
    Check("text-receipt", scoring.text_receipt, ("vocabulary",)),
    Check("image-receipt", scoring.image_receipt, ("text-receipt",)),
    Check("image-sizes", agreement.picture_sizes, ("image-receipt",)),
    Check("prefix-cache", scoring.prefix_cache, ("image-receipt",)),
    Check("sees", scoring.sees, ("prefix-cache",)),
    Check("start-len", scoring.start_length, ("prefix-cache",)),
    Check("temperature", scoring.temperature, ("prefix-cache",)),
    Check("generation", scoring.generation, ("prefix-cache",)),
    Check("same-model", sameness.same_model, ("generation",)),
    Check("context", capacity.context, ("text-receipt",)),
    Check("latency", capacity.latency, ("prefix-cache",)),
)
NAMES = tuple(check.name for check in CHECKS)
ENDING_FAULTS = frozenset({"paused", "hangs", "refused", "reset", "no-answer", "out-of-time"})
"""After these the server answers nothing any more: further checks would only wait in vain."""


async def examine(
    urls: Sequence[str], material: Material | None, options: Options, report: Report
) -> list[Outcome]:
    """Examine every teacher; call `report` for each outcome, a teacher's in their order.

    Raises:
        ValueError: a URL is no address.
    """
    states = [State(Teacher(url, options.timeout), options, material, material is not None) for url in urls]
    rows = await asyncio.gather(*(_examine(state, report) for state in states))
    outcomes = [outcome for row in rows for outcome in row]
    if len(states) > 1:
        outcomes.append(_alike(states))
        report(outcomes[-1])
    return outcomes


async def _examine(state: State, report: Report) -> list[Outcome]:
    outcomes: list[Outcome] = []
    good: set[str] = set()
    ended = ""
    give_up = time.monotonic() + state.options.deadline
    async with state.teacher:
        for check in CHECKS:
            missing = [f"{name} has a fault or was not run" for name in check.needs if name not in good]
            reason = ended or (missing[0] if missing else "")
            if reason:
                outcome = Outcome(check.name, "skip", f"not run: {reason}")
            elif time.monotonic() > give_up:
                outcome = _too_late(check, state.options.deadline)
            else:
                outcome = await _run(check, state)
                good |= set() if outcome.status == "FAULT" else {check.name}
            outcome = replace(outcome, teacher=state.teacher.name)
            if outcome.fault in ENDING_FAULTS:
                ended = f"{check.name} has ended the examination"
            outcomes.append(outcome)
            report(outcome)
    return outcomes


def _too_late(check: Check, deadline: float) -> Outcome:
    return Outcome(
        check.name,
        "warn",
        f"not run: {deadline:g} s were over before it",
        "out-of-time",
        "give a larger --deadline, or see in the teacher's log why it is slow",
    )


async def _run(check: Check, state: State) -> Outcome:
    try:
        found = await check.run(state)
    except Fault as fault:
        return Outcome(check.name, "FAULT", fault.message, fault.name, fault.remedy)
    status = "skip" if found.skipped else "warn" if found.warning else "pass"
    return Outcome(check.name, status, found.message, found.warning, found.remedy, values=found.values)


def _alike(states: Sequence[State]) -> Outcome:
    """Hold the replicas' scores of the same probe against each other."""
    scored = [(state.teacher.name, state.cold) for state in states if state.cold is not None]
    if len(scored) < 2:
        return Outcome("replicas", "skip", "not run: fewer than two teachers gave scores")
    first_name, first = scored[0]
    tolerance = max(state.tolerance for state in states)
    for name, cold in scored[1:]:
        assert first is not None
        assert cold is not None
        mean, _ = difference(first.log_probs, cold.log_probs)
        if mean > tolerance:
            return Outcome(
                "replicas",
                "FAULT",
                f"{first_name} and {name} score the same tokens {mean:.2g} apart on average",
                "replicas-differ",
                "serve the same checkpoint with the same settings on all of them",
            )
    return Outcome("replicas", "pass", f"{len(scored)} teachers give the same scores")
