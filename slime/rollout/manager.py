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
from slime.engines.client import EngineClient
from slime.engines.model_facts import model_facts
from slime.evaluation import evaluate
from slime.rollout.generate import GenerateFunction, Sampler, generate
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

if TYPE_CHECKING:
    from slime.arguments import Args

ENGINE_REMEDY = "Is the student's engine running? Look at its log in the run's output folder."

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
        self._engines = EngineClient(
            engine_urls,
            role="student engine",
            remedy=ENGINE_REMEDY,
            concurrency=args.rollout_concurrency,
            timeout=args.request_timeout,
        )
        self._teacher: EngineClient | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rollout-loop", daemon=True)
        self._thread.start()

    def generate(self, rollout_id: int) -> RolloutBatch:
        """Sample and score the next `--rollout-batch-size` prompts, and record what came of them where that
        is asked for.

        Raises:
            EngineError: an engine or the teacher failed; retries are over.
            RecordingError: a sample holds what cannot be recorded.
        """
        batch = self._run(self._generate(rollout_id))
        return batch if self._recordings is None else self._recorded(self._recordings, rollout_id, batch)

    def evaluate(self, rollout_id: int, who: Literal["student", "teacher"] = "student") -> dict[str, float]:
        """Return the held-out accuracy of the student's engines, or of the server at `--rm-url`."""
        return self._run(self._evaluate(who))

    def update_weights(self, path: str, version: str) -> None:
        """Load the checkpoint folder at `path` into every engine, as `version`."""
        self._run(self._update_weights(path, version))

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the data, as plain data."""
        return self._source.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position that `state_dict` gave."""
        self._source.load_state_dict(state)

    def pictures(self, hashes: Iterable[str]) -> dict[str, bytes]:
        """Return the PNG bytes of pictures by their content hash."""
        return self._pictures.png(hashes)

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

    async def _update_weights(self, path: str, version: str) -> None:
        await self._engines.pause("retract")
        await self._engines.update_weights_from_disk(path, version)
        await self._engines.flush_cache()
        await self._engines.continue_()

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
