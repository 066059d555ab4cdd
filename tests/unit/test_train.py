"""The order of the stages, and what the loop hands from one to the next; actors are stand-ins."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import pytest

from slime import train as loop
from slime.checkpoints import Maker, RunState, begin_checkpoint, finish_checkpoint, resume_point
from slime.metrics.trace import Span
from slime.ray.cluster import EnginesLost
from slime.ray.interrupts import listen
from slime.ray.rollout_actor import RolloutResult
from slime.skipping.account import SkipAccount, SkippedStep, TrainingStuckError
from slime.tiny.paths import checkpoint_path


@dataclass(frozen=True)
class _Args:
    num_rollout: int = 3
    eval_interval: int | None = None
    eval_sets: tuple[tuple[str, str], ...] = (("test", "test.parquet"),)
    eval_teacher: bool = True
    skip_eval_before_train: bool = False
    load: str | None = None
    save: str | None = None
    save_interval: int | None = None
    save_keep: int = 0
    save_hf_interval: int | None = None
    hf_checkpoint: str = str(checkpoint_path("student"))
    train_backend: str = "fsdp"
    num_train_ranks: int = 1
    async_rollout: bool = False
    max_skipped_steps: int = 2


class _Rollouts:
    """Notes every call; answers with numbers that tell the calls apart. Its position counts the rollouts."""

    def __init__(self, calls: list[str]) -> None:
        self.calls = calls
        self.position = 0

    def evaluate_later(self, rollout_id: int, who: str) -> str:
        self.calls.append(f"order {who}")
        return who

    def generate_later(self, rollout_id: int) -> RolloutResult:
        self.calls.append(f"order {rollout_id}")
        return self._rollout(rollout_id)

    def result(self, ref: str | RolloutResult) -> Any:
        if isinstance(ref, RolloutResult):
            self.calls.append(f"collect {ref.metrics['response_tokens'] - 10:.0f}")
            return ref
        self.calls.append(f"collect {ref}")
        return {"eval/accuracy": 1.0}

    def wait_ready(self) -> None:
        self.calls.append("rollouts ready")

    def when_engines_are_lost(self, revive: Callable[[], object]) -> None:
        """Nothing is lost here."""

    def evaluate(self, rollout_id: int, who: str) -> dict[str, float]:
        self.calls.append(f"eval {rollout_id}")
        return {"eval/accuracy": 0.3 + rollout_id / 10}

    def generate(self, rollout_id: int) -> RolloutResult:
        self.calls.append(f"generate {rollout_id}")
        return self._rollout(rollout_id)

    def _rollout(self, rollout_id: int) -> RolloutResult:
        self.position += 1
        return RolloutResult(shards=[], metrics={"response_tokens": 10.0 + rollout_id})

    def end(self) -> None:
        self.calls.append("engines ended")

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.calls.append(f"data {state}")
        self.position = state["position"]


def _skipped(rollout_id: int, version: int) -> SkippedStep:
    return SkippedStep(
        rollout_id=rollout_id, number=0, version=version, loss=1.0, grad_norm=1e9, reason="too much"
    )


class _Trainers:
    skipping: tuple[int, ...] = ()
    """Rollouts whose one step is skipped."""

    def __init__(self, calls: list[str], limit: int) -> None:
        self.calls = calls
        self.step = 0
        self.taken = 0
        self.skips = SkipAccount(limit)

    def wait_ready(self) -> None:
        self.calls.append("trainers ready")

    def train(self, rollout_id: int, shards: list[Any]) -> dict[str, float]:
        self.calls.append(f"train {rollout_id}")
        skipped = [_skipped(rollout_id, self.taken)] if rollout_id in self.skipping else []
        self.taken += 1 - len(skipped)
        self.step = self.taken
        self.skips.enter(1, skipped)
        return {"loss": 1.0}

    def publish_weights(self, rollouts: _Rollouts) -> dict[str, float]:
        self.calls.append(f"publish {self.step}")
        return {"perf/sync_seconds": 0.1}

    def finish(self) -> None:
        """Nothing waits for its turn here."""

    def outlive_engines(self) -> None:
        self.calls.append("all memory")

    def save(self, checkpoint: Any) -> None:
        self.calls.append(f"save {checkpoint.name}")

    def export(self, folder: Any) -> None:
        self.calls.append(f"export {folder.name}")

    def load(self, checkpoint: Any) -> None:
        self.calls.append(f"load {checkpoint.name}")


class _Trace:
    def add(self, actor: str, *spans: Span) -> None:
        assert actor == "loop"
        assert all(span.seconds >= 0 for span in spans)


class _Tracker:
    def __init__(self) -> None:
        self.trace = _Trace()
        self.rollouts: list[tuple[int, int, dict[str, float]]] = []
        self.evals: list[tuple[int, int, str]] = []
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def log(self, rollout_id: int, step: int, metrics: dict[str, float]) -> None:
        self.rollouts.append((rollout_id, step, metrics))

    def log_eval(self, rollout_id: int, step: int, metrics: dict[str, float], who: str) -> float:
        self.evals.append((rollout_id, step, who))
        return metrics["eval/accuracy"]


MAKER = Maker(train_backend="fsdp", num_train_ranks=1, model={})
AHEAD = _Args(async_rollout=True, eval_teacher=False, eval_interval=2, skip_eval_before_train=True)
WAITS = ("perf/step_seconds", "perf/wait_for_rollout_seconds", "perf/wait_for_train_seconds")


def _run(
    args: _Args,
    rollouts_class: type[_Rollouts] = _Rollouts,
    trainers_class: type[_Trainers] = _Trainers,
) -> tuple[list[str], _Tracker, RunState]:
    calls: list[str] = []
    tracker = _Tracker()
    rollouts, trainers = (
        cast(Any, rollouts_class(calls)),
        cast(Any, trainers_class(calls, args.max_skipped_steps)),
    )
    state = loop.train(cast(Any, args), resume_point(args.load), cast(Any, tracker), rollouts, trainers)
    return calls, tracker, state


def test_the_stages_come_in_order():
    calls, tracker, state = _run(_Args(num_rollout=2))
    assert calls == [
        *("order teacher", "trainers ready", "rollouts ready", "publish 0", "collect teacher", "eval 0"),
        *("generate 0", "train 0", "publish 1"),
        *("generate 1", "train 1", "publish 2"),
        "eval 2",
    ]
    assert [(rollout_id, step) for rollout_id, step, _ in tracker.rollouts] == [(0, 1), (1, 2)]
    assert tracker.evals == [(0, 0, "teacher"), (0, 0, "student"), (2, 2, "student")]
    metrics = tracker.rollouts[0][2]
    assert {name: metrics.pop(name) >= 0 for name in WAITS} == dict.fromkeys(WAITS, True)
    assert metrics == {"response_tokens": 10.0, "loss": 1.0, "perf/sync_seconds": 0.1}
    assert state == RunState(
        rollout_id=2,
        student_tokens=21,
        student_before=0.3,
        student_after=0.5,
        teacher=1.0,
        data={"position": 2},
    )


@pytest.mark.parametrize(
    ("args", "evaluated"),
    [
        (_Args(num_rollout=5, eval_interval=2), ["eval 0", "eval 2", "eval 4", "eval 5"]),
        (_Args(num_rollout=4, eval_interval=2), ["eval 0", "eval 2", "eval 4"]),
        (_Args(skip_eval_before_train=True), ["eval 3"]),
        (_Args(eval_sets=(), eval_teacher=False), []),
    ],
)
def test_when_the_student_is_evaluated(args, evaluated):
    calls, _, _ = _run(args)
    assert [call for call in calls if call.startswith("eval")] == evaluated


@pytest.mark.parametrize(("interval", "saved"), [(None, [3]), (1, [1, 2, 3]), (2, [2, 3]), (3, [3])])
def test_when_a_checkpoint_is_written(tmp_path, interval, saved):
    calls, tracker, _ = _run(_Args(save=str(tmp_path), save_interval=interval))
    assert [call for call in calls if call.startswith("save")] == [
        f"save .rollout-{number:06d}.partial" for number in saved
    ]
    assert sorted(path.name for path in tmp_path.glob("rollout-*")) == [f"rollout-{n:06d}" for n in saved]
    state = json.loads((tmp_path / "rollout-000003" / "state.json").read_text())
    assert (state["rollout_id"], state["data"]) == (3, {"position": 3})
    assert "perf/save_seconds" in tracker.rollouts[-1][2]


@pytest.mark.parametrize(("keep", "left"), [(0, [1, 2, 3, 4]), (1, [4]), (3, [2, 3, 4])])
def test_the_newest_checkpoints_are_kept(tmp_path, keep, left):
    _run(_Args(num_rollout=4, save=str(tmp_path), save_interval=1, save_keep=keep))
    assert sorted(path.name for path in tmp_path.glob("*rollout-*")) == [f"rollout-{n:06d}" for n in left]
    assert (tmp_path / "latest").read_text() == "rollout-000004"


def test_a_checkpoint_counts_when_the_metrics_of_its_rollout_are_written(tmp_path):
    """A run that is killed in between goes on from the one before, and makes the rollout again."""

    class Killed(_Tracker):
        def log(self, rollout_id: int, step: int, metrics: dict[str, float]) -> None:
            super().log(rollout_id, step, metrics)
            if rollout_id == 1:
                raise SystemExit("killed")

    calls: list[str] = []
    args = _Args(save=str(tmp_path), save_interval=1)
    parts = (args, resume_point(None), Killed(), _Rollouts(calls), _Trainers(calls, 5))
    with pytest.raises(SystemExit):
        loop.train(*cast(Any, parts))
    assert calls[-3:] == ["train 1", "save .rollout-000002.partial", "publish 2"]
    assert resume_point(str(tmp_path)).state.rollout_id == 1
    assert not (tmp_path / "rollout-000002").exists()


STAGES = {
    # where the signal comes -> the loop's last call, and how many rollouts the checkpoint has
    "eval 2": ("eval 2", 2),
    "generate 1": ("generate 1", 1),
    "train 1": ("train 1", 2),
    "publish 2": ("publish 2", 2),
    "log 1": ("publish 2", 2),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_signal_saves_what_has_been_trained(tmp_path, stage: str):
    """Wherever it comes: a training is finished first, a rollout is lost, and metrics are there up to the
    checkpoint."""
    last, saved = STAGES[stage]
    calls, tracker = _signalled(stage, _Args(save=str(tmp_path), eval_interval=2))
    ending = ["engines ended", "all memory", f"save .rollout-{saved:06d}.partial"]
    assert calls[calls.index(last) :] == [last, *ending]
    assert [(rollout_id, step) for rollout_id, step, _ in tracker.rollouts] == [
        (rollout_id, rollout_id + 1) for rollout_id in range(saved)
    ]
    point = resume_point(str(tmp_path))
    assert (point.state.rollout_id, point.state.data) == (saved, {"position": saved})


@pytest.mark.parametrize("stage", ["train 1", "collect 2"])
def test_a_signal_drops_the_rollout_ahead(tmp_path, stage: str):
    args = replace(AHEAD, save=str(tmp_path))
    calls, tracker = _signalled(stage, args)
    assert calls[-3:] == ["engines ended", "all memory", "save .rollout-000002.partial"]
    assert "publish 2" not in calls
    assert [(rollout_id, step) for rollout_id, step, _ in tracker.rollouts] == [(0, 1), (1, 2)]
    point = resume_point(str(tmp_path))
    assert (point.state.rollout_id, point.state.data) == (2, {"position": 2})


AT_ONCE: dict[str, tuple[str, dict[str, Any]]] = {
    "nowhere to save": ("generate 1", {}),
    "nothing to save": ("generate 0", {"save": "folder"}),
    "all saved": ("generate 1", {"save": "folder", "save_interval": 1}),
}


@pytest.mark.parametrize(("stage", "flags"), AT_ONCE.values(), ids=AT_ONCE)
def test_a_signal_with_nothing_to_save_ends_at_once(tmp_path, monkeypatch, stage: str, flags: dict[str, Any]):
    monkeypatch.chdir(tmp_path)
    calls, _ = _signalled(stage, _Args(**flags))
    assert calls[-1] == stage


def _signalled(stage: str, args: _Args) -> tuple[list[str], _Tracker]:
    """Run the loop, and send SIGTERM while it does what `stage` says."""

    class Calls(list[str]):
        def append(self, call: str) -> None:
            super().append(call)
            if call == stage:
                os.kill(os.getpid(), signal.SIGTERM)

    class Tracker(_Tracker):
        def log(self, rollout_id: int, step: int, metrics: dict[str, float]) -> None:
            if stage == f"log {rollout_id}":
                os.kill(os.getpid(), signal.SIGTERM)
            super().log(rollout_id, step, metrics)

    calls, tracker = Calls(), Tracker()
    before = {stop: signal.getsignal(stop) for stop in (signal.SIGINT, signal.SIGTERM)}
    listen()
    try:
        with pytest.raises(KeyboardInterrupt):
            loop.train(
                cast(Any, args),
                resume_point(None),
                cast(Any, tracker),
                cast(Any, _Rollouts(calls)),
                cast(Any, _Trainers(calls, 5)),
            )
    finally:
        for stop, handler in before.items():
            signal.signal(stop, handler)
    return calls, tracker


def test_models_for_others_are_written_beside_the_checkpoints(tmp_path):
    calls, tracker, _ = _run(_Args(save=str(tmp_path), save_hf_interval=2))
    written = [call for call in calls if call.startswith(("export", "save"))]
    assert written == [
        "export .rollout-000002.partial",
        *("save .rollout-000003.partial", "export .rollout-000003.partial"),
    ]
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == ["rollout-000002", "rollout-000003"]
    assert ["perf/export_seconds" in metrics for _, _, metrics in tracker.rollouts] == [False, True, True]


def test_a_loaded_run_goes_on_and_asks_the_teacher_no_second_time(tmp_path):
    before = RunState(rollout_id=2, student_tokens=5, student_before=0.3, teacher=1.0, data={"position": 4})
    finish_checkpoint(begin_checkpoint(tmp_path, 2), before, MAKER)
    calls, _, state = _run(_Args(load=str(tmp_path)))
    assert calls == [
        *("trainers ready", "rollouts ready", "load rollout-000002", "data {'position': 4}", "publish 0"),
        *("generate 2", "train 2", "publish 1", "eval 3"),
    ]
    assert (state.student_tokens, state.student_before, state.teacher) == (5 + 12, 0.3, 1.0)


def test_a_rollout_made_ahead_is_ordered_before_the_training_and_whole_before_weights_change():
    calls, tracker, state = _run(AHEAD)
    assert calls == [
        *("trainers ready", "rollouts ready", "publish 0"),
        *("generate 0", "order 1", "train 0", "collect 1", "publish 1"),
        *("order 2", "train 1", "collect 2", "publish 2"),
        "eval 2",  # nothing is in flight
        *("train 2", "publish 3"),
        "eval 3",
    ]
    logged = [(number, step, metrics["response_tokens"]) for number, step, metrics in tracker.rollouts]
    assert logged == [(0, 1, 10), (1, 2, 11), (2, 3, 12)]
    assert [metrics["rollout/steps_behind"] for _, _, metrics in tracker.rollouts] == [0, 1, 1]
    assert state.student_tokens == 33


def test_a_checkpoint_of_a_run_ahead_stands_before_the_rollout_that_is_not_trained_on_yet(tmp_path):
    _run(replace(AHEAD, save=str(tmp_path), save_interval=1))
    positions = []
    for path in sorted(tmp_path.glob("rollout-*/state.json")):
        state = json.loads(path.read_text())
        positions.append((state["rollout_id"], state["data"]["position"]))
    assert positions == [(1, 1), (2, 2), (3, 3)]
    calls, tracker, _ = _run(replace(AHEAD, load=str(tmp_path / "rollout-000001"), eval_sets=()))
    assert calls == [
        *("trainers ready", "rollouts ready", "load rollout-000001", "data {'position': 1}", "publish 0"),
        *("generate 1", "order 2", "train 1", "collect 2", "publish 1"),
        *("train 2", "publish 2"),
    ]
    assert [metrics["rollout/steps_behind"] for _, _, metrics in tracker.rollouts] == [0, 1]


class _LosingRollouts(_Rollouts):
    """Loses its engines under the ordered rollout 1; the actor has put its position back by then."""

    def result(self, ref: str | RolloutResult) -> Any:
        result = super().result(ref)
        if self.calls[-1] == "collect 1":
            self.position -= 1
            raise EnginesLost("no engine has the current weights")
        return result


def test_an_ordered_rollout_whose_engines_were_lost_is_made_again_with_the_next_weights(tmp_path):
    args = replace(AHEAD, save=str(tmp_path), save_interval=1, eval_sets=())
    calls, tracker, _ = _run(args, _LosingRollouts)
    assert [call for call in calls if not call.startswith("save")] == [
        *("trainers ready", "rollouts ready", "publish 0"),
        *("generate 0", "order 1", "train 0", "collect 1", "publish 1"),
        *("generate 1", "order 2", "train 1", "collect 2", "publish 2"),
        *("train 2", "publish 3"),
    ]
    metrics = [metrics for _, _, metrics in tracker.rollouts]
    assert [of["response_tokens"] for of in metrics] == [10, 11, 12]
    assert [of["rollout/steps_behind"] for of in metrics] == [0, 0, 1]  # made anew it is on-policy
    positions = [
        json.loads((tmp_path / f"rollout-{number:06d}" / "state.json").read_text())["data"]["position"]
        for number in (1, 2, 3)
    ]
    assert positions == [1, 2, 3]


def test_a_training_that_fails_ends_the_loop_whatever_is_in_flight():
    calls: list[str] = []

    class Failing(_Trainers):
        def train(self, rollout_id: int, shards: list[Any]) -> dict[str, float]:
            raise RuntimeError("the loss is no number")

    parts = (AHEAD, resume_point(None), _Tracker(), _Rollouts(calls), Failing(calls, 5))
    with pytest.raises(RuntimeError, match="the loss is no number"):
        loop.train(*cast(Any, parts))
    assert calls[-2:] == ["generate 0", "order 1"]


class _Skipping(_Trainers):
    skipping = (0, 2)


def test_a_skipped_step_is_told_and_publishes_no_new_version():
    calls, tracker, state = _run(_Args(eval_sets=(), eval_teacher=False), trainers_class=_Skipping)
    assert [call for call in calls if call.startswith(("train ", "publish"))] == [
        *("publish 0", "train 0", "publish 0", "train 1", "publish 1", "train 2", "publish 1"),
    ]
    assert [(rollout_id, step) for rollout_id, step, _ in tracker.rollouts] == [(0, 0), (1, 1), (2, 1)]
    assert len(tracker.said) == 2
    assert tracker.said[1].startswith(
        "Warning: an optimizer step was skipped. rollout 2, optimizer step 0 (weight version 1): too much"
    )
    assert state.rollout_id == 3


class _Stuck(_Trainers):
    skipping = (2, 3)


def test_too_many_skipped_steps_end_the_loop_with_all_recorded_and_nothing_saved_of_the_last(tmp_path):
    calls: list[str] = []
    args = _Args(num_rollout=9, eval_sets=(), eval_teacher=False, save=str(tmp_path), save_interval=1)
    tracker = _Tracker()
    parts = (args, resume_point(None), tracker, _Rollouts(calls), _Stuck(calls, args.max_skipped_steps))
    with pytest.raises(TrainingStuckError) as caught:
        loop.train(*cast(Any, parts))
    assert calls[-1] == "train 3"
    assert [(rollout_id, step) for rollout_id, step, _ in tracker.rollouts] == [
        (0, 1),
        (1, 2),
        (2, 2),
        (3, 2),
    ]
    message = str(caught.value)
    assert "2 optimizer steps in a row were skipped (--max-skipped-steps 2)" in message
    assert "rollout 2, optimizer step 0" in message
    assert "rollout 3, optimizer step 0" in message
    assert f"The last checkpoint is {tmp_path / 'rollout-000003'};" in message


def test_a_stuck_training_is_an_exit_status(monkeypatch, capsys):
    def stuck(args):
        raise SkipAccount(1, in_a_row=[_skipped(0, 0)]).stuck(None)

    monkeypatch.setattr(loop, "run", stuck)
    monkeypatch.setattr(loop, "listen", lambda: None)
    monkeypatch.setattr(loop, "parse_args", lambda argv: None)
    monkeypatch.setattr(loop, "format_args", lambda args: "")
    assert loop.main([]) == 1
    assert "There is no checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_an_exit_status(monkeypatch, capsys, number, status):
    def interrupted(args):
        os.kill(os.getpid(), number)

    before = {stop: signal.getsignal(stop) for stop in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr("slime.ray.interrupts._arrived", [])
    monkeypatch.setattr(loop, "run", interrupted)
    monkeypatch.setattr(loop, "parse_args", lambda argv: None)
    monkeypatch.setattr(loop, "format_args", lambda args: "")
    try:
        assert loop.main([]) == status
    finally:
        for stop, handler in before.items():
            signal.signal(stop, handler)
    assert "has been ended" in capsys.readouterr().err


def test_a_replay_without_its_files_ends_before_anything_starts(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(loop, "Tracker", None)
    monkeypatch.setattr(loop, "listen", lambda: None)
    flags = ("--hf-checkpoint", "no model", "--num-rollout", "2", "--rm-type", "math")
    assert loop.main([*flags, "--load-debug-rollout-data", str(tmp_path)]) == 1
    assert f"--load-debug-rollout-data {tmp_path} has none" in capsys.readouterr().err
