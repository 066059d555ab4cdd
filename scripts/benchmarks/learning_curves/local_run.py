"""One run in one process, without Ray: the loop of `slime.train` on stand-ins for its two groups of actors.

Student engine and teacher are servers, as in the real job; rollout side and trainer are called directly. Only
the verbs that a run of the benchmark needs are there: no checkpoints, no evaluation of the teacher.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, TextIO, cast

from scripts.benchmarks.learning_curves.curves import (
    curve_of,
    first_value,
    is_closed,
    is_hopeless,
    stage_seconds,
)
from scripts.benchmarks.learning_curves.methods import METHODS, Case, Run, kl_flags, train_flags
from scripts.benchmarks.learning_curves.results import Result
from slime.arguments import Args, parse_args
from slime.backends import create_backend
from slime.backends.fsdp.backend import FsdpBackend
from slime.checkpoints import ResumePoint, RunState
from slime.data.vocabulary import never_sampled
from slime.engines.model_facts import model_facts
from slime.engines.process import free_port
from slime.metrics.tracker import Tracker
from slime.ray.rollout_actor import RolloutResult, Who
from slime.rollout.manager import RolloutManager
from slime.skipping.account import SkipAccount
from slime.train import train
from slime.trainer import Trainer, build_shards
from slime.utils.processing_utils import load_processor
from slime.utils.types import TRAINED, Sample
from slime.weight_sync.base import EngineMember
from slime.weight_sync.store import create_weight_folder
from slime.weight_sync.sync import create_weight_sync


class StopRunError(Exception):
    """The student has learned what it was to learn, or learns nothing: no further rollouts."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all runs of a worker share."""

    data: Mapping[str, Path]
    """The parquet file of each split."""
    teacher_url: str
    engine_url: str
    """The student's engine: it may hold any weights of the students' architecture, and keeps a run's last."""


class LocalRollouts:
    """The verbs of `RolloutGroup`, called directly."""

    def __init__(
        self, args: Args, engine_url: str, teacher_accuracy: float, stop_share: float | None
    ) -> None:
        """Load data. A run ends once two evaluations in a row have closed `stop_share` of the gap, or ten
        have closed next to nothing of it."""
        self._args = args
        self._manager = RolloutManager(args, [engine_url])
        self._teacher_accuracy = teacher_accuracy
        self._stop_share = stop_share
        self._accuracies: list[float] = []

    def wait_ready(self) -> None:
        """Return at once: the engine was waited for before the run."""

    def generate(self, rollout_id: int) -> RolloutResult:
        """Sample and score one rollout.

        Raises:
            StopRunError: enough of the gap is closed, or too little.
        """
        seen, teacher = self._accuracies, self._teacher_accuracy
        if is_closed(seen, teacher, self._stop_share) or is_hopeless(seen, teacher):
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
        """Return the held-out accuracy."""
        metrics = self._manager.evaluate(rollout_id, who)
        self._accuracies.append(metrics["eval/accuracy"])
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the data."""
        return self._manager.state_dict()

    def expect_version(self, version: str) -> None:
        """From now on every answer must come from these weights."""
        self._manager.expect_version(version)

    def when_engines_are_lost(self, revive: Callable[[], object]) -> None:
        """Do nothing: the engine is the benchmark's, and its loss ends the run."""

    def close(self) -> None:
        """Close the connections."""
        self._manager.close()


class LocalTrainers:
    """The verbs of `TrainGroup` on one rank in this process."""

    def __init__(self, args: Args, engine_url: str, weight_folder: Path) -> None:
        self._args = args
        self._engines = [EngineMember(url=engine_url)]
        self.step = 0
        self.skips = SkipAccount(args.max_skipped_steps)
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), LOCAL_RANK="0")
        processor = load_processor(args.hf_checkpoint)
        masked = never_sampled(processor.tokenizer, model_facts(args.hf_checkpoint).vocab_size)
        self._backend = cast(FsdpBackend, create_backend(args, 0, 1, masked))
        self._trainer = Trainer(args, self._backend, processor, masked)
        self._weight_sync = create_weight_sync(args, 0, weight_folder, "127.0.0.1")

    def wait_ready(self) -> None:
        """Return at once: the model is there."""

    def train(self, rollout_id: int, shards: list[Any]) -> dict[str, float]:
        """Take the optimizer steps of one rollout."""
        start = time.perf_counter()
        metrics = self._trainer.train(rollout_id, shards[0])
        self.skips.enter(len(shards[0].steps), self._trainer.skipped)
        return metrics | {"perf/train_seconds": time.perf_counter() - start}

    def publish_weights(self, rollouts: LocalRollouts) -> dict[str, float]:
        """Bring the trainer's weights to the engine."""
        start = time.perf_counter()
        self.step = self._backend.weight_version
        version = str(self.step)
        self._weight_sync.publish(self._backend.hf_named_parameters(), self._engines, version)
        rollouts.expect_version(version)
        return {"perf/sync_seconds": time.perf_counter() - start}

    def finish(self) -> None:
        """Do nothing: nothing waits for its turn."""

    def close(self) -> None:
        """Leave the process group."""
        self._backend.close()


def run_locally(run: Run, setting: Setting, teacher_accuracy: float, folder: Path, console: TextIO) -> Result:
    """Train, evaluate, and hold the finished student against the teacher; metrics go to `folder`."""
    started = time.perf_counter()
    args = parse_args(train_flags(run, setting.data, setting.teacher_url, folder))
    with ExitStack() as stack:
        tracker = stack.enter_context(Tracker(args, console))
        weights = stack.enter_context(
            create_weight_folder(folder, Path(args.hf_checkpoint), one_machine=True)
        )
        rollouts = LocalRollouts(args, setting.engine_url, teacher_accuracy, run.case.stop_share)
        stack.enter_context(closing(rollouts))
        trainers = stack.enter_context(closing(LocalTrainers(args, setting.engine_url, weights.path)))
        with suppress(StopRunError):
            train(args, ResumePoint(state=RunState()), tracker, cast(Any, rollouts), cast(Any, trainers))
        final = held_against_teacher(run.case, setting, folder)
    records = tracker.records
    return Result(
        run=run,
        teacher=teacher_accuracy,
        test_rows=round(first_value(records, "eval/test/samples")),
        points=tuple(curve_of(records, teacher_samples=METHODS[run.method].teacher_samples)),
        final_kl=mean_gap(final),
        final_sampled_accuracy=mean(sample.metadata["task_reward"] for sample in final),
        stage_seconds=stage_seconds(records),
        wall_seconds=time.perf_counter() - started,
    )


def measure_teacher(run: Run, setting: Setting, folder: Path) -> float:
    """Return the teacher's accuracy on the test split."""
    args = parse_args(train_flags(run, setting.data, setting.teacher_url, folder))
    with closing(RolloutManager(args, [setting.engine_url])) as manager:
        return manager.evaluate(0, "teacher")["eval/accuracy"]


def held_against_teacher(case: Case, setting: Setting, folder: Path) -> list[Sample]:
    """Let the student in the engine answer test prompts at temperature 1; return its answers, scored by the
    teacher and graded."""
    args = parse_args(kl_flags(case, setting.data, setting.teacher_url, folder))
    with closing(RolloutManager(args, [setting.engine_url])) as manager:
        return [sample for sample in manager.generate(0).samples if sample.status in TRAINED]


def mean_gap(samples: Sequence[Sample]) -> float:
    """Return the mean of log pi_S - log pi_T over all tokens of scored responses, pi_S being the engine's."""
    gaps: list[float] = []
    for sample in samples:
        assert sample.rollout_log_probs is not None
        assert sample.teacher_log_probs is not None
        pairs = zip(sample.rollout_log_probs, sample.teacher_log_probs.tolist(), strict=True)
        gaps += [student - teacher for student, teacher in pairs]
    return mean(gaps)


def _pictures_of(samples: Sequence[Sample]) -> list[str]:
    """Return the content hashes of the samples' pictures."""
    hashes: set[str] = set()
    for sample in samples:
        hashes.update((sample.multimodal_train_inputs or {}).get("image_hashes", ()))
    return sorted(hashes)
