"""Where recorded rollouts lie, which ones there are, and whether a replay can begin."""

from __future__ import annotations

import glob
import re
import string
from pathlib import Path
from typing import TYPE_CHECKING

from slime.arguments.recording import is_one_file, recording_template
from slime.rollout.recording.head import Head, RecordingError, read_head

if TYPE_CHECKING:
    from slime.arguments import Args


def recording_path(place: str, rollout_id: int) -> Path:
    """Return the file of a rollout; `place` is the value of one of the two flags."""
    return Path(recording_template(place).format(rollout_id=rollout_id))


def recorded_ids(place: str) -> list[int]:
    """Return the rollouts whose files are there, in order. One file for all is rollout 0."""
    if is_one_file(place):
        return [0] if Path(place).is_file() else []
    parts = [(text, name) for text, name, _, _ in string.Formatter().parse(recording_template(place))]
    wildcard = "".join(glob.escape(text) + ("*" if name else "") for text, name in parts)
    pattern = re.compile("".join(re.escape(text) + (r"(\d+)" if name else "") for text, name in parts))
    matches = filter(None, map(pattern.fullmatch, glob.glob(wildcard)))
    ids = {int(match[1]) for match in matches if recording_path(place, int(match[1])) == Path(match[0])}
    return sorted(ids)


def require_recorded(args: Args, first: int) -> None:
    """Check that every rollout from `first` to `--num-rollout` is recorded, whole, and of these batch sizes.

    Raises:
        RecordingError: it is not; the message says what there is, or what to pass.
    """
    place = args.load_debug_rollout_data or ""
    for rollout_id in range(first, args.num_rollout):
        path = recording_path(place, rollout_id)
        if not path.is_file():
            raise RecordingError(_missing(args, place, rollout_id))
        check_head(args, path, read_head(path), rollout_id)


def check_head(args: Args, path: Path, head: Head, rollout_id: int) -> None:
    """Check that a file holds the rollout that its name says, batched and judged as this run would.

    Raises:
        RecordingError: it does not.
    """
    if head.rollout_id != rollout_id and not is_one_file(args.load_debug_rollout_data or ""):
        raise RecordingError(
            f"{path} stands for rollout {rollout_id} and was recorded as rollout {head.rollout_id}. Rename "
            "it, or give the file itself to --load-debug-rollout-data: it then is every rollout."
        )
    recorded = [head.arguments[name] for name in ("rollout_batch_size", "n_samples_per_prompt")]
    if recorded != [args.rollout_batch_size, args.n_samples_per_prompt]:
        raise RecordingError(
            f"{path} was recorded with --rollout-batch-size {recorded[0]} --n-samples-per-prompt "
            f"{recorded[1]}, and this run has --rollout-batch-size {args.rollout_batch_size} "
            f"--n-samples-per-prompt {args.n_samples_per_prompt}. Optimizer steps and schedules are counted "
            "by them: give both as they were recorded."
        )
    judge = head.arguments["custom_rm_path"]
    if args.custom_rm_path not in (None, judge):
        raise RecordingError(
            f"{path} was judged with --custom-rm-path {judge}, and this run has {args.custom_rm_path}: a "
            "replay calls no plugin, its rewards are the recorded ones. Drop --custom-rm-path, or record "
            "anew."
        )


def _missing(args: Args, place: str, rollout_id: int) -> str:
    """Say which rollouts there are in the place of the one that is not."""
    ids = recorded_ids(place)
    said = (
        f"--num-rollout {args.num_rollout} needs rollout {rollout_id}, and --load-debug-rollout-data {place} "
    )
    if not ids:
        return said + "has none. Give it what an earlier run got as --save-debug-rollout-data."
    if rollout_id > ids[-1]:
        remedy = f"Use --num-rollout {ids[-1] + 1} or less, or record more."
    elif rollout_id < ids[0]:
        remedy = f"--load a checkpoint that stands at rollout {ids[0]}, or copy the earlier ones there."
    else:
        remedy = "Copy the missing one there."
    return said + f"has {len(ids)}, the first {ids[0]}, the last {ids[-1]}. {remedy}"
