"""What a sync asks of whom, and when engines are compared; actors, cluster and engines are stand-ins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import pytest

from slime.ray.cluster import EnginesLost
from slime.ray.resources import Resources
from slime.ray.train_actor import TrainResult
from slime.ray.train_group import TrainGroup
from slime.skipping.account import SkippedStep
from slime.weight_sync.base import EngineMember
from slime.weight_sync.probe import Gap, WeightMismatchError

Call = Callable[[], Any]
URL = "http://engine:1"


@dataclass(frozen=True)
class _Args:
    check_weight_sync: str = "never"
    weight_sync: str = "tensor"
    precision: str = "float32"
    engine_dtype: str | None = None
    max_skipped_steps: int = 2


class _Rank:
    """The only training rank; notes what it is called for beyond its own start."""

    def __init__(self, calls: list[str]) -> None:
        self._calls = calls
        self.version = 0
        self.losses = 0
        """Syncs in which an engine is lost."""
        self.gap = 1e-6
        self.skipped: list[SkippedStep] = []
        """What comes of the next rollouts' one step."""

    def __getattr__(self, method: str) -> Any:
        rank = self

        class _Method:
            @staticmethod
            def remote(*arguments: Any) -> Call:
                return lambda: rank.answer(method)

        return _Method()

    def answer(self, method: str) -> Any:
        if method == "address":
            return "127.0.0.1", 1
        if method == "weight_version":
            return self.version
        if method != "setup":
            self._calls.append(method)
        if method == "train":
            self.version += 1 - len(self.skipped)
            counts = {"optimizer_steps": 1.0 - len(self.skipped), "skipped_steps": float(len(self.skipped))}
            return TrainResult(metrics={"loss": 1.0, **counts}, skipped=self.skipped)
        if method == "publish_weights":
            if self.losses:
                self.losses -= 1
                raise EnginesLost("it is gone")
            return 1_000_000
        return [Gap(url=URL, largest=self.gap, mean=self.gap)] if method == "compare" else None


class _Cluster:
    one_machine = True
    resources = Resources(num_ranks=1, num_nodes=1, gpus_per_rank=0, num_engines=1, gpus_per_engine=0)

    def __init__(self, rank: _Rank) -> None:
        self._rank = rank

    def start_actor(self, *arguments: Any, **options: Any) -> _Rank:
        return self._rank

    def watch(self, name: str) -> None:
        """Nobody dies."""

    def wait(self, refs: list[Call]) -> list[Any]:
        return [ref() for ref in refs]


class _Engines:
    def __init__(self, calls: list[str]) -> None:
        self._calls = calls

    def members(self) -> list[EngineMember]:
        self._calls.append("members")
        return [EngineMember(url=URL, incarnation=2)]

    def start_anew(self) -> None:
        self._calls.append("start anew")

    def release_memory(self, tags: Sequence[str]) -> None:
        self._calls.append("release " + " ".join(tags))

    def resume_memory(self, tags: Sequence[str]) -> None:
        self._calls.append("resume " + " ".join(tags))


class _Rollouts:
    has_engines = True

    def __init__(self, calls: list[str]) -> None:
        self._calls = calls
        self.engines = _Engines(calls)

    def expect_version(self, version: str) -> None:
        self._calls.append(f"expect {version}")

    def probe(self) -> str:
        self._calls.append("probe")
        return "probe"


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slime.ray.train_group.NOTICE_SECONDS", 0.0)


class _Run:
    """Trainers and rollouts, and what was asked of them since the last look."""

    def __init__(self, check: str = "never", way: str = "tensor") -> None:
        self.calls: list[str] = []
        self.rank = _Rank(self.calls)
        self.rollouts = cast(Any, _Rollouts(self.calls))
        self.trainers = TrainGroup(cast(Any, _Cluster(self.rank)), cast(Any, _Args(check, way)), None)

    def colocated(self) -> _Run:
        self.trainers.take_turns(self.rollouts.engines)
        return self

    def train(self) -> dict[str, float]:
        return self.trainers.train(0, [cast(Any, "shard")])

    def publish(self) -> dict[str, float]:
        return self.trainers.publish_weights(self.rollouts)

    def seen(self) -> list[str]:
        seen, self.calls[:] = list(self.calls), []
        return seen


TO_TRAINING = ["release kv_cache weights cuda_graph", "onload"]
TO_SYNC = ["offload_optimizer", "resume weights"]
TO_GENERATION = ["offload", "resume kv_cache cuda_graph"]


def test_apart_engines_are_asked_for_weights_carried_and_their_version_expected() -> None:
    run = _Run()
    run.train()
    metrics = run.publish()
    assert run.seen() == ["train", "members", "publish_weights", "expect 1"]
    assert (metrics["perf/sync_megabytes"], metrics["rollout/engine_restarts"]) == (1.0, 2.0)
    assert run.trainers.step == 1


def test_colocated_engines_are_counted_when_they_have_room_to_be_started_anew() -> None:
    """One that died in the trainers' turn has none before."""
    run = _Run().colocated()
    run.publish()
    sync = [*TO_SYNC, "members", "publish_weights", *TO_GENERATION]
    assert run.seen() == [*TO_TRAINING, *sync, "expect 0"]
    run.train()
    assert run.seen() == [*TO_TRAINING, "train"]
    run.publish()
    assert run.seen() == [*sync, "expect 1"]


@pytest.mark.parametrize("colocated", [False, True])
def test_an_engine_that_is_lost_in_a_sync_is_waited_for_and_gets_the_weights_in_a_second_round(
    colocated: bool,
) -> None:
    run = _Run()
    if colocated:
        run.colocated()
    run.train()
    run.seen()
    run.rank.losses = 1
    run.publish()
    rounds = ["members", "publish_weights"] * 2
    around = (TO_SYNC, TO_GENERATION) if colocated else ([], [])
    assert run.seen() == [*around[0], *rounds, *around[1], "expect 1"]
    run.rank.losses = 4  # its keeper learns of a death later than who is refused a connection
    run.publish()
    run.rank.losses = 5
    with pytest.raises(EnginesLost):
        run.publish()


def test_nobody_is_left_in_the_broadcast_of_a_sync_in_which_an_engine_was_lost() -> None:
    run = _Run(way="distributed")
    run.rank.losses = 1
    run.publish()
    assert run.seen() == [
        "members",
        "publish_weights",
        "start anew",
        "members",
        "publish_weights",
        "expect 0",
    ]


def test_the_last_weights_of_a_colocated_run_are_compared_too() -> None:
    run = _Run("every").colocated()
    run.train()
    run.publish()
    run.seen()
    run.trainers.finish()
    assert run.seen() == [*TO_TRAINING, "compare"]
    run.trainers.finish()
    assert run.seen() == []


@pytest.mark.parametrize(
    ("check", "compared"), [("first", [1, 1, 0, 0]), ("every", [1, 1, 1, 1]), ("never", [0, 0, 0, 0])]
)
@pytest.mark.parametrize("colocated", [False, True])
def test_when_engines_are_compared(check: str, compared: list[int], colocated: bool) -> None:
    run = _Run(check)
    if colocated:
        run.colocated()
    probed, told = [], []
    for _ in compared:
        synced = run.publish()
        assert ("sync/logprob_abs_diff" in synced) <= (not colocated)
        probed.append(run.seen().count("probe"))
        told.append(int("sync/logprob_abs_diff" in synced | run.train()))
        calls = run.seen()
        if colocated and told[-1]:  # on the weights that were published, before they change
            assert calls[-2:] == ["compare", "train"]
    assert probed == told == compared


def test_a_gap_ends_the_run_before_anything_is_learned_from_it() -> None:
    run = _Run("every").colocated()
    run.rank.gap = 0.5
    run.publish()
    run.seen()
    with pytest.raises(WeightMismatchError, match=rf"{URL} .*version 0.*0\.5 at most"):
        run.train()
    assert run.seen() == [*TO_TRAINING, "compare"]


def test_a_skipped_step_leaves_the_version_and_is_on_the_account() -> None:
    run = _Run()
    step = SkippedStep(rollout_id=0, number=0, version=0, loss=1.0, grad_norm=1e9, reason="too much")
    run.rank.skipped = [step]
    assert run.train()["skipped_steps"] == 1
    run.publish()
    assert run.seen() == ["train", "members", "publish_weights", "expect 0"]
    assert (run.trainers.step, run.trainers.skips.latest) == (0, [step])
    run.rank.skipped = []
    run.train()
    run.publish()
    assert (run.trainers.step, run.trainers.skips.in_a_row) == (1, [])
