"""Queues: fair by arrival, or complete waves in their order."""

from slime.engines.transformers_engine.waiting import ArrivalQueue, WaveQueue
from tests.unit.engines.transformers_engine.support import TEXT_PROMPT, make_job


def member(wave: str, size: int, order: int):
    place = {"wave": wave, "wave_size": size, "order": order}
    return make_job(TEXT_PROMPT, custom_params=place, max_new_tokens=3)


def test_scoring_batches_stay_within_the_padded_budget():
    queue = ArrivalQueue()
    jobs = [make_job(TEXT_PROMPT * times, max_new_tokens=0) for times in (1, 1, 5, 1)]
    for job in jobs:
        queue.add(job)
    length = len(TEXT_PROMPT)
    assert queue.take_scoring(2 * length) == jobs[:2]
    assert queue.take_scoring(2 * length) == [jobs[2]]  # too long for the budget, but never stuck
    assert queue.take_scoring(10 * length) == [jobs[3]]
    assert len(queue) == 0


def test_retracted_jobs_come_first_again():
    queue = ArrivalQueue()
    old, new = [make_job(TEXT_PROMPT) for _ in range(2)], make_job(TEXT_PROMPT)
    queue.add(new)
    queue.put_back(old)
    assert queue.take_generating(3, 0) == [*old, new]


def test_waves_run_one_at_a_time_in_their_order():
    queue = WaveQueue()
    late, early = member("a", 2, 7), member("a", 2, 3)
    other = member("b", 1, 0)
    lone = make_job(TEXT_PROMPT, max_new_tokens=3)
    for job in (late, lone, other):
        queue.add(job)
    assert queue.take_generating(9, 0) == [other]  # the one complete wave
    queue.add(early)
    assert queue.take_generating(9, 1) == []
    assert queue.take_generating(9, 0) == [early, late]
    assert queue.take_generating(9, 0) == [lone]
    assert not queue.runnable(0)


def test_an_incomplete_wave_expires_with_a_reason():
    queue = WaveQueue(patience=-1.0)
    job = member("a", 2, 0)
    queue.add(job)
    assert queue.expire() == [job]
    assert "1 of 2 requests arrived" in str(job.error)
    assert len(queue) == 0


def test_dropped_jobs_are_gone():
    queue = WaveQueue()
    jobs = [member("a", 2, 0), member("b", 1, 0), make_job(TEXT_PROMPT, max_new_tokens=0)]
    for job in jobs:
        queue.add(job)
    queue.drop(jobs)
    assert queue.jobs() == []
    assert not queue.runnable(0)
