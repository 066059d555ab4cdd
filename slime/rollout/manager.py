"""The rollout side of a run behind plain synchronous methods: data, engines, judges, evaluation.

Owns an event loop in a thread; everything asynchronous happens there. Knows nothing of Ray or training.
"""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from collections.abc import Coroutine, Iterable
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from slime.data.picture_store import PictureStore
from slime.data.source import EvalSet, PromptSource
from slime.data.vocabulary import never_sampled
from slime.engines.api import sampling_params
from slime.engines.client import EngineClient
from slime.engines.control import STUDENT_REMEDY
from slime.engines.errors import EnginesLostError
from slime.engines.model_facts import model_facts
from slime.evaluation import evaluate
from slime.rollout.generate import GenerateFunction, Sampler, generate, generate_all
from slime.rollout.on_policy_distillation import REMEDY as TEACHER_REMEDY
from slime.rollout.on_policy_distillation import close_teacher_clients
from slime.rollout.recording.file import write_rollout
from slime.rollout.recording.head import Head
from slime.rollout.recording.places import recording_path
from slime.rollout.rewards import Rewards
from slime.rollout.rm_hub.grader import shared_grader
from slime.rollout.rollout import RolloutBatch, run_rollout
from slime.utils.misc import load_function
from slime.utils.processing_utils import load_processor
from slime.utils.types import Sample
from slime.weight_sync.probe import Probe, probe_sample

if TYPE_CHECKING:
    from slime.arguments import Args

PROBE_TOKENS = 16
"""Length of a response that is compared with the trainer's log-probs."""

T = TypeVar("T")


class RolloutManager:
    """Samples, scores and evaluates; keeps the position in the data. One per run."""

    def __init__(self, args: Args, engine_urls: list[str]) -> None:
        """Load processor and data. The engines need not answer yet."""
        self._args = args
        self._facts = model_facts(args.hf_checkpoint)
        self._processor = load_processor(args.hf_checkpoint)
        self._pictures = PictureStore()
        self._source = PromptSource(args, self._processor, self._pictures)
        self._eval_sets: list[EvalSet] = []
        self._banned = never_sampled(self._processor.tokenizer, self._facts.vocab_size)
        self._function = _generate_function(args)
        self._rewards = Rewards(args, self._facts)
        self._recordings = args.save_debug_rollout_data
        if self._recordings is not None:  # a folder that cannot be made is found out now
            recording_path(self._recordings, 0).parent.mkdir(parents=True, exist_ok=True)
        self._engines = self._engine_client(engine_urls)
        self._teacher: EngineClient | None = None
        self._version: str | None = None
        self._probe_sample: Sample | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rollout-loop", daemon=True)
        self._thread.start()

    def generate(self, rollout_id: int) -> RolloutBatch:
        """Sample and score the next `--rollout-batch-size` prompts, and record what came of them where that
        is asked for.

        Raises:
            EnginesLostError: no engine has the current weights any more. The position in the data is as
                before.
            EngineError: an engine or the teacher failed; retries are over.
            RecordingError: a sample holds what cannot be recorded.
        """
        position = self._source.state_dict()
        try:
            batch = self._run(self._generate(rollout_id))
        except EnginesLostError:  # the same prompts are asked for once more
            self._source.load_state_dict(position)
            raise
        return batch if self._recordings is None else self._recorded(self._recordings, rollout_id, batch)

    def evaluate(self, rollout_id: int, who: Literal["student", "teacher"] = "student") -> dict[str, float]:
        """Return the held-out accuracy of the student's engines, or of the server at `--rm-url`."""
        return self._run(self._evaluate(who))

    def expect_version(self, version: str) -> None:
        """Take no answer of an engine from now on but of the weights `version`."""
        self._version = version
        self._run(self._engines.expect(version))

    def probe(self) -> Probe:
        """Let every engine answer one prompt, always the same: its picture is one that they have seen."""
        sample = self._probe_sample or self._peek()
        self._probe_sample = sample
        answers = self._run(self._answers_of_all(sample))
        return Probe(
            urls=tuple(endpoint.base_url for endpoint in self._engines.endpoints),
            samples=tuple(probe_sample(answer) for answer in answers),
            pictures=self.pictures((sample.multimodal_train_inputs or {}).get("image_hashes", ())),
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the data, as plain data."""
        return self._source.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position that `state_dict` gave."""
        self._source.load_state_dict(state)

    def pictures(self, hashes: Iterable[str]) -> dict[str, bytes]:
        """Return the PNG bytes of pictures by their content hash."""
        return self._pictures.png(hashes)

    def _peek(self) -> Sample:
        """Return the sample that comes next; the position in the data stays."""
        position = self._source.state_dict()
        sample = self._source.next_groups(1)[0][0]
        self._source.load_state_dict(position)
        return sample

    @property
    def merge_size(self) -> int:
        """Side of the square of picture patches that becomes one token of the student."""
        return self._facts.merge_size

    def close(self) -> None:
        """Close the connections and end the loop's thread. A second call does nothing."""
        if not self._thread.is_alive():
            return
        self._run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _generate(self, rollout_id: int) -> RolloutBatch:
        timeouts, bad_rows = shared_grader().timeouts, self._source.bad_rows
        prepared, hits = self._pictures.prepared, self._pictures.hits
        groups = await asyncio.to_thread(self._source.next_groups, self._args.rollout_batch_size)
        batch = await run_rollout(
            self._args,
            rollout_id,
            groups,
            Sampler(self._writer(), self._facts),
            self._rewards,
            self._banned,
            self._function,
        )
        counts = {
            "rollout/bad_rows": float(self._source.bad_rows - bad_rows),
            "rollout/grader_timeouts": float(shared_grader().timeouts - timeouts),
            "data/pictures_prepared": float(self._pictures.prepared - prepared),
            "data/picture_cache_hits": float(self._pictures.hits - hits),
        }
        return dataclasses.replace(batch, metrics=batch.metrics | counts)

    def _recorded(self, place: str, rollout_id: int, batch: RolloutBatch) -> RolloutBatch:
        """Write the rollout to its file; return it with the time that this took."""
        start = time.perf_counter()
        head = Head(
            rollout_id=rollout_id,
            student=self._args.hf_checkpoint,
            model=dataclasses.asdict(self._facts),
            arguments=self._args.as_dict(),
            metrics=batch.metrics,
            data_position=self.state_dict(),
        )
        pictures = self.pictures(batch.image_hashes())
        write_rollout(recording_path(place, rollout_id), head, batch.samples, pictures)
        seconds = {"perf/record_seconds": time.perf_counter() - start}
        return dataclasses.replace(batch, metrics=batch.metrics | seconds)

    def _writer(self) -> EngineClient:
        """Return who answers the training prompts (`--sample-from`)."""
        if self._args.sample_from == "student":
            return self._engines
        if self._teacher is None:
            self._teacher = self._teacher_client()
        return self._teacher

    def _engine_client(self, urls: list[str]) -> EngineClient:
        """Return a client of student engines."""
        return EngineClient(
            urls,
            role="student engine",
            remedy=STUDENT_REMEDY,
            concurrency=self._args.rollout_concurrency,
            timeout=self._args.request_timeout,
        )

    def _teacher_client(self) -> EngineClient:
        """Return a client that lets the teacher's servers write."""
        return EngineClient(
            self._args.teacher_urls,
            role="teacher",
            remedy=TEACHER_REMEDY,
            concurrency=self._args.teacher_concurrency,
            timeout=self._args.request_timeout,
            patience=self._args.teacher_patience,
        )

    async def _evaluate(self, who: Literal["student", "teacher"]) -> dict[str, float]:
        sets = await asyncio.to_thread(self._eval_samples)
        if who == "student":
            return await self._answer(sets, self._engines)
        if not self._args.teacher_urls:
            raise ValueError("the teacher's accuracy is asked for and no --rm-url names its server.")
        async with self._teacher_client() as teacher:
            return await self._answer(sets, teacher)

    async def _answer(self, sets: dict[str, list[Sample]], client: EngineClient) -> dict[str, float]:
        return await evaluate(self._args, sets, Sampler(client, self._facts), self._banned, self._function)

    def _eval_samples(self) -> dict[str, list[Sample]]:
        if not self._eval_sets:
            self._eval_sets = [
                EvalSet(name, path, self._args, self._processor, self._pictures)
                for name, path in self._args.eval_sets
            ]
        if not self._eval_sets:
            raise ValueError("an evaluation is asked for and there is no --eval-prompt-data NAME PATH.")
        return {eval_set.name: eval_set.samples() for eval_set in self._eval_sets}

    async def _answers_of_all(self, sample: Sample) -> list[Sample]:
        """Return a short answer of each engine."""
        params = sampling_params(max_new_tokens=PROBE_TOKENS, temperature=1.0, banned_ids=self._banned)

        async def nothing(_: Sample) -> None:
            pass

        answers = []
        for endpoint in self._engines.endpoints:
            async with self._engine_client([endpoint.generate_url]) as client:
                if self._version is not None:
                    await client.expect(self._version)
                answers += await generate_all(
                    self._args,
                    [dataclasses.replace(sample)],
                    params,
                    Sampler(client, self._facts),
                    label="probe",
                    seed_label="probe",
                    after=nothing,
                )
        return answers

    async def _close(self) -> None:
        await self._engines.close()
        if self._teacher is not None:
            await self._teacher.close()
        await close_teacher_clients()

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run on the loop and wait; an interrupt (Ctrl-C) cancels it."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise


def _generate_function(args: Args) -> GenerateFunction:
    path = args.custom_generate_function_path
    return generate if path is None else load_function(path, "--custom-generate-function-path")
