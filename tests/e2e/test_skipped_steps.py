"""A gradient that explodes in the running job: its step is skipped and counted, and too many end the run."""

from __future__ import annotations

import json
from pathlib import Path

from slime.engines.process import ServerProcess
from tests.fakes.absurd_teacher import PLANTED
from tests.fakes.jobs import arguments, running

FLAGS = (
    *("--custom-reward-post-process-path", "tests.fakes.absurd_teacher.post_process_rewards"),
    *("--num-rollout", "8", "--save-interval", "1", "--max-skipped-steps", "2", "--lr-warmup-iters", "4"),
    *("--rollout-max-response-len", "16", "--eval-interval", "100", "--skip-eval-before-train"),
)


def test_steps_are_skipped_and_counted_and_too_many_in_a_row_end_the_run(
    data: dict[str, Path], teacher: ServerProcess, tmp_path: Path
) -> None:
    folder, saved = tmp_path / "run", tmp_path / "run" / "checkpoints"
    flags = (*FLAGS, "--save", str(saved))
    with running(arguments(data, teacher.url, folder, *flags), folder) as job:
        assert job.wait() == 1
        console = job.console
        job.assert_nothing_left()
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rollouts = [record for record in records if "loss" in record]
    assert [record["rollout_id"] for record in rollouts] == [0, 1, 2, 3, 4]
    assert [record["skipped_steps"] for record in rollouts] == [float(n in PLANTED) for n in range(5)]
    assert [record["step"] for record in rollouts] == [1, 1, 2, 2, 2]
    assert [record["lr"] for record in rollouts] == [3e-4 * step / 4 for step in (1, 2, 2, 3, 3)]
    for record in rollouts:
        assert (record["grad_norm"] is None) == (record["rollout_id"] in PLANTED), "null stands for infinity"
        assert record["train_rollout_logprob_abs_diff"] < 1e-3, "the engine has the weights of the trainer"
    assert console.count("Warning: an optimizer step was skipped. rollout ") == 3
    error = console[console.rindex("2 optimizer steps in a row were skipped (--max-skipped-steps 2)") :]
    for rollout_id in (3, 4):
        assert f"rollout {rollout_id}, optimizer step 0 (weight version 2): the gradient norm is inf" in error
        assert f"worst first: {8 * rollout_id} (group {4 * rollout_id}): 3e+38 nats apart" in error
    assert f"The last checkpoint is {saved / 'rollout-000004'};" in error
    assert "Traceback" not in console
