"""Every number reaches its files, and a run without a wandb key never touches wandb."""

from __future__ import annotations

import io
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from slime.metrics.position import DROPPED_FILE, read_metrics
from slime.metrics.tracker import Tracker, console_line


@dataclass(frozen=True)
class _Args:
    output_dir: str
    num_rollout: int = 20
    use_wandb: bool = False
    wandb_project: str = "slime"
    wandb_group: str | None = None
    wandb_mode: Literal["online", "offline"] = "online"

    def as_dict(self) -> dict[str, Any]:
        return {"num_rollout": self.num_rollout}


@pytest.fixture(autouse=True)
def _no_wandb_key(monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)


METRICS = {"opd_reverse_kl": 0.4123, "reward": 0.5, "perf/rollout_seconds": 1.25, "perf/train_seconds": 0.5}


def test_the_line_per_rollout_is_complete_and_flat(tmp_path):
    console = io.StringIO()
    with Tracker(_Args(str(tmp_path / "run")), console) as tracker:
        tracker.log(3, 4, METRICS)
        tracker.log_eval(4, 4, {"eval/accuracy": 0.75}, "student")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == {"rollout_id": 3, "step": 4, **METRICS}
    assert json.loads(lines[1]) == {"rollout_id": 4, "step": 4, "eval/accuracy": 0.75}
    assert console.getvalue().splitlines() == [
        "rollout  4/20  kl 0.412  reward 0.50  | rollout 1.2 + train 0.5 s",
        "eval    student after 4 rollouts: accuracy 0.750",
    ]


def test_a_line_is_on_disk_before_the_run_ends(tmp_path):
    tracker = Tracker(_Args(str(tmp_path)), io.StringIO())
    tracker.log(0, 1, METRICS)
    assert len(read_metrics(tmp_path)) == 1
    tracker.close()
    tracker.close()


def test_nan_is_null_in_the_file_and_nan_when_read(tmp_path):
    with Tracker(_Args(str(tmp_path)), io.StringIO()) as tracker:
        tracker.log(0, 1, {"reward": math.nan})
    assert "null" in (tmp_path / "metrics.jsonl").read_text()
    assert math.isnan(read_metrics(tmp_path)[0]["reward"])


def test_a_resumed_run_appends_and_knows_its_past(tmp_path):
    for rollout_id in (0, 1):
        console = io.StringIO()
        with Tracker(_Args(str(tmp_path)), console, first_rollout=rollout_id) as tracker:
            tracker.log(rollout_id, rollout_id + 1, METRICS)
    assert [record["rollout_id"] for record in tracker.records] == [0, 1]
    assert len(read_metrics(tmp_path)) == 2
    assert DROPPED_FILE not in console.getvalue()


def test_what_was_logged_after_the_checkpoint_is_set_aside_and_comes_again(tmp_path):
    with Tracker(_Args(str(tmp_path)), io.StringIO()) as tracker:
        for rollout_id in range(4):
            tracker.log(rollout_id, rollout_id + 1, {"reward": 0.1})
            tracker.log_eval(rollout_id + 1, rollout_id + 1, {"eval/accuracy": 0.5}, "student")
    before = (tmp_path / "metrics.jsonl").read_text().splitlines()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"rollout_id": 1, "ste')  # the machine went down
    console = io.StringIO()
    with Tracker(_Args(str(tmp_path)), console, first_rollout=2) as tracker:
        assert [record["rollout_id"] for record in tracker.records] == [0, 1, 1]
        tracker.log_eval(2, 2, {"eval/accuracy": 0.75}, "student")
        tracker.log(2, 3, {"reward": 0.2})
    assert (tmp_path / "metrics.jsonl").read_text().splitlines()[:3] == before[:3]
    assert [record["rollout_id"] for record in read_metrics(tmp_path)] == [0, 1, 1, 2, 2]
    assert (tmp_path / DROPPED_FILE).read_text().splitlines() == [*before[3:], '{"rollout_id": 1, "ste']
    said = f"had of rollout 2 and later ones comes again (6 lines, now in {tmp_path / DROPPED_FILE})"
    assert said in console.getvalue()
    events = plugin_event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))  # as TensorBoard reads
    events.Reload()
    assert [event.step for event in events.Tensors("reward")] == [0, 1, 2]
    assert [event.tensor_proto.float_val[0] for event in events.Tensors("eval/accuracy")] == [0.5, 0.75]


def test_tensorboard_has_the_scalars_by_rollout(tmp_path):
    with Tracker(_Args(str(tmp_path)), io.StringIO()) as tracker:
        tracker.log(7, 8, METRICS)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (event,) = events.Tensors("opd_reverse_kl")
    assert event.step == 7
    assert event.tensor_proto.float_val[0] == pytest.approx(0.4123)


def test_wandb_is_not_even_imported_without_a_key(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with Tracker(_Args(str(tmp_path)), io.StringIO()) as tracker:
        tracker.log(0, 1, METRICS)


@pytest.mark.parametrize(("key", "use_wandb", "mode"), [("secret", False, "online"), (None, True, "offline")])
def test_wandb_starts_with_a_key_or_when_asked(tmp_path, monkeypatch, key, use_wandb, mode):
    calls: dict[str, Any] = {}

    class _Wandb:
        @staticmethod
        def Settings(**settings):  # noqa: N802 - wandb's name
            return settings

        @staticmethod
        def init(**options):
            calls.update(options, logged=[])
            return _Run()

    class _Run:
        def log(self, record):
            calls["logged"].append(record)

        def finish(self):
            calls["finished"] = True

    monkeypatch.setitem(sys.modules, "wandb", _Wandb)
    if key:
        monkeypatch.setenv("WANDB_API_KEY", key)
    with Tracker(_Args(str(tmp_path), use_wandb=use_wandb), io.StringIO()) as tracker:
        tracker.log(0, 1, METRICS)
    assert calls["mode"] == mode
    assert calls["settings"]["x_disable_meta"] is True, "it would note the command line"
    assert calls["config"] == {"num_rollout": 20}
    assert calls["finished"]
    assert calls["logged"][0]["opd_reverse_kl"] == 0.4123
    assert "secret" not in Path(tmp_path / "metrics.jsonl").read_text()


def test_the_console_line_leaves_out_what_a_run_does_not_have():
    assert console_line(0, 5, {"reward": 1.0}) == "rollout 1/5  reward 1.00"


@pytest.mark.parametrize(("difference", "warned"), [(0.01, False), (0.5, True)])
def test_engines_with_other_weights_than_the_trainers_are_noticed(tmp_path, difference, warned):
    console = io.StringIO()
    with Tracker(_Args(str(tmp_path)), console) as tracker:
        tracker.log(0, 1, {"train_rollout_logprob_abs_diff": difference})
    assert ("0.50 nats a token apart" in console.getvalue()) == warned
