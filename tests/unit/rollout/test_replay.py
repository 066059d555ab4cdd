"""A replay gives what the live run gave, and what its own flags would have made of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from slime.arguments import Args, parse_args
from slime.engines.client import EngineClient
from slime.rollout.failures import Failures
from slime.rollout.manager import RolloutManager
from slime.rollout.recording.file import read_rollout, write_rollout
from slime.rollout.recording.head import RecordingError
from slime.rollout.recording.places import recording_path
from slime.rollout.replay import RecordedRollouts
from slime.rollout.rewards import Rewards
from slime.rollout.rollout import RolloutBatch
from slime.train_samples import task_advantages
from slime.trainer import TrainShard, build_shards
from slime.utils.types import TRAINED, Sample, SampleStatus
from tests.fakes.engine_server import FakeEngine, serve
from tests.fakes.rollouts import CHECKPOINT, answered_sample, facts, fake_engine, rollout_args, write_prompts

ASKED = ("--opd-top-k", "3", "--opd-max-failed-frac", "0.5")


@pytest.fixture
def teacher() -> Iterator[FakeEngine]:
    with serve(fake_engine()) as fake:
        yield fake


@pytest.fixture
def manager(tmp_path: Path, teacher: FakeEngine) -> Iterator[RolloutManager]:
    with serve(fake_engine(responses=[[11, 12, 2], [13, 2]], texts=["\\boxed{4}", "\\boxed{5}"])) as student:
        args = rollout_args(
            *("--save-debug-rollout-data", str(tmp_path / "recorded"), *ASKED),
            data=str(write_prompts(tmp_path)),
            rm_url=teacher.url + "/generate",
        )
        made = RolloutManager(args, [student.url])
        yield made
        made.close()


def replaying(place: Path, *flags: str) -> Args:
    return rollout_args("--load-debug-rollout-data", str(place), *ASKED, *flags, rm_url=None)


def shards(args: Args, batch: RolloutBatch, source: RolloutManager | RecordedRollouts) -> list[TrainShard]:
    pictures = source.pictures(batch.image_hashes())
    return build_shards(args, batch.samples, pictures, 1, 0, merge_size=source.merge_size)


def test_a_replay_gives_the_shards_and_metrics_of_the_live_run(
    tmp_path: Path, manager: RolloutManager, teacher: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher.fault, teacher.fault_times = "400", 1
    live = [(manager.generate(number), manager.state_dict()) for number in range(2)]
    args = replaying(tmp_path / "recorded", "--prompt-data", "nowhere.parquet")

    def no_server(*_: Any, **__: Any) -> None:
        raise AssertionError("a replay asks a server")

    monkeypatch.setattr(EngineClient, "__init__", no_server)
    recorded = RecordedRollouts(args)
    for number, (batch, position) in enumerate(live):
        again = recorded.generate(number)
        assert again.metrics == {
            name: value for name, value in batch.metrics.items() if not name.startswith("perf/")
        }
        assert recorded.state_dict() == position
        for mine, theirs in zip(again.samples, batch.samples, strict=True):
            assert_same(replace(mine, multimodal_inputs=None), replace(theirs, multimodal_inputs=None))
        if number == 1:  # the manager keeps the pictures of the last rollout
            (one,), (other,) = shards(args, again, recorded), shards(args, batch, manager)
            assert (one.pictures, one.steps) == (other.pictures, other.steps)
            for mine, theirs in zip(one.samples, other.samples, strict=True):
                assert_same(mine, theirs)
    assert [batch.metrics["rollout/failed_samples"] for batch, _ in live] == [1.0, 0.0]
    assert live[0][0].metrics["perf/record_seconds"] > 0


def test_a_position_that_was_loaded_is_kept_until_a_rollout_is_replayed(tmp_path: Path) -> None:
    recorded = RecordedRollouts(replaying(tmp_path))
    recorded.load_state_dict({"position": 3})
    assert recorded.state_dict() == {"position": 3}


def assert_same(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    for name, value in vars(one).items():
        theirs = getattr(other, name)
        if isinstance(value, torch.Tensor):
            assert value.dtype == theirs.dtype, name
            assert torch.equal(value, theirs), name
        else:
            assert value == theirs, name


def rewritten(place: Path, **changes: Any) -> None:
    """Record rollout 0 anew with another head or other samples."""
    path = recording_path(str(place), 0)
    old = read_rollout(path)
    samples = changes.pop("samples", old.samples)
    write_rollout(path, replace(old.head, **changes), samples, old.pictures)


def test_another_kind_of_model_is_refused(tmp_path: Path, manager: RolloutManager) -> None:
    manager.generate(0)
    rewritten(tmp_path / "recorded", model={"vocab_size": 9, "image_token_id": 1, "merge_size": 2})
    with pytest.raises(RecordingError, match=r"sampled by .*vocab_size 9.*--hf-checkpoint .*another kind"):
        RecordedRollouts(replaying(tmp_path / "recorded")).generate(0)


def test_another_number_of_samples_is_refused(tmp_path: Path, manager: RolloutManager) -> None:
    samples = manager.generate(0).samples
    rewritten(tmp_path / "recorded", samples=samples[:5])
    with pytest.raises(RecordingError, match=r"holds 5 samples, and --rollout-batch-size times .* is 6"):
        RecordedRollouts(replaying(tmp_path / "recorded")).generate(0)


def test_a_rollout_that_went_away_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match=r"there is no recorded rollout .*rollout-000003"):
        RecordedRollouts(replaying(tmp_path)).generate(3)


GRADED = ("--rm-type", "math", "--task-reward-weight")
SIGNALS = {
    "distillation": ("--use-opd", "--opd-type", "sglang"),
    "half the task": ("--use-opd", "--opd-type", "sglang", *GRADED, "0.5"),
    "twice the task": ("--use-opd", "--opd-type", "sglang", *GRADED, "2"),
    "the task alone": ("--rm-type", "math"),
}


def signal_args(signal: str) -> Args:
    """Return the arguments of a run that learns from this; no server is asked here, live or not."""
    base = ("--hf-checkpoint", CHECKPOINT, "--num-rollout", "1", "--load-debug-rollout-data", "recorded")
    return parse_args([*base, *SIGNALS[signal]])


async def judged(args: Args) -> list[Sample]:
    """Return samples as a live run with these arguments leaves them: right, wrong, failed."""
    samples = [answered_sample(0), answered_sample(1, label="5"), answered_sample(2)]
    samples[2].status = SampleStatus.FAILED
    judges = Rewards(args, facts())
    triples = [[None, 42, None], [-1.0, 11, None], [-2.0, 12, None], [-3.0, 2, None]]

    async def score(_args: Any, _sample: Any) -> Any:
        return {"meta_info": {"input_token_logprobs": triples}}

    if args.use_opd:
        judges._reward = score
    for sample in samples:
        await judges.judge(sample, Failures(args, 3))
    await judges.finish(samples)
    return samples


@pytest.mark.parametrize("now", SIGNALS)
@pytest.mark.parametrize("then", SIGNALS)
async def test_a_replay_trains_on_what_a_live_run_with_its_flags_would(then: str, now: str) -> None:
    args = signal_args(now)
    recorded = [sample for sample in await judged(signal_args(then)) if sample.status in TRAINED]
    live = [sample for sample in await judged(args) if sample.status in TRAINED]
    for one, other in zip(task_advantages(args, recorded), task_advantages(args, live), strict=True):
        assert one.equal(other)


async def test_a_grade_that_was_not_recorded_is_asked_for() -> None:
    samples = await judged(signal_args("distillation"))
    del samples[1].metadata["task_reward"]
    with pytest.raises(ValueError, match=r"sample 1 has no metadata\['task_reward'\].*--label-key"):
        task_advantages(signal_args("half the task"), samples)


@pytest.mark.parametrize(
    ("lost", "flags", "words"),
    [
        ("teacher_log_probs", (), "has no teacher_log_probs and --use-opd is set"),
        ("rollout_log_probs", ("--use-tis",), "has no rollout_log_probs"),
    ],
)
def test_what_a_loss_needs_and_was_not_recorded_is_named(
    tmp_path: Path, manager: RolloutManager, lost: str, flags: tuple[str, ...], words: str
) -> None:
    samples = manager.generate(0).samples
    for sample in samples:
        setattr(sample, lost, None)
    rewritten(tmp_path / "recorded", samples=samples)
    args = replaying(tmp_path / "recorded", *flags)
    recorded = RecordedRollouts(args)
    with pytest.raises(ValueError, match=words):
        shards(args, recorded.generate(0), recorded)
