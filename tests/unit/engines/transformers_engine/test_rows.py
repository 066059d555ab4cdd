"""The table of rows and its cache stay in step when rows come and go."""

import torch

from slime.engines.transformers_engine.kv_cache import KVCache
from slime.engines.transformers_engine.rows import Rows
from tests.unit.engines.transformers_engine.support import TEXT_PROMPT, make_job


def test_gaps_are_filled_by_the_last_rows():
    cache = KVCache(layers=1, kv_heads=1, head_dim=2, dtype=torch.float32, device=torch.device("cpu"))
    rows = Rows(8, cache, torch.device("cpu"))
    jobs = [make_job(TEXT_PROMPT, sampling_seed=seed, temperature=1 + seed / 10) for seed in range(6)]
    cache.reserve(6, 10)
    states = torch.arange(6.0).reshape(6, 1, 1, 1).expand(6, 1, 10, 2)
    cache.write(0, [states], [states], torch.arange(6))
    rows.add(jobs, [4, 5, 6, 7, 8, 9])
    rows.record(0, torch.arange(6) + 100)
    assert rows.remove([4, 0, 2]) == [jobs[4], jobs[0], jobs[2]]
    left = [jobs.index(job) for job in rows.jobs]
    assert sorted(left) == [1, 3, 5]
    assert rows.last_tokens.tolist() == [100 + index for index in left]
    assert rows.lengths.tolist() == [4 + index for index in left]
    assert cache.keys[0][:3, 0, 0, 0].tolist() == left
    batch = rows.sampling_batch(0)
    assert batch.seeds.tolist() == left
    assert rows.longest == 9
    assert rows.remove(range(3)) == [jobs[index] for index in left]
    assert len(rows) == 0


def test_the_cache_keeps_its_content_when_it_grows():
    cache = KVCache(layers=2, kv_heads=1, head_dim=2, dtype=torch.float32, device=torch.device("cpu"))
    cache.reserve(2, 5)
    states = torch.randn(2, 1, 5, 2)
    cache.write(0, [states, states], [states, -states], torch.tensor([1, 0]))
    cache.reserve(9, 500)
    assert cache.rows >= 9
    assert cache.length >= 500
    assert torch.equal(cache.keys[1][:2, :, :5], states[[1, 0]])
    assert torch.equal(cache.values[1][:2, :, :5], -states[[1, 0]])
