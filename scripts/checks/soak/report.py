"""What a soak found, as a table, and whether it is as it should be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from scripts.checks.soak.watch import Growth

MOST_GROWTH_MEGABYTES = 100.0
"""For 100 rollouts more. Allocators keep what they once had; a leak goes on."""
MOST_NEW_FILES = 5.0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A soak that has ended."""

    minutes: float
    starts: int
    faults: Sequence[str]
    planned_samples: int
    trained_samples: int
    rollout_ids: Sequence[int]
    """Of all recorded rollouts, in the order in which they are recorded."""
    planned_rollouts: int
    growth: Sequence[tuple[str, Growth]]
    left: Sequence[str]
    """Processes, ports, files and shared memory that outlive it."""
    accuracy: tuple[float, float] | None
    """Before and after."""

    def problems(self) -> Iterator[str]:
        """Yield what is not as it should be."""
        if self.trained_samples != self.planned_samples:
            yield f"{self.trained_samples} samples were trained on, and {self.planned_samples} were planned"
        if list(self.rollout_ids) != list(range(self.planned_rollouts)):
            yield "metrics.jsonl does not hold every rollout once, in order"
        for thing in self.left:
            yield f"left behind: {thing}"
        for role, grown in self.growth:
            if per_hundred(grown) > MOST_GROWTH_MEGABYTES:
                yield f"{role} grew by {per_hundred(grown):.0f} MB in 100 rollouts"
            if grown.last_files - grown.first_files > MOST_NEW_FILES:
                yield f"{role} opened {grown.last_files - grown.first_files:.0f} files and kept them"


def per_hundred(grown: Growth) -> float:
    """Return by how many megabytes a process grows in 100 rollouts."""
    return (grown.last_megabytes - grown.first_megabytes) / grown.rollouts * 100


def report(outcome: Outcome) -> str:
    """Return the outcome as Markdown."""
    counted = Counter(outcome.faults)
    lines = [
        f"{len(outcome.rollout_ids)} rollouts, {len(outcome.faults)} faults, {outcome.starts} starts of the "
        f"launcher, {outcome.minutes:.1f} minutes; {outcome.trained_samples} of {outcome.planned_samples} "
        "samples trained on.",
    ]
    if outcome.accuracy is not None:
        before, after = outcome.accuracy
        lines.append(f"Accuracy {before:.3f} before, {after:.3f} after.")
    if counted:
        lines += ["", "| fault | times |", "|---|--:|", *(f"| {name} | {n} |" for name, n in counted.items())]
    lines += [
        "",
        "| longest life of | rollouts | RSS warmed up | at its end | open files warmed up | at its end |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for role, grown in outcome.growth:
        lines.append(
            f"| {role} | {grown.rollouts} | {grown.first_megabytes:.0f} MB | {grown.last_megabytes:.0f} MB "
            f"| {grown.first_files:.0f} | {grown.last_files:.0f} |"
        )
    problems = list(outcome.problems())
    lines += ["", *([f"**{problem}**" for problem in problems] or ["Nothing is lost, nothing is left."])]
    return "\n".join(lines)
