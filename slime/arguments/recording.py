"""Rollouts written to files, and trained from without engine or teacher."""

from __future__ import annotations

import os
import string
from collections.abc import Iterator
from dataclasses import dataclass

from slime.arguments.flags import flag

PLACEHOLDER = "{rollout_id}"
RECORDING_SUFFIX = ".parquet"
RECORDING_NAME = "rollout-{rollout_id:06d}" + RECORDING_SUFFIX
"""A recorded rollout's name in a folder of them."""


@dataclass(frozen=True, kw_only=True)
class RecordingArgs:
    """Record and replay"""

    save_debug_rollout_data: str | None = flag(
        None,
        help=(
            "Write every rollout with its scores to a parquet file: a folder, or a path with {rollout_id} in "
            "it."
        ),
        # the actors that write and read may run in another folder
        parse=os.path.abspath,
    )
    load_debug_rollout_data: str | None = flag(
        None,
        help=(
            "Train from rollouts that --save-debug-rollout-data wrote, without engine, teacher and prompts: "
            "a folder, a path with {rollout_id} in it, or one file, which then is every rollout."
        ),
        parse=os.path.abspath,
    )

    @property
    def replays(self) -> bool:
        """Whether rollouts are read from files; nothing is sampled and nothing scored then."""
        return self.load_debug_rollout_data is not None

    def validate(self) -> Iterator[str]:
        """Yield what is wrong inside this group."""
        for name, place in (
            ("--save-debug-rollout-data", self.save_debug_rollout_data),
            ("--load-debug-rollout-data", self.load_debug_rollout_data),
        ):
            problem = None if place is None else _template_problem(place)
            if problem is not None:
                yield (
                    f"{name} {place!r}: {problem}. Name a folder, or write {PLACEHOLDER} where the number of "
                    "the rollout goes."
                )
        place = self.save_debug_rollout_data
        if place is not None and self.load_debug_rollout_data is not None:
            yield (
                f"--save-debug-rollout-data {place} would write again what --load-debug-rollout-data "
                f"{self.load_debug_rollout_data} reads. Drop one of them."
            )
        if place is not None and _template_problem(place) is None and is_one_file(place):
            yield (
                f"--save-debug-rollout-data {place} is one file, which every rollout would overwrite. Name a "
                f"folder, or write {PLACEHOLDER} where the number of the rollout goes."
            )


def recording_template(place: str) -> str:
    """Return a flag's value as the template of a file's path, to be formatted with `rollout_id`."""
    if _fields(place) or place.endswith(RECORDING_SUFFIX):
        return place
    return os.path.join(place, RECORDING_NAME)


def is_one_file(place: str) -> bool:
    """Tell whether a flag's value names the same file for every rollout."""
    return place.endswith(RECORDING_SUFFIX) and not _fields(place)


def _fields(place: str) -> list[str]:
    """Return the names between braces.

    Raises:
        ValueError: a brace stands alone.
    """
    return [name for _, name, _, _ in string.Formatter().parse(place) if name is not None]


def _template_problem(place: str) -> str | None:
    """Say why `place` cannot be formatted with `rollout_id`, or return None."""
    try:
        strange = sorted(set(_fields(place)) - {"rollout_id"})
        if strange:
            return (
                f"it has {', '.join('{' + name + '}' for name in strange)}; only {PLACEHOLDER} is filled in"
            )
        if place.format(rollout_id=1) == place.format(rollout_id=2) and _fields(place):
            return "it names the same file for every rollout"
    except (ValueError, KeyError, IndexError) as error:
        return f"its braces cannot be read ({error}); one that is part of the name is written twice"
    return None
