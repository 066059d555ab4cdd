"""One run in one process, without Ray: the loop of `slime.train` on stand-ins for its two groups of actors.

Student engine and teacher are servers, as in the real job; rollout side and trainer are called directly.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any, TextIO, cast

from scripts.benchmarks.learning_curves.curves import curve_of, stage_seconds, teacher_accuracy
from scripts.benchmarks.learning_curves.methods import METHODS, Case, Run, kl_flags, train_flags
from slime.arguments import Args, parse_args
from slime.backends import create_backend
from slime.backends.fsdp.backend import FsdpBackend
from slime.data.vocabulary import never_sampled
from slime.engines.model_facts import model_facts
from slime.engines.process import free_port
from slime.metrics.tracker import Tracker
from slime.ray.rollout_actor import RolloutResult, Who
from slime.rollout.manager import RolloutManager
from slime.train import train
from slime.trainer import Trainer, build_shards
from slime.utils.processing_utils import load_processor
from slime.utils.types import TRAINED, Sample
from slime.weight_sync.disk import write_weights
from slime.weight_sync.store import WeightStore


class StopRunError(Exception):
    """The student has learned what it was to learn; the rest of the rollouts is left out."""


class LocalRollouts:
    """The verbs of `RolloutGroup`, called directly. Ends the run by `StopRunError` as the case says."""

    def __init__(self, args: Args, engine_url: str, stop_share: float | None) -> None:
        self._args = args
        self._manager = RolloutManager(args, [engine_url])
        self._version: str | None = None
        self._stop_share = stop_share
        self._teacher = 1.0
        self._accuracies: list[float] = []

    def wait_ready(self) -> None:
        """Return at once: the engine was waited for before the run."""

    def generate(self, rollout_id: int) -> RolloutResult:
        """Sample and score one rollout.

        Raises:
            StopRunError: enough of the gap is closed.
        """
        if self._closed_enough():
            raise StopRunError
        start = time.perf_counter()
        batch = self._manager.generate(rollout_id)
        pictures = self._manager.pictures(_pictures_of(batch.samples))
        shards = build_shards(
            self._args, batch.samples, pictures, 1, rollout_id, merge_size=self._manager.merge_size
        )
        tokens = sum(sample.response_length for sample in batch.samples)
        times = {"response_tokens": float(tokens), "perf/rollout_seconds": time.perf_counter() - start}
        return RolloutResult(shards=cast(Any, shards), metrics=batch.metrics | times)

    def evaluate(self, rollout_id: int, who: Who) -> dict[str, float]:
        """Return the held-out accuracy of the student or the teacher."""
        metrics = self._manager.evaluate(rollout_id, who)
        if who == "student":
            self._accuracies.append(metrics["eval/accuracy"])
        else:
            self._teacher = metrics["eval/accuracy"]
        return metrics

    def evaluate_later(self, rollout_id: int, who: Who) -> Who:
        """Order an evaluation, which is made when its result is asked for."""
        return who

    def result(self, ordered: Who) -> dict[str, float]:
        """Return what was ordered."""
        return self.evaluate(0, ordered)

    def update_weights(self, path: Path, version: str) -> None:
        """Load the weights at `path` into the engine."""
        self._manager.update_weights(str(path), version)

    def close(self) -> None:
        """Close the connections."""
        self._manager.close()

    def _closed_enough(self) -> bool:
        if self._stop_share is None:
            return False
        start, *later = self._accuracies
        level = start + self._stop_share * (self._teacher - start)
        return len(later) >= 2 and min(later[-2:]) >= level


class LocalTrainers:
    """The verbs of `TrainGroup` on one rank in this process."""

    def __init__(self, args: Args, store: WeightStore) -> None:
        self._args = args
        self._store = store
        self.step = 0
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), LOCAL_RANK="0")
        processor = load_processor(args.hf_checkpoint)
        masked = never_sampled(processor.tokenizer, model_facts(args.hf_checkpoint).vocab_size)
        self._backend = cast(FsdpBackend, create_backend(args, 0, 1, masked))
        self._trainer = Trainer(args, self._backend, processor)

    def wait_ready(self) -> None:
        """Return at once: the model is there."""

    def train(self, rollout_id: int, shards: list[Any]) -> dict[str, float]:
        """Take the optimizer steps of one rollout."""
        start = time.perf_counter()
        metrics = self._trainer.train(rollout_id, shards[0])
        return metrics | {"perf/train_seconds": time.perf_counter() - start}

    def publish_weights(self, rollouts: LocalRollouts) -> dict[str, float]:
        """Bring the trainer's weights to the engine."""
        start = time.perf_counter()
        self.step = self._backend.weight_version
        version = str(self.step)
        path = self._store.path_for(version)
        write_weights(
            self._backend.hf_named_parameters(),
            path,
            checkpoint=Path(self._args.hf_checkpoint),
            writes=True,
        )
        rollouts.update_weights(path, version)
        self._store.retire_all_but(version)
        return {"perf/sync_seconds": time.perf_counter() - start}

    def close(self) -> None:
        """Leave the process group."""
        self._backend.close()


def run_locally(
    run: Run, data: Mapping[str, Path], teacher_url: str, engine_url: str, folder: Path, console: TextIO
) -> dict[str, Any]:
    """Train and evaluate; return the run's result as plain data.

    The engine may hold any weights of the case's architecture; it is left with the student's last.
    """
    started = time.perf_counter()
    args = parse_args(train_flags(run, data, teacher_url, folder))
    with ExitStack() as stack:
        tracker = stack.enter_context(Tracker(args, console))
        store = stack.enter_context(WeightStore.create(folder, Path(args.hf_checkpoint), one_machine=True))
        rollouts = stack.enter_context(closing(LocalRollouts(args, engine_url, run.case.stop_share)))
        trainers = stack.enter_context(closing(LocalTrainers(args, store)))
        with suppress(StopRunError):
            train(args, tracker, cast(Any, rollouts), cast(Any, trainers))
        kl, tokens = final_kl(run.case, data, teacher_url, engine_url, folder)
    points = curve_of(tracker.records, teacher_samples=METHODS[run.method].teacher_samples)
    return {
        "run": run.as_dict(),
        "teacher": teacher_accuracy(tracker.records),
        "points": [point.as_dict() for point in points],
        "final_kl": kl,
        "final_kl_tokens": tokens,
        "stage_seconds": stage_seconds(tracker.records),
        "wall_seconds": time.perf_counter() - started,
    }


def final_kl(
    case: Case, data: Mapping[str, Path], teacher_url: str, engine_url: str, folder: Path
) -> tuple[float, int]:
    """Let the student in the engine answer test prompts; return the mean of log pi_S - log pi_T over its
    tokens, and their number."""
    args = parse_args(kl_flags(case, data, teacher_url, folder))
    with closing(RolloutManager(args, [engine_url])) as manager:
        return mean_gap(manager.generate(0).samples)


def mean_gap(samples: Sequence[Sample]) -> tuple[float, int]:
    """Return the mean of log pi_S - log pi_T over all scored tokens, pi_S being the engine's, and their
    number."""
    gaps = [
        student - teacher
        for sample in samples
        if sample.status in TRAINED and sample.teacher_log_probs is not None and sample.rollout_log_probs
        for student, teacher in zip(sample.rollout_log_probs, sample.teacher_log_probs.tolist(), strict=True)
    ]
    return sum(gaps) / len(gaps), len(gaps)


def _pictures_of(samples: Sequence[Sample]) -> list[str]:
    """Return the content hashes of the samples' pictures."""
    hashes: set[str] = set()
    for sample in samples:
        hashes.update((sample.multimodal_train_inputs or {}).get("image_hashes", ()))
    return sorted(hashes)
