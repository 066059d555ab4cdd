"""Recorded rollouts in the place of a `RolloutManager`: the same methods, and nothing is asked of any server.

What was sampled and scored stays as it was; what it is worth to this run follows this run's flags, so that
losses can be compared on the same rollouts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slime.engines.model_facts import model_facts
from slime.rollout.recording.file import Recording, read_rollout
from slime.rollout.recording.head import RecordingError
from slime.rollout.recording.places import check_head, recording_path
from slime.rollout.rollout import RolloutBatch

if TYPE_CHECKING:
    from slime.arguments import Args


class RecordedRollouts:
    """Reads the rollouts of `--load-debug-rollout-data`, one at a time. One per run."""

    def __init__(self, args: Args) -> None:
        self._args = args
        self._place = args.load_debug_rollout_data or ""
        self._facts = model_facts(args.hf_checkpoint)
        self._pictures: dict[str, bytes] = {}
        self._position: dict[str, Any] = {}

    def generate(self, rollout_id: int) -> RolloutBatch:
        """Return a recorded rollout, with the metrics that it had; times are another run's and stay out.

        Raises:
            RecordingError: the rollout is not recorded, is damaged, or does not fit this run.
        """
        path = recording_path(self._place, rollout_id)
        recording = read_rollout(path)
        self._check(path, recording, rollout_id)
        self._pictures, self._position = recording.pictures, recording.head.data_position
        metrics = recording.head.metrics
        return RolloutBatch(
            recording.samples,
            {name: value for name, value in metrics.items() if not name.startswith("perf/")},
        )

    def pictures(self, hashes: Iterable[str]) -> dict[str, bytes]:
        """Return the PNG bytes of pictures of the last rollout, by their content hash."""
        return {name: self._pictures[name] for name in hashes}

    @property
    def merge_size(self) -> int:
        """Side of the square of picture patches that becomes one token of the student."""
        return self._facts.merge_size

    def state_dict(self) -> dict[str, Any]:
        """Return where the recorded run stood in its data: one without replay may go on there."""
        return self._position

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position that `state_dict` gave; which rollout comes next is said by its number."""
        self._position = state

    def _check(self, path: Path, recording: Recording, rollout_id: int) -> None:
        check_head(self._args, path, recording.head, rollout_id)
        model = dataclasses.asdict(self._facts)
        if recording.head.model != model:
            raise RecordingError(
                f"{path} was sampled by {recording.head.student} ({_listed(recording.head.model)}), and "
                f"--hf-checkpoint {self._args.hf_checkpoint} is another kind of model ({_listed(model)}): "
                "its tokens mean something else. Replay with the recorded student or one of its kind."
            )
        if len(recording.samples) != self._args.samples_per_rollout:
            raise RecordingError(
                f"{path} holds {len(recording.samples)} samples, and --rollout-batch-size times "
                f"--n-samples-per-prompt is {self._args.samples_per_rollout}. Record it anew."
            )


def _listed(facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items())
