"""From a checked request to its jobs, and from jobs to answers: the event-loop side of `/generate`."""

import asyncio
import random
from collections.abc import AsyncGenerator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from slime.engines.transformers_engine.answers import AnswerWriter
from slime.engines.transformers_engine.batcher import Batcher
from slime.engines.transformers_engine.errors import InvalidValue
from slime.engines.transformers_engine.images import ImageLoader, Pixels
from slime.engines.transformers_engine.job import Job
from slime.engines.transformers_engine.prompt import Prompt, VisionTokens, build_prompt, tokenize
from slime.engines.transformers_engine.request import GenerateBody, Item

RESERVED_TOKENS = 6
"""How much shorter than the context a prompt must be, as on the real server."""
COPY_SEED_STEP = 0x9E3779B97F4A7C1


@dataclass(frozen=True)
class Limits:
    """What a prompt is checked against."""

    context_length: int
    eos_ids: frozenset[int]


class Generator:
    """Prepares jobs, hands them to the batcher, and waits for them."""

    def __init__(
        self,
        batcher: Batcher,
        tokenizer: Any,
        images: ImageLoader,
        vision: VisionTokens,
        writer: AnswerWriter,
        limits: Limits,
        seed: int,
    ):
        self._batcher = batcher
        self._tokenizer = tokenizer
        self._images = images
        self._vision = vision
        self._writer = writer
        self._limits = limits
        self._random = random.Random(seed)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="images")
        self._live: dict[str, Job] = {}

    @property
    def in_flight(self) -> int:
        """Number of jobs that are not answered yet."""
        return len(self._live)

    def close(self) -> None:
        """End the image thread."""
        self._pool.shutdown(cancel_futures=True)

    def abort(self, rid: str | None) -> None:
        """Abort all live jobs (None), or a live one and those whose ids begin with its id."""
        if rid is None:
            self._batcher.cancel(list(self._live.values()))
        elif rid in self._live:
            self._batcher.cancel([job for name, job in self._live.items() if name.startswith(rid)])

    async def answer(self, body: GenerateBody, received: float) -> Any:
        """Run a request and return its answer: an object, or a list for a batch or n > 1."""
        jobs, waiters = await self._prepare(body)
        with self._registered(jobs):
            self._batcher.submit(jobs)
            await asyncio.gather(*(waiter.wait() for waiter in waiters))
        answers = [self._write(job, body, received) for job in jobs]
        return answers if body.is_list else answers[0]

    async def stream(self, body: GenerateBody, received: float) -> AsyncGenerator[dict[str, Any], None]:
        """Yield cumulative answers as tokens come; batch answers carry their `index`."""
        jobs, waiters = await self._prepare(body)
        updates: asyncio.Queue[tuple[int, Job]] = asyncio.Queue()
        for index, waiter in enumerate(waiters):
            waiter.forward_to(updates, index)
        with self._registered(jobs):
            self._batcher.submit(jobs)
            left = len(jobs)
            while left:
                index, job = await updates.get()
                left -= job.done
                answer = self._write(job, body, received)
                yield answer | {"index": index} if body.is_list else answer

    def _write(self, job: Job, body: GenerateBody, received: float) -> dict[str, Any]:
        if job.error is not None:
            raise job.error
        return self._writer.answer(
            job,
            weight_version=self._batcher.weight_version,
            received=received,
            prompt_token_ids=body.prompt_token_ids,
        )

    @contextmanager
    def _registered(self, jobs: Sequence[Job]) -> Iterator[None]:
        """Keep jobs abortable while they run; a client that goes away aborts them."""
        for job in jobs:
            if job.rid in self._live:
                raise InvalidValue(f"Duplicate request ID detected: {job.rid}")
        self._live |= {job.rid: job for job in jobs}
        try:
            yield
        finally:
            for job in jobs:
                del self._live[job.rid]
            unfinished = [job for job in jobs if not job.done]
            if unfinished:
                self._batcher.cancel(unfinished)

    async def _prepare(self, body: GenerateBody) -> tuple[list[Job], list["Waiter"]]:
        """Make the jobs of a request; the batcher knows meanwhile that they are coming."""
        loop = asyncio.get_running_loop()
        self._batcher.announce(1)
        try:
            prompts: dict[int, Prompt] = {}
            jobs, waiters = [], []
            for item in body.items:
                if item.prompt_index not in prompts:
                    prompts[item.prompt_index] = await self._build_prompt(item)
                waiters.append(Waiter(loop))
                jobs.append(self._build_job(item, prompts[item.prompt_index], waiters[-1], body.stream))
            return jobs, waiters
        finally:
            self._batcher.announce(-1)

    async def _build_prompt(self, item: Item) -> Prompt:
        images = await self._load_images(item.images)
        if item.text is not None and (item.ids is None or images):
            ids = tokenize(item.text, len(images), self._tokenizer, self._vision)
        else:
            assert item.ids is not None
            ids = item.ids
        if not ids:
            raise InvalidValue("text has no tokens: send a prompt.")
        # Checked before the expansion too: a hopeless length should not be laid out first.
        self._check_length(len(ids), item)
        prompt = build_prompt(ids, images, self._vision)
        self._check_length(prompt.length, item)
        if item.logprobs.wanted and item.logprobs.start > prompt.length:
            raise InvalidValue(
                f"req.logprob_start_len={item.logprobs.start} is higher than the number of input tokens "
                f"len(req.origin_input_ids)={prompt.length}. Please use a smaller logprob_start_len."
            )
        return prompt

    async def _load_images(self, sources: tuple[str, ...]) -> list[Pixels]:
        loop = asyncio.get_running_loop()
        return [
            self._images.recent(source) or await loop.run_in_executor(self._pool, self._images.load, source)
            for source in sources
        ]

    def _check_length(self, length: int, item: Item) -> None:
        context, wanted = self._limits.context_length, item.params.max_new_tokens or 0
        if length >= context:
            raise InvalidValue(
                f"The input ({length} tokens) is longer than the model's context length ({context} tokens)."
            )
        if length + wanted > context:
            raise InvalidValue(
                f"Requested token count exceeds the model's maximum context length of {context} tokens. "
                f"You requested a total of {length + wanted} tokens: {length} tokens from the input messages "
                f"and {wanted} tokens for the completion. Please reduce the number of tokens in the input "
                "messages or the completion to fit within the limit."
            )
        if length >= context - RESERVED_TOKENS:
            raise InvalidValue(
                f"Input length ({length} tokens) exceeds the maximum allowed length "
                f"({context - RESERVED_TOKENS} tokens). Use a shorter input."
            )

    def _build_job(self, item: Item, prompt: Prompt, waiter: "Waiter", stream: bool) -> Job:
        params = item.params
        room = self._limits.context_length - prompt.length - 1
        max_tokens = room if params.max_new_tokens is None else min(params.max_new_tokens, room)
        seed = self._random.getrandbits(63) if params.sampling_seed is None else params.sampling_seed
        # The n samples of one prompt differ though they share a seed; the first is the lone request's.
        seed = (seed + item.copy * COPY_SEED_STEP + 2**63) % 2**64 - 2**63
        eos = () if params.ignore_eos else self._limits.eos_ids
        return Job(
            rid=item.rid,
            prompt=prompt,
            params=params,
            logprobs=item.logprobs,
            seed=seed,
            stop_ids=tuple(sorted({*params.stop_token_ids, *eos})),
            max_tokens=max_tokens,
            notify=waiter.notify,
            stream=stream,
        )


class Waiter:
    """Carries one job's news from the model thread to the event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = loop
        self._done = asyncio.Event()
        self._updates: asyncio.Queue[tuple[int, Job]] | None = None
        self._index = 0

    def forward_to(self, updates: "asyncio.Queue[tuple[int, Job]]", index: int) -> None:
        """Send every state of the job to a queue, instead of only its end."""
        self._updates, self._index = updates, index

    def notify(self, job: Job) -> None:
        """Take note of a job's state; called in the model thread."""
        if self._updates is None:
            self._loop.call_soon_threadsafe(self._done.set)
        elif job.done or len(job.output_ids) % job.params.stream_interval == 0:
            self._loop.call_soon_threadsafe(self._updates.put_nowait, (self._index, job.snapshot()))

    async def wait(self) -> None:
        """Return when the job has ended."""
        await self._done.wait()
