"""Steps of the batch: who runs with whom changes no answer beyond rounding, and no forward is wasted."""

import random
from typing import Any

import pytest

from slime.engines.transformers_engine.job import Job, PositionLogprobs
from tests.unit.engines.transformers_engine.support import (
    PICTURE_PROMPT,
    TEXT_PROMPT,
    load_model,
    make_job,
    make_stepper,
    run,
)


def mixed_jobs(count: int, **params) -> list[Job]:
    """Jobs of several lengths, seeds and pictures."""
    jobs = []
    for index in range(count):
        more = [50 + index % 30] * (index % 6)
        limit: dict[str, Any] = {"max_new_tokens": 10 + index % 7, "sampling_seed": index} | params
        body = {"return_logprob": True, "logprob_start_len": 0}
        if index % 3:
            jobs.append(make_job(PICTURE_PROMPT + more, picture=index % 4, body=body, **limit))
        else:
            jobs.append(make_job(TEXT_PROMPT + more, body=body, **limit))
    return jobs


def prompt_side(job: Job) -> PositionLogprobs:
    """The job's prompt log-probs, which it must have."""
    assert job.input is not None
    return job.input


def test_batched_answers_equal_lone_ones():
    together = mixed_jobs(16)
    run(make_stepper(), together)
    for alone, batched in zip(mixed_jobs(16), together, strict=True):
        run(make_stepper(), [alone])
        assert alone.output_ids == batched.output_ids
        assert alone.output.values == pytest.approx(batched.output.values, abs=1e-5)
        assert prompt_side(alone).values == pytest.approx(prompt_side(batched).values, abs=1e-5)


def test_a_batch_costs_the_decodes_of_its_longest_response():
    counts = load_model().counts
    before = counts.decode_forwards
    jobs = mixed_jobs(40)
    run(make_stepper(), jobs)
    assert counts.decode_forwards - before == max(len(job.output_ids) for job in jobs) - 1


def test_a_late_job_joins_at_the_next_step_and_a_finished_row_leaves():
    stepper = make_stepper()
    early = make_job(TEXT_PROMPT, max_new_tokens=12, sampling_seed=3)
    run_until(stepper, [early], tokens=5)
    late = make_job(PICTURE_PROMPT, picture=1, max_new_tokens=3, sampling_seed=4)
    late.use_version("v1")
    stepper.waiting.add(late)
    stepper.step()
    assert (len(early.output_ids), len(late.output_ids)) == (6, 2)
    stepper.step()
    assert late.finish_reason == {"type": "length", "length": 3}
    assert stepper.rows.jobs == [early]
    run(stepper)
    assert early.output_ids == lone(make_job(TEXT_PROMPT, max_new_tokens=12, sampling_seed=3))


def run_until(stepper, jobs, tokens):
    """Step until the first job has that many tokens."""
    for job in jobs:
        job.use_version("v1")
        stepper.waiting.add(job)
    while len(jobs[0].output_ids) < tokens:
        stepper.step()


def lone(job: Job) -> list[int]:
    run(make_stepper(), [job])
    return job.output_ids


def test_no_more_rows_run_than_allowed():
    stepper = make_stepper(max_running=3)
    jobs = mixed_jobs(8)
    for job in jobs:
        stepper.waiting.add(job)
    widest = 0
    while stepper.runnable():
        stepper.step()
        widest = max(widest, len(stepper.rows))
    assert widest == 3
    assert all(job.done for job in jobs)


def test_the_token_budget_bounds_the_rows_but_never_starves():
    longest = max(job.prompt.length + job.max_tokens for job in mixed_jobs(6))
    for budget, most in ((2 * longest, 2), (1, 1)):
        stepper = make_stepper(max_total_tokens=budget)
        jobs = mixed_jobs(6)
        for job in jobs:
            stepper.waiting.add(job)
        while stepper.runnable():
            stepper.step()
            assert len(stepper.rows) <= most
        assert all(job.done for job in jobs)


def test_a_small_prefill_budget_splits_batches_and_changes_nothing():
    small, large = mixed_jobs(9), mixed_jobs(9)
    run(make_stepper(max_prefill_tokens=40), small)
    run(make_stepper(), large)
    assert [job.output_ids for job in small] == [job.output_ids for job in large]


def test_equal_prompts_share_a_prefill_row_and_a_picture_one_vision_pass():
    counts = load_model().counts
    before = (counts.prefill_forwards, counts.prefill_tokens, counts.vision_images)
    jobs = [make_job(PICTURE_PROMPT, picture=9, max_new_tokens=4, sampling_seed=seed) for seed in range(8)]
    run(make_stepper(), jobs)
    assert counts.prefill_forwards - before[0] == 1
    assert counts.prefill_tokens - before[1] == jobs[0].prompt.length
    assert counts.vision_images - before[2] == 1
    assert len({tuple(job.output_ids) for job in jobs}) > 1


def test_scoring_gives_the_log_probs_of_sampling():
    sampled = make_job(PICTURE_PROMPT, picture=2, max_new_tokens=20, sampling_seed=8)
    run(make_stepper(), [sampled])
    body = {"return_logprob": True, "logprob_start_len": sampled.prompt.length - 1}
    assert 346 not in sampled.output_ids, "an image pad cannot be scored; take another seed"
    score = make_job(PICTURE_PROMPT + sampled.output_ids, picture=2, max_new_tokens=0, body=body)
    run(make_stepper(), [score])
    assert prompt_side(score).values == pytest.approx(sampled.output.values, abs=1e-5)


def test_a_retracted_row_goes_on_as_if_nothing_had_been():
    stepper = make_stepper()
    jobs = mixed_jobs(5)
    run_until(stepper, jobs, tokens=4)
    stepper.retract()
    assert len(stepper.rows) == 0
    run(stepper)
    undisturbed = mixed_jobs(5)
    run(make_stepper(), undisturbed)
    assert [job.output_ids for job in jobs] == [job.output_ids for job in undisturbed]
    assert [job.retractions for job in jobs] == [1] * 5


def test_cancelled_jobs_end_and_the_others_go_on():
    stepper = make_stepper(max_running=4)
    jobs = mixed_jobs(6)
    run_until(stepper, jobs, tokens=3)
    jobs[1].cancelled = jobs[5].cancelled = True
    stepper.end_cancelled()
    assert [(jobs[index].finish_reason or {}).get("type") for index in (1, 5)] == ["abort"] * 2
    run(stepper)
    undisturbed = mixed_jobs(6)
    run(make_stepper(), undisturbed)
    for index in (0, 2, 3, 4):
        assert jobs[index].output_ids == undisturbed[index].output_ids


def wave(count: int, shuffle: int) -> list[Job]:
    """One wave's jobs in another order of arrival."""
    jobs = []
    for index in range(count):
        place = {"wave": "w", "wave_size": count, "order": index}
        ids = PICTURE_PROMPT + [50 + index % 9] * (index % 5)
        limit = 6 + index % 11
        jobs.append(
            make_job(
                ids, picture=index % 3, max_new_tokens=limit, sampling_seed=index, custom_params=place,
                name=f"job-{shuffle}-{index}",
            )
        )  # fmt: skip
    random.Random(shuffle).shuffle(jobs)
    return jobs


def test_waves_repeat_bit_for_bit_in_any_order_of_arrival():
    results = []
    for shuffle in range(3):
        stepper = make_stepper(max_running=8, deterministic=True)
        jobs = wave(20, shuffle)
        if shuffle == 2:  # what ran before must not matter either
            run(stepper, [make_job(TEXT_PROMPT, max_new_tokens=30)])
        run(stepper, jobs)
        jobs.sort(key=lambda job: int(job.rid.rsplit("-", 1)[1]))
        results.append([(job.output_ids, job.output.values) for job in jobs])
    assert results[0] == results[1] == results[2]


def test_an_incomplete_wave_waits_while_others_are_served():
    stepper = make_stepper(deterministic=True)
    first, second = wave(2, 0)
    stepper.waiting.add(first)
    assert not stepper.runnable()
    score = make_job(TEXT_PROMPT, max_new_tokens=0)
    run(stepper, [score])
    assert score.done
    assert not first.done
    run(stepper, [second])
    assert first.done
    assert second.done


def test_alternatives_cover_prompt_and_output():
    body = {
        "return_logprob": True,
        "logprob_start_len": 2,
        "top_logprobs_num": 3,
        "token_ids_logprob": [7, 2],
    }
    job = make_job(TEXT_PROMPT, max_new_tokens=4, temperature=0, body=body)
    run(make_stepper(), [job])
    length = len(TEXT_PROMPT)
    assert len(prompt_side(job).top) == len(prompt_side(job).token_ids) == length - 3
    assert [row.ids[0] for row in job.output.top] == job.output_ids
    assert [row.ids.tolist() for row in job.output.token_ids] == [[7, 2]] * 4
    for row, value in zip(job.output.top, job.output.values, strict=True):
        assert row.values[0] == pytest.approx(value)
