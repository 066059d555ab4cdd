"""The main job on tiny models, from the command line to the files it leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from slime.engines.process import ServerProcess
from tests.fakes.jobs import arguments, command_line, running

IN_URL = "planted0in0a0url"
SECRETS = {
    "WANDB_API_KEY": "0planted0for0wandb" + "0" * 22,
    "HF_TOKEN": "hf_plantedplantedplantedplantedplanted",
    "SLIME_ENGINE_ADMIN_KEY": "planted0for0the0control0verbs",
    "SLIME_ENGINE_API_KEY": "planted0for0everybody",
}
"""What must not be found in anything that a run leaves."""


def _metrics(output_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(
    data: dict[str, Path], teacher: ServerProcess, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """Run a job of two rollouts to its end; return its output folder and console."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    flags = ("--eval-teacher", "--save", str(folder / "checkpoints"), "--save-interval", "1")
    flags += ("--wandb-mode", "offline", "--save-debug-rollout-data", str(folder / "recorded"))
    flags += ("--log-level", "debug")
    url = teacher.url.replace("://", f"://user:{IN_URL}@")
    with running(arguments(data, url, folder, *flags), folder, SECRETS) as job:
        job.wait_for("rollout 1/2")
        for process in job.find_all(r"transformers_engine|ray::"):
            assert not any(secret in command_line(process) for secret in SECRETS.values())
        status = job.wait()
        assert status == 0, job.console
        job.assert_nothing_left()
        return folder, job.console


def test_every_rollout_and_evaluation_is_recorded(finished):
    folder, console = finished
    records = _metrics(folder)
    rollouts = [record for record in records if "opd_reverse_kl" in record]
    assert [record["rollout_id"] for record in rollouts] == [0, 1]
    assert [record["step"] for record in rollouts] == [1, 2]
    for record in rollouts:
        assert record["opd_kl_loss"] > 0
        assert record["teacher/aligned_frac"] == 1
        assert record["tokens"] == record["response_tokens"] > 0
        stages = ("rollout", "train", "sync", "save")
        assert all(record[f"perf/{stage}_seconds"] > 0 for stage in stages)
    assert [record["rollout_id"] for record in records if "eval/accuracy" in record] == [0, 2]
    assert sum("teacher_eval/accuracy" in record for record in records) == 1
    assert console.count("rollout 1/2") == console.count("rollout 2/2") == 1


def test_answers_after_a_sync_come_from_the_new_weights(finished):
    folder, _ = finished
    records = _metrics(folder)
    versions = [record["eval/weight_version"] for record in records if "eval/weight_version" in record]
    assert versions == [0, 2]
    # The engine's log-probs of what it sampled are the trainer's: both hold the same weights, before and
    # after.
    differences = [
        record["train_rollout_logprob_abs_diff"] for record in records if "opd_reverse_kl" in record
    ]
    assert all(difference < 1e-3 for difference in differences)


def test_no_secret_is_in_anything_that_a_run_leaves(finished):
    folder, console = finished
    planted = [*SECRETS.values(), IN_URL]
    files = [path for path in folder.rglob("*") if path.is_file()]
    names = {path.relative_to(folder).parts[0] for path in files}
    assert {
        "logs",
        "metrics.jsonl",
        "summary.json",
        "trace.json",
        "tensorboard",
        "wandb",
        "recorded",
    } <= names
    assert "checkpoints" in names
    leaks = [(path, secret) for path in files for secret in planted if secret.encode() in path.read_bytes()]
    assert leaks == []
    assert not any(secret in console for secret in planted)
    # they were there to be found: the teacher's address was shown, and wandb did run with its key
    assert "***@127.0.0.1" in console
    assert list((folder / "wandb").rglob("*.wandb"))


def test_the_end_is_a_table_a_json_and_a_picture(finished):
    folder, console = finished
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["rollouts"], summary["backend"], summary["engine"]) == (2, "fsdp", "transformers")
    assert 0 <= summary["student_before"] < summary["teacher"] <= 1
    assert summary["student_tokens"] == sum(
        record["response_tokens"] for record in _metrics(folder) if "response_tokens" in record
    )
    assert "| gap closed" in console
    with Image.open(folder / "curves.png") as picture:
        picture.verify()
    assert list((folder / "tensorboard").iterdir())


def test_a_saved_run_goes_on_where_it_stood(finished, data, teacher, tmp_path):
    first, _ = finished
    folder = tmp_path / "resumed"
    flags = ("--num-rollout", "3", "--load", str(first / "checkpoints"))
    with running(arguments(data, teacher.url, folder, *flags), folder) as job:
        assert job.wait() == 0, job.console
        job.assert_nothing_left()
    records = [record for record in _metrics(folder) if "opd_reverse_kl" in record]
    assert [(record["rollout_id"], record["step"]) for record in records] == [(2, 3)]
    before = json.loads((first / "summary.json").read_text())
    after = json.loads((folder / "summary.json").read_text())
    assert after["rollouts"] == 3
    assert after["student_before"] == before["student_before"]
    assert after["student_tokens"] > before["student_tokens"]
