"""A run that was killed and goes on ends as one that never stood still: prompts, weights, metrics."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from slime.engines.process import ServerProcess
from tests.fakes.jobs import arguments, running, start_teacher

pytestmark = pytest.mark.timeout(900)
ROLLOUTS, SAVED = 4, 2
FLAGS = (
    *("--deterministic-rollout", "--eval-interval", "2"),
    *("--save-interval", "2", "--save-keep", "0", "--save-hf-interval", "0"),
)
# Where Adam divides by next to nothing, rounding decides which way a weight goes.
DAMPED = ("--adam-eps", "1e-3")
TWO_RANKS = ("--actor-num-gpus-per-node", "2")
MEGATRON = ("--train-backend", "megatron")
OF_THE_PROCESS = ("perf/", "data/picture", "sync/")
"""Metrics of what a process does: how long it takes, what it has seen before, that it checks its first
weights."""
EXPORT = f"checkpoints/hf/rollout-{ROLLOUTS:06d}/model.safetensors"
OF_THE_ENGINE = "train_rollout_logprob_abs_diff"
Start = Callable[..., Path]


@pytest.fixture(scope="module")
def deterministic_teacher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A teacher that scores each response alone, whatever else arrives with it."""
    with start_teacher(tmp_path_factory.mktemp("teacher") / "teacher.log", "--deterministic") as server:
        yield server


@pytest.fixture(scope="module")
def start(
    data: dict[str, Path], deterministic_teacher: ServerProcess, tmp_path_factory: pytest.TempPathFactory
) -> Start:
    """Return a function that runs the tiny job in a folder, to its end or until it is killed."""

    def start(*flags: str, folder: Path | None = None, kill: bool = False) -> Path:
        folder = folder or tmp_path_factory.mktemp("resume") / "run"
        argv = arguments(
            data,
            deterministic_teacher.url,
            folder,
            *FLAGS,
            *("--save", str(folder / "checkpoints")),
            *("--save-debug-rollout-data", str(folder / "rollouts")),
            # Killed, it must not have come to its end, however long the test looks away.
            *("--num-rollout", "1000" if kill else str(ROLLOUTS)),
            *flags,
        )
        with running(argv, folder) as job:
            if kill:
                job.wait_until(checkpoint(folder, SAVED).is_dir, "no checkpoint")
                os.killpg(job.process.pid, signal.SIGKILL)
                job.process.wait()
            else:
                assert job.wait() == 0, job.console
                job.assert_nothing_left()
        return folder

    return start


def checkpoint(folder: Path, rollouts: int) -> Path:
    return folder / "checkpoints" / f"rollout-{rollouts:06d}"


def console(folder: Path) -> str:
    return folder.with_suffix(".console").read_text()


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def responses(folder: Path, rollout_id: int) -> list[dict[str, Any]]:
    rows = pq.read_table(folder / "rollouts" / f"rollout-{rollout_id:06d}.parquet").to_pylist()
    return sorted(rows, key=lambda row: row["index"])


def trained(folder: Path, scratch: Path, rollouts: int = ROLLOUTS) -> dict[str, Tensor]:
    """Return all tensors of a checkpoint's trainer: weights, Adam's means, counts of steps."""
    trainer = checkpoint(folder, rollouts) / "trainer"
    if (trainer / ".metadata").exists():
        dcp_to_torch_save(trainer, scratch / "whole.pt")
        tensors = dict(_flat(torch.load(scratch / "whole.pt", weights_only=True)))
    else:
        tensors = {
            f"{path.parent.name}/{name}": tensor
            for path in trainer.rglob("*.safetensors")
            for name, tensor in load_file(path).items()
        }
    assert len(tensors) > 150  # 63 weights and two means of each
    return tensors


def _flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(tree, Tensor):
        yield prefix, tree
    elif isinstance(tree, dict):
        for name, value in tree.items():
            yield from _flat(value, f"{prefix}/{name}")


def assert_the_same_run(resumed: Path, whole: Path, scratch: Path) -> None:
    ours, theirs = trained(resumed, scratch), trained(whole, scratch)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    exported = [load_file(folder / EXPORT) for folder in (resumed, whole)]
    assert exported[0].keys() == exported[1].keys()
    assert all(torch.equal(tensor, exported[1][name]) for name, tensor in exported[0].items())
    assert_same_prompts(resumed, whole)
    assert_same_metrics(resumed, whole)
    last = [json.loads((folder / "summary.json").read_text()) for folder in (resumed, whole)]
    for name in ("student_before", "student_after", "rollouts", "student_tokens"):
        assert last[0][name] == last[1][name], name
    assert last[0]["rollouts"] == ROLLOUTS


def assert_same_prompts(resumed: Path, whole: Path, last: int = ROLLOUTS) -> None:
    for number in range(SAVED, last):
        ours, theirs = responses(resumed, number), responses(whole, number)
        assert len(ours) == len(theirs) == 8
        for one, other in zip(ours, theirs, strict=True):
            assert one.pop("rollout_log_probs") == pytest.approx(other.pop("rollout_log_probs"), abs=1e-5)
            assert one == other


def assert_same_metrics(resumed: Path, whole: Path) -> None:
    """No gap, no double entry, and the same in each."""
    ours, theirs = records(resumed), records(whole)
    expected = [("eval", 0), 0, 1, ("eval", 2), 2, 3, ("eval", 4)]
    assert [_what(record) for record in ours] == [_what(record) for record in theirs] == expected
    for one, other in zip(ours, theirs, strict=True):
        gap = [record.pop(OF_THE_ENGINE, 0.0) for record in (one, other)]
        assert gap[0] == pytest.approx(gap[1], abs=1e-6)
        assert _comparable(one) == _comparable(other)


def _what(record: dict[str, Any]) -> Any:
    return ("eval", record["rollout_id"]) if "eval/accuracy" in record else record["rollout_id"]


def _comparable(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if not name.startswith(OF_THE_PROCESS)}


@pytest.fixture(scope="module")
def whole(start: Start) -> Path:
    """The job of one FSDP rank, in one go."""
    return start()


def test_a_run_goes_on_from_the_last_whole_checkpoint_as_if_nothing_had_been(
    start: Start, whole: Path, tmp_path: Path
) -> None:
    """Its newest checkpoint lost a file as the machine went down: what was measured since comes again."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "rollouts")
    (checkpoint(folder, ROLLOUTS) / "trainer" / ".metadata").unlink()
    start("--load", str(folder / "checkpoints"), folder=folder)
    said = console(folder)
    assert "rollout-000004: its file trainer/.metadata is not there" in said
    assert f"Resuming from {checkpoint(folder, SAVED)} (rollout 2 of 4)." in said
    assert f"metrics.jsonl: what it had of rollout {SAVED} and later ones comes again (4 lines" in said
    assert_the_same_run(folder, whole, tmp_path)
    dropped = (folder / "metrics.dropped.jsonl").read_text().splitlines()
    assert dropped == (whole / "metrics.jsonl").read_text().splitlines()[3:]
    wall = [json.loads((path / "summary.json").read_text())["wall_seconds"] for path in (folder, whole)]
    before = json.loads((checkpoint(whole, SAVED) / "state.json").read_text())["wall_seconds"]
    assert wall[0] > before > 0


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), TWO_RANKS, MEGATRON], ids=["fsdp", "two ranks", "megatron"])
def test_a_killed_run_goes_on_bit_for_bit(
    start: Start, request: pytest.FixtureRequest, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    if flags == MEGATRON:
        pytest.importorskip("megatron.core")
    unbroken = start(*flags) if flags else request.getfixturevalue("whole")
    killed = start(*flags, kill=True)
    start(*flags, "--load", str(checkpoint(killed, SAVED)), folder=killed)
    assert_the_same_run(killed, unbroken, tmp_path)


@pytest.mark.slow
def test_a_run_of_two_ranks_goes_on_with_one(start: Start, tmp_path: Path) -> None:
    """Up to rounding: another number of ranks adds up in another order."""
    two = start(*DAMPED, *TWO_RANKS, "--num-rollout", "3", "--save-interval", "1")
    one = tmp_path / "run"
    shutil.copytree(two, one)
    shutil.rmtree(one / "rollouts")
    flags = (*DAMPED, "--num-rollout", "3", "--save-interval", "1")
    start(*flags, "--load", str(checkpoint(one, SAVED)), folder=one)
    assert "written by 2 training ranks and is read by 1" in console(one)
    assert "seeded anew from --seed 1234, rank 0 and step 2" in (one / "logs" / "train_0.log").read_text()
    assert_same_prompts(one, two, last=3)
    ours, theirs = trained(one, tmp_path, 3), trained(two, tmp_path, 3)
    assert ours.keys() == theirs.keys()
    before = trained(two, tmp_path, SAVED)
    moved = max(float((theirs[name] - before[name]).abs().max()) for name in theirs if "/model/" in name)
    assert moved > 1e-5
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=moved * 1e-3, msg=name)
