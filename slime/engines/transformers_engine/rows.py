"""The running batch: a dense table of rows (job, counters, parameters) in the order of the KV cache."""

from collections.abc import Sequence

import torch
from torch import Tensor

from slime.engines.transformers_engine.job import Job
from slime.engines.transformers_engine.kv_cache import KVCache
from slime.engines.transformers_engine.sampling import Penalties, SamplingBatch

LENGTH, POSITION, LAST, STEP, SEED, TOP_K = range(6)
TEMPERATURE, TOP_P, MIN_P = range(3)


class Rows:
    """Up to `capacity` running jobs; rows 0..B-1 are in use. A row that ends is filled by the last one."""

    def __init__(self, capacity: int, cache: KVCache, device: torch.device):
        self.jobs: list[Job] = []
        self.cache = cache
        self._device = device
        self._ints = torch.zeros(capacity, 6, dtype=torch.int64, device=device)
        self._floats = torch.zeros(capacity, 3, dtype=torch.float32, device=device)
        self._lengths: list[int] = []
        self._batches: dict[int, SamplingBatch] = {}

    def __len__(self) -> int:
        return len(self.jobs)

    @property
    def longest(self) -> int:
        """Length of the longest row's past."""
        return max(self._lengths)

    @property
    def last_tokens(self) -> Tensor:
        """The newest token of each row, `[B]`; it is not in the cache yet."""
        return self._ints[: len(self), LAST]

    @property
    def positions(self) -> Tensor:
        """mRoPE position of each row's newest token, `[B]`."""
        return self._ints[: len(self), POSITION]

    @property
    def lengths(self) -> Tensor:
        """Tokens of each row in the cache, `[B]`."""
        return self._ints[: len(self), LENGTH]

    def add(self, jobs: Sequence[Job], cached: Sequence[int]) -> None:
        """Append rows for `jobs`, whose prefills put `cached` tokens in the cache."""
        first, last = len(self), len(self) + len(jobs)
        ints, floats = [], []
        for job, length in zip(jobs, cached, strict=True):
            params, produced = job.params, len(job.output_ids)
            # One behind: `record` moves it to the token that it adds.
            position = job.prompt.next_position + produced - 1
            ints.append([length, position, 0, produced, job.seed, params.top_k])
            floats.append([params.temperature, params.top_p, params.min_p])
        self._ints[first:last] = torch.tensor(ints, device=self._device)
        self._floats[first:last] = torch.tensor(floats, device=self._device)
        self.jobs.extend(jobs)
        self._lengths.extend(cached)
        self._batches.clear()

    def count_cached_token(self) -> None:
        """Note that a decode put every row's newest token into the cache."""
        self._ints[: len(self), LENGTH] += 1
        self._lengths = [length + 1 for length in self._lengths]

    def record(self, first: int, tokens: Tensor) -> None:
        """Make `tokens` the newest ones of rows `first..B-1`."""
        chosen = self._ints[first : len(self)]
        chosen[:, LAST] = tokens
        chosen[:, POSITION] += 1
        chosen[:, STEP] += 1

    def remove(self, rows: Sequence[int]) -> list[Job]:
        """Take rows out and return their jobs; the last rows move into the gaps."""
        gone = set(rows)
        keep = len(self) - len(gone)
        sources = [row for row in range(keep, len(self)) if row not in gone]
        targets = [row for row in sorted(gone) if row < keep]
        removed = [self.jobs[row] for row in rows]
        if sources:
            source, target = (torch.tensor(part, device=self._device) for part in (sources, targets))
            self._ints[target] = self._ints[source]
            self._floats[target] = self._floats[source]
            self.cache.move(source, target)
            for old, new in zip(sources, targets, strict=True):
                self.jobs[new], self._lengths[new] = self.jobs[old], self._lengths[old]
        del self.jobs[keep:], self._lengths[keep:]
        self._batches.clear()
        return removed

    def sampling_batch(self, first: int) -> SamplingBatch:
        """Parameters of rows `first..B-1`; built anew only when rows came or went."""
        if first not in self._batches:
            self._batches[first] = self._build_batch(first)
        batch = self._batches[first]
        penalised = [row for row, job in enumerate(self.jobs[first:]) if job.params.penalised]
        batch.penalties = self._penalties(penalised, first) if penalised else None
        return batch

    def _build_batch(self, first: int) -> SamplingBatch:
        jobs = self.jobs[first:]
        ints, floats = self._ints[first : len(self)], self._floats[first : len(self)]
        params = [job.params for job in jobs]
        filtered = any(not p.greedy and (p.top_k > 0 or p.top_p < 1 or p.min_p > 0) for p in params)
        bias = [(row, id_, value) for row, p in enumerate(params) for id_, value in p.logit_bias.items()]
        forbidden = [
            (row, id_, job.params.min_new_tokens)
            for row, job in enumerate(jobs)
            if job.params.min_new_tokens > 0
            for id_ in job.stop_ids
        ]
        return SamplingBatch(
            seeds=ints[:, SEED],
            steps=ints[:, STEP],
            temperature=floats[:, TEMPERATURE],
            greedy=ints[:, TOP_K] == 1,
            all_greedy=all(p.greedy for p in params),
            filters=(ints[:, TOP_K], floats[:, TOP_P], floats[:, MIN_P]) if filtered else None,
            bias=self._columns(bias, torch.float32),
            forbidden=self._columns(forbidden, torch.int64),
            penalties=None,
        )

    def _penalties(self, rows: list[int], first: int) -> Penalties:
        params = [self.jobs[row + first].params for row in rows]
        outputs = [self.jobs[row + first].output_ids for row in rows]
        longest = max(1, *map(len, outputs))

        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=self._device)

        return Penalties(
            rows=torch.tensor(rows, device=self._device),
            history=torch.tensor([ids + [0] * (longest - len(ids)) for ids in outputs], device=self._device),
            lengths=torch.tensor([len(ids) for ids in outputs], device=self._device),
            frequency=column([p.frequency_penalty for p in params]),
            presence=column([p.presence_penalty for p in params]),
            repetition=column([p.repetition_penalty for p in params]),
        )

    def _columns(
        self, entries: Sequence[tuple[int, int, float]], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        if not entries:
            return None
        rows, ids, values = zip(*entries, strict=True)
        return (
            torch.tensor(rows, device=self._device),
            torch.tensor(ids, device=self._device),
            torch.tensor(values, dtype=dtype, device=self._device),
        )
