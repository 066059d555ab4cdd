"""The main job with the Megatron backend: what FSDP makes of the same rollouts, step by step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slime.engines.process import ServerProcess
from slime.tiny.paths import checkpoint_path
from tests.fakes.jobs import arguments, running
from tests.fakes.tiny_model import save_upcycled_student

pytest.importorskip("megatron.core")

MEGATRON = ("--train-backend", "megatron")
TWO = (*MEGATRON, "--actor-num-gpus-per-node", "2")
SERVED = ("--rm-url", "--custom-rm-path", "--custom-reward-post-process-path")
INNER = ("--opd-type", "megatron", "--opd-teacher-load", str(checkpoint_path("teacher")))
CASES = {
    "one rank": ("student", MEGATRON),
    "tensor parallel": ("student", (*TWO, "--tensor-model-parallel-size", "2", "--sequence-parallel")),
    "a teacher in the trainer": ("student", (*TWO, *INNER, "--pipeline-model-parallel-size", "2")),
    "experts": ("mixture", (*TWO, "--expert-model-parallel-size", "2", "--use-distributed-optimizer")),
}
SAME = ("opd_reverse_kl", "opd_kl_loss", "grad_norm", "entropy", "response_tokens", "reward")


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("students")
    return {"student": checkpoint_path("student"), "mixture": save_upcycled_student(folder / "mixture")}


def run(argv: list[str], folder: Path) -> list[dict[str, float]]:
    """Run a job to its end; return what it recorded."""
    with running(argv, folder) as job:
        assert job.wait() == 0, job.console
        job.assert_nothing_left()
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_server(argv: list[str]) -> list[str]:
    """Return the flags of a job that asks no teacher's server."""
    kept, words = [], iter(argv)
    for word in words:
        if word in SERVED:
            next(words)
        else:
            kept.append(word)
    return kept


@pytest.fixture(scope="module")
def of_fsdp(
    data: dict[str, Path],
    teacher: ServerProcess,
    students: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, list[dict[str, float]]]:
    found = {}
    for name, path in students.items():
        folder = tmp_path_factory.mktemp("fsdp") / name
        flags = ("--deterministic-rollout", "--hf-checkpoint", str(path))
        found[name] = run(arguments(data, teacher.url, folder, *flags), folder)
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", CASES)
def test_the_job_goes_as_with_fsdp(
    data: dict[str, Path],
    teacher: ServerProcess,
    students: dict[str, Path],
    of_fsdp: dict[str, list[dict[str, float]]],
    tmp_path: Path,
    case: str,
) -> None:
    student, flags = CASES[case]
    folder = tmp_path / "run"
    more = ("--deterministic-rollout", "--hf-checkpoint", str(students[student]), *flags)
    argv = arguments(data, teacher.url, folder, *more)
    records = run(without_server(argv) if INNER[1] in flags[2:] else argv, folder)
    pairs = list(zip(records, of_fsdp[student], strict=True))
    rollouts = [(ours, theirs) for ours, theirs in pairs if "opd_reverse_kl" in ours]
    assert len(rollouts) == 2
    for ours, theirs in rollouts:
        for name in SAME:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-6), name
        assert ours["train_rollout_logprob_abs_diff"] < 1e-3
    evaluations = [(ours, theirs) for ours, theirs in pairs if "eval/accuracy" in ours]
    assert [ours["eval/accuracy"] == theirs["eval/accuracy"] for ours, theirs in evaluations] == [True, True]
