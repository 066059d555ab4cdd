from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from slime.engines.errors import EnginesLostError, ScoreMismatchError
from slime.rollout.failures import TooManyFailedError
from slime.rollout.manager import RolloutManager
from tests.fakes.engine_server import FakeEngine, log_prob, serve
from tests.fakes.rollouts import facts, fake_engine, rollout_args, write_prompts


@pytest.fixture
def student() -> Iterator[FakeEngine]:
    with serve(fake_engine(responses=[[11, 12, 2], [13, 2]], texts=["\\boxed{4}", "\\boxed{5}"])) as fake:
        yield fake


@pytest.fixture
def teacher() -> Iterator[FakeEngine]:
    with serve(fake_engine()) as fake:
        yield fake


@pytest.fixture
def manager(tmp_path: Path, student: FakeEngine, teacher: FakeEngine) -> Iterator[RolloutManager]:
    made = make(tmp_path, student, teacher)
    yield made
    made.close()


def make(folder: Path, student: FakeEngine, teacher: FakeEngine, *flags: str) -> RolloutManager:
    data = str(write_prompts(folder))
    args = rollout_args(
        *("--rollout-concurrency", "2", "--eval-prompt-data", "held_out", data, *flags),
        data=data,
        rm_url=teacher.url + "/generate",
    )
    return RolloutManager(args, [student.url])


def test_the_teacher_may_write_the_responses(tmp_path: Path, student: FakeEngine) -> None:
    with serve(fake_engine(responses=[[11, 12, 2]], texts=["\\boxed{4}"])) as teacher:
        data = str(write_prompts(tmp_path))
        flags = ("--loss-type", "sft_loss", "--sample-from", "teacher")
        args = rollout_args(*flags, data=data, rm_url=teacher.url + "/generate", distill=False)
        manager = RolloutManager(args, [student.url])
        try:
            batch = manager.generate(0)
        finally:
            manager.close()
    assert [sample.response_tokens for sample in batch.samples] == [[11, 12, 2]] * 6
    assert all(sample.reward == 1.0 and sample.teacher_log_probs is None for sample in batch.samples)
    assert not student.bodies("/generate")
    assert len(teacher.bodies("/generate")) == 6, "nothing is scored"


def test_a_rollout_is_answered_scored_and_graded(
    manager: RolloutManager, student: FakeEngine, teacher: FakeEngine
) -> None:
    batch = manager.generate(0)
    assert [sample.index for sample in batch.samples] == list(range(6))
    assert [sample.group_index for sample in batch.samples] == [0, 0, 1, 1, 2, 2]
    for sample in batch.samples:
        prompt = len(sample.tokens) - sample.response_length - 1 + 6
        expected = [log_prob(token, prompt + n, 1) for n, token in enumerate(sample.response_tokens)]
        assert sample.teacher_log_probs is not None
        torch.testing.assert_close(sample.teacher_log_probs, torch.tensor(expected))
        assert sample.metadata["task_reward"] == float(sample.response_tokens == [11, 12, 2])
        assert sample.reward == 0.0
    assert len(student.bodies()) == len(teacher.bodies()) == 6


def test_the_next_rollout_takes_the_next_prompts(manager: RolloutManager) -> None:
    first, second = manager.generate(0), manager.generate(1)
    rows = [sample.metadata["data_row"] for batch in (first, second) for sample in batch.samples]
    assert len(set(rows)) == 6
    assert [sample.index for sample in second.samples] == list(range(6, 12))


def test_each_picture_is_prepared_once_for_prompts_and_evaluation(manager: RolloutManager) -> None:
    manager.evaluate(0)
    first, second = manager.generate(0), manager.generate(1)
    assert [batch.metrics["data/pictures_prepared"] for batch in (first, second)] == [0.0, 0.0]
    assert [batch.metrics["data/picture_cache_hits"] for batch in (first, second)] == [3.0, 3.0]


def test_metrics_are_floats_and_complete(manager: RolloutManager) -> None:
    batch = manager.generate(0)
    assert all(isinstance(value, float) for value in batch.metrics.values())
    grades = [sample.metadata["task_reward"] for sample in batch.samples]
    assert batch.metrics["reward"] == sum(grades) / 6
    assert batch.metrics["teacher/aligned_frac"] == 1.0
    assert batch.metrics["response_length_max"] == 3.0
    assert set(batch.metrics) >= {
        "response_length", "truncated_share", "rollout/failed_samples", "rollout/mixed_version_samples",
        "rollout/bad_rows", "rollout/grader_timeouts", "perf/generation_seconds", "perf/scoring_seconds",
        "perf/scoring_overlap_share", "perf/student_tokens_per_second", "perf/teacher_tokens_per_second",
    }  # fmt: skip


def test_scoring_begins_before_the_last_response_ends(
    manager: RolloutManager, student: FakeEngine, teacher: FakeEngine
) -> None:
    student.answer_when = lambda: len(student.bodies()) < 6 or len(teacher.bodies()) > 0
    batch = manager.generate(0)
    assert min(start for start, _ in teacher.generate_times) < max(end for _, end in student.generate_times)
    assert batch.metrics["perf/first_score_before_last_response"] == 1.0
    assert batch.metrics["perf/scoring_overlap_share"] > 0
    assert batch.metrics["perf/scoring_overlap_share"] + batch.metrics["perf/scoring_exposed_share"] == 1.0
    generation, scoring, rest = batch.spans
    assert [span.stage for span in batch.spans] == ["generation", "scoring", "post-processing"]
    assert generation.start < scoring.start < generation.start + generation.seconds
    assert scoring.seconds == batch.metrics["perf/scoring_seconds"]
    assert abs(scoring.start + scoring.seconds - rest.start) < 1e-3
    assert {span.facts["rollout_id"] for span in batch.spans} == {0}


def test_the_student_is_evaluated_without_the_teacher(
    manager: RolloutManager, student: FakeEngine, teacher: FakeEngine
) -> None:
    metrics = manager.evaluate(0)
    assert metrics["eval/held_out/samples"] == 6.0
    assert len(student.bodies()) == 6
    assert teacher.requests == []
    again = manager.evaluate(1)
    assert again["eval/accuracy"] == metrics["eval/accuracy"]


def test_the_teacher_answers_at_its_own_server(
    manager: RolloutManager, student: FakeEngine, teacher: FakeEngine
) -> None:
    metrics = manager.evaluate(0, "teacher")
    assert metrics["eval/accuracy"] == 1.0
    assert len(teacher.bodies("/generate")) == 6
    assert student.requests == []


def test_answers_of_other_weights_lose_the_rollout_and_not_its_prompts(
    manager: RolloutManager, student: FakeEngine
) -> None:
    student.version = "5"
    manager.expect_version("5")
    position = manager.state_dict()
    student.version = "default"
    with pytest.raises(EnginesLostError):
        manager.generate(0)
    assert manager.state_dict() == position
    student.version = "5"
    assert {version for sample in manager.generate(0).samples for version in sample.weight_versions} == {"5"}


def test_a_probe_asks_every_engine_the_same_prompt_and_moves_nothing(
    manager: RolloutManager, student: FakeEngine
) -> None:
    position = manager.state_dict()
    first = manager.probe()
    assert manager.state_dict() == position
    manager.generate(0)
    again = manager.probe()
    assert first.urls == again.urls == (student.url,)
    assert [sample.tokens.tolist() for sample in first.samples] == [
        sample.tokens.tolist() for sample in again.samples
    ]
    assert first.samples[0].rollout_log_probs is not None
    assert set(first.pictures) == set(first.samples[0].image_hashes) != set()


def test_placeholders_are_banned(manager: RolloutManager, student: FakeEngine) -> None:
    manager.generate(0)
    assert str(facts().image_token_id) in student.bodies()[0]["sampling_params"]["logit_bias"]


def test_pictures_and_position_can_be_asked_for(manager: RolloutManager) -> None:
    batch = manager.generate(0)
    train_inputs = batch.samples[0].multimodal_train_inputs
    assert train_inputs is not None
    (name,) = train_inputs["image_hashes"]
    assert manager.pictures([name])[name].startswith(b"\x89PNG")
    state = manager.state_dict()
    ahead = [sample.tokens for sample in manager.generate(1).samples]
    manager.load_state_dict(state)
    assert [sample.tokens for sample in manager.generate(1).samples] == ahead


def test_a_teacher_that_dies_ends_the_rollout(tmp_path: Path, student: FakeEngine) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        dead = fake_engine()
        dead.url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    manager = make(tmp_path, student, dead, "--teacher-patience", "0.5")
    with pytest.raises(TooManyFailedError, match=dead.url) as caught:
        manager.generate(0)
    assert "1 EngineUnreachableError" in str(caught.value)
    assert "Is the teacher running?" in str(caught.value)
    manager.close()


def test_a_score_of_other_tokens_ends_the_rollout(manager: RolloutManager, teacher: FakeEngine) -> None:
    teacher.fault = "shift"
    with pytest.raises(ScoreMismatchError):
        manager.generate(0)
    teacher.fault = None
    assert len(manager.generate(1).samples) == 6


def test_a_rollout_goes_on_without_the_samples_that_stay_within_the_budget(
    tmp_path: Path, student: FakeEngine, teacher: FakeEngine
) -> None:
    teacher.fault, teacher.fault_times = "400", 2
    manager = make(tmp_path, student, teacher, "--opd-max-failed-frac", "0.4")
    batch = manager.generate(0)
    manager.close()
    failed = [sample for sample in batch.samples if sample.status == "failed"]
    assert len(failed) == 2
    for sample in failed:
        assert "HTTP 400" in sample.metadata["error"]
        assert sample.loss_mask == [0] * sample.response_length
    assert batch.metrics["teacher/failed_samples"] == 2
    assert batch.metrics["teacher/misaligned_samples"] == 0
    assert batch.metrics["teacher/aligned_frac"] == pytest.approx(4 / 6)


def test_a_rollout_beyond_the_budget_ends_with_a_summary(
    tmp_path: Path, student: FakeEngine, teacher: FakeEngine
) -> None:
    teacher.fault, teacher.fault_times = "400", 3
    manager = make(tmp_path, student, teacher, "--opd-max-failed-frac", "0.4")
    with pytest.raises(
        TooManyFailedError,
        match=r"3 of the rollout's 6 samples.*3 HttpError.*longer than.*--opd-max-failed-frac 0\.4",
    ):
        manager.generate(0)
    manager.close()


def test_misaligned_scores_are_masked_where_that_is_asked_for(
    tmp_path: Path, student: FakeEngine, teacher: FakeEngine
) -> None:
    teacher.fault, teacher.fault_times = "shift", 1
    manager = make(tmp_path, student, teacher, "--opd-misaligned", "mask", "--opd-max-failed-frac", "0.5")
    batch = manager.generate(0)
    manager.close()
    assert batch.metrics["teacher/misaligned_samples"] == batch.metrics["teacher/failed_samples"] == 1
    (sample,) = [sample for sample in batch.samples if sample.status == "failed"]
    assert sample.metadata["error"].startswith("TokenMismatchError")


def test_two_servers_share_the_work_and_one_is_enough(tmp_path: Path, student: FakeEngine) -> None:
    with serve(fake_engine()) as one, serve(fake_engine()) as other:
        manager = make(tmp_path, student, one, "--rm-url", other.url + "/generate")
        manager.generate(0)
        assert one.bodies()
        assert other.bodies()
        one.fault = "reset"
        batch = manager.generate(1)
        manager.close()
    assert batch.metrics["teacher/aligned_frac"] == 1.0


def test_each_sample_has_its_own_teacher(tmp_path: Path, student: FakeEngine) -> None:
    rows = [json.loads(line) for line in write_prompts(tmp_path).read_text().splitlines()]
    for number, row in enumerate(rows):
        row["metadata"] = {"subject": ("algebra", "geometry")[number % 2]}
    data = tmp_path / "routed.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with serve(fake_engine()) as algebra, serve(fake_engine()) as geometry:
        teachers = (f"algebra={algebra.url}/generate", f"geometry={geometry.url}/generate")
        flags = ("--opd-teachers", *teachers, "--opd-teacher-key", "subject")
        manager = RolloutManager(rollout_args(*flags, data=str(data), rm_url=None), [student.url])
        batch = manager.generate(0)
        manager.close()
    assert [len(algebra.bodies()), len(geometry.bodies())] == [4, 2]
    assert batch.metrics["teacher/algebra/samples"] == 4
    assert batch.metrics["teacher/geometry/samples"] == 2
    gaps = [
        student_log_prob - teacher_log_prob
        for sample in batch.samples
        if sample.metadata["subject"] == "geometry" and sample.teacher_log_probs is not None
        for student_log_prob, teacher_log_prob in zip(
            sample.rollout_log_probs or [], sample.teacher_log_probs.tolist(), strict=True
        )
    ]
    assert batch.metrics["teacher/geometry/reverse_kl"] == pytest.approx(sum(gaps) / len(gaps))


def test_closing_twice_leaves_no_thread(manager: RolloutManager) -> None:
    loop_thread = manager._thread
    assert loop_thread in threading.enumerate()
    manager.close()
    manager.close()
    assert loop_thread not in threading.enumerate()


def test_a_custom_generate_function_is_called(
    tmp_path: Path, student: FakeEngine, teacher: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys
    import types

    from slime.rollout.generate import generate

    async def fail_odd(args: Any, sample: Any, sampling_params: dict[str, Any]) -> Any:
        if sample.index % 2:
            sample.status = sample.Status.FAILED
            return sample
        return await generate(args, sample, sampling_params)

    module = types.ModuleType("planted_generate")
    vars(module)["fail_odd"] = fail_odd
    monkeypatch.setitem(sys.modules, "planted_generate", module)
    manager = make(tmp_path, student, teacher, "--custom-generate-function-path", "planted_generate.fail_odd")
    batch = manager.generate(0)
    manager.close()
    assert batch.metrics["rollout/failed_samples"] == 3.0
    assert batch.metrics["teacher/aligned_frac"] == 0.5
    assert [sample.loss_mask for sample in batch.samples] == [None, [], None, [], None, []]
    assert len(teacher.bodies()) == 3
