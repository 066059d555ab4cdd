"""Recorded rollouts train as the live ones did, bit for bit, and without a server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from slime.engines.process import ServerProcess
from slime.tiny.paths import checkpoint_path
from tests.fakes.jobs import arguments, running

STEPS = ("--global-batch-size", "4", "--save-interval", "1")
"""Two optimizer steps a rollout, so that old log-probs and the order of samples matter."""


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def rollouts(folder: Path) -> list[dict[str, float]]:
    return [record for record in metrics(folder) if "loss" in record]


def state(folder: Path, rollout: int) -> dict[str, Any]:
    """Return what the driver wrote into a checkpoint."""
    path = folder / "checkpoints" / f"rollout-{rollout:06d}" / "state.json"
    return json.loads(path.read_text())


def tensors(folder: Path, rollout: int, scratch: Path) -> dict[str, Tensor]:
    """Return the weights and the optimizer's state of a checkpoint, by their paths in it."""
    dcp_to_torch_save(folder / "checkpoints" / f"rollout-{rollout:06d}" / "trainer", scratch)
    return dict(flattened("", torch.load(scratch, weights_only=True)))


def flattened(prefix: str, state: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(state, dict):
        for name, value in state.items():
            yield from flattened(f"{prefix}/{name}", value)
    elif isinstance(state, Tensor):
        yield prefix, state


@pytest.fixture(scope="module")
def live(data: dict[str, Path], teacher: ServerProcess, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run a job of two rollouts that records them; return its output folder."""
    folder = tmp_path_factory.mktemp("live") / "run"
    flags = (
        *("--save", str(folder / "checkpoints"), "--save-debug-rollout-data", str(folder / "rollouts")),
        *("--opd-top-k", "4", "--skip-eval-before-train", *STEPS),
    )
    with running(arguments(data, teacher.url, folder, *flags), folder) as job:
        assert job.wait() == 0, job.console
    return folder


def replay(live: Path, folder: Path, *flags: str) -> str:
    """Train from the recorded rollouts, with no server to be found; return the console."""
    argv = [
        *("--hf-checkpoint", str(checkpoint_path("student")), "--num-rollout", "2"),
        *("--rollout-batch-size", "4", "--n-samples-per-prompt", "2", "--rollout-max-response-len", "64"),
        *("--use-dynamic-batch-size", "--max-tokens-per-gpu", "4096", "--rm-type", "math"),
        *(
            "--use-opd",
            "--opd-type",
            "sglang",
            "--opd-top-k",
            "4",
            "--lr",
            "3e-4",
            "--train-threads",
            "1",
            *STEPS,
        ),
        *("--load-debug-rollout-data", str(live / "rollouts"), "--output-dir", str(folder)),
        *("--save", str(folder / "checkpoints"), *flags),
    ]
    with running(argv, folder) as job:
        status = job.wait()
        assert status == 0, job.console
        job.assert_nothing_left()
        return job.console


@pytest.fixture(scope="module")
def replayed(live: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Replay the live run as it was; return its output folder and console."""
    folder = tmp_path_factory.mktemp("replayed") / "run"
    return folder, replay(live, folder)


def test_a_replay_measures_what_the_live_run_did(live: Path, replayed: tuple[Path, str]):
    ours, theirs = rollouts(replayed[0]), rollouts(live)
    assert [(record["rollout_id"], record["step"]) for record in ours] == [(0, 2), (1, 4)]
    for one, other in zip(ours, theirs, strict=True):
        assert untimed(one) == untimed(other)
        assert {"loss", "grad_norm", "opd_reverse_kl", "response_length"} <= one.keys()
        assert other["perf/record_seconds"] > 0
        assert one["perf/replay_seconds"] > 0
        assert not {"perf/sync_seconds", "perf/rollout_seconds", "perf/record_seconds"} & one.keys()


def untimed(record: dict[str, float]) -> dict[str, float]:
    """Return what neither a clock nor an engine, of which a replay has none, says."""
    apart = ("perf/", "sync/", "rollout/engine_restarts")
    return {name: value for name, value in record.items() if not name.startswith(apart)}


@pytest.mark.parametrize("rollout", [1, 2])
def test_a_replay_leaves_the_weights_of_the_live_run(
    live: Path, replayed: tuple[Path, str], tmp_path: Path, rollout: int
):
    folder, _ = replayed
    ours = tensors(folder, rollout, tmp_path / "ours.pt")
    theirs = tensors(live, rollout, tmp_path / "theirs.pt")
    assert ours.keys() == theirs.keys()
    assert len(ours) > 50
    assert [name for name, value in ours.items() if not value.equal(theirs[name])] == []
    assert state(folder, rollout)["data"] == state(live, rollout)["data"]


def test_a_replay_starts_no_engine_and_says_what_it_is(replayed: tuple[Path, str]):
    folder, console = replayed
    assert "0 engines of our own" in console
    assert "| backend, engine | fsdp, replayed |" in console
    assert console.count("not evaluated") == 3
    assert sorted(path.name for path in (folder / "logs").iterdir()) == ["replay.log", "train_0.log"]


def test_another_loss_on_the_same_rollouts_differs(live: Path, tmp_path: Path):
    flags = ("--opd-kl-coef", "0.5", "--rm-url", "http://127.0.0.1:9/generate")
    replay(live, tmp_path / "run", "--num-rollout", "1", *flags)
    (ours,), theirs = rollouts(tmp_path / "run"), rollouts(live)[0]
    assert ours["response_tokens"] == theirs["response_tokens"]
    assert ours["loss"] != theirs["loss"]
    assert ours["grad_norm"] != theirs["grad_norm"]


@pytest.mark.slow
def test_a_checkpoint_of_a_replay_goes_on_in_a_replay_and_live(
    live: Path, replayed: tuple[Path, str], data: dict[str, Path], teacher: ServerProcess, tmp_path: Path
):
    load = ("--load", str(replayed[0] / "checkpoints" / "rollout-000001"))
    replay(live, tmp_path / "again", *load)
    (record,) = rollouts(tmp_path / "again")
    assert untimed(record) == untimed(rollouts(live)[1])
    folder = tmp_path / "live"
    flags = (*load, "--skip-eval-before-train", *STEPS, "--save", str(folder / "checkpoints"))
    with running(arguments(data, teacher.url, folder, *flags), folder) as job:
        assert job.wait() == 0, job.console
    assert [record["rollout_id"] for record in rollouts(folder)] == [1]
    assert "eval/accuracy" in metrics(folder)[-1]


def test_a_recording_holds_what_the_teacher_said_and_no_more_pictures_than_prompts(live: Path):
    table = pq.read_table(live / "rollouts" / "rollout-000001.parquet")
    assert table.num_rows == 8
    assert table["teacher_top_k"].to_pylist() == [4] * 8
    pngs = [png for row in table["image_pngs"].to_pylist() for png in row or [] if png is not None]
    assert len(pngs) == len(set(pngs)) <= 4
    assert {tuple(versions) for versions in table["weight_versions"].to_pylist()} == {("2",)}


def test_more_rollouts_than_are_recorded_are_refused_at_once(live: Path, tmp_path: Path):
    argv = [
        *("--hf-checkpoint", str(checkpoint_path("student")), "--num-rollout", "3", "--rm-type", "math"),
        *("--rollout-batch-size", "4", "--n-samples-per-prompt", "2", "--output-dir", str(tmp_path / "run")),
        "--load-debug-rollout-data",
        str(live / "rollouts" / "rollout-{rollout_id:06d}.parquet"),
    ]
    with running(argv, tmp_path / "run") as job:
        assert job.wait() == 1
        console = job.console
    last = console.strip().splitlines()[-1]
    assert "--num-rollout 3 needs rollout 2" in last
    assert "has 2, the first 0, the last 1. Use --num-rollout 2 or less" in last
    assert not (tmp_path / "run").exists()
