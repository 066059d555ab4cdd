"""One scored batch of the main job without a GPU, made without servers.

Prompts and pictures are generated as the job's are, and come through its prompt source; the responses are the
solutions, every second one with wrong numbers; the shipped teacher scores them on the CPU.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from scripts.checks.gpu.setting import CPU, backend_on
from slime.arguments import Args, parse_args
from slime.backends.batching import MicroBatchBuilder, TrainSample
from slime.backends.fsdp.backend import FsdpBackend
from slime.data.picture_store import PictureStore
from slime.data.source import PromptSource
from slime.data.vocabulary import never_sampled
from slime.engines.model_facts import model_facts
from slime.tiny.geometry import GEOMETRY
from slime.tiny.paths import checkpoint_path
from slime.utils.processing_utils import load_processor
from slime.utils.types import Sample, SampleStatus

PROMPTS, SAMPLES_PER_PROMPT = 6, 2
LINEAR_STEP = ("--lr", "1", "--adam-eps", "1", "--adam-beta1", "0", "--adam-beta2", "0")
"""AdamW moves a weight by g / (|g| + 1): a gap in the step is the gradient's gap. The usual one divides by
|g|, and would blow up gaps where the gradient is next to nothing."""
WRONG = str.maketrans("128", "739")
"""Makes a solution wrong."""


@dataclass(frozen=True)
class ScoredBatch:
    """The samples of one rollout, and their pictures by content hash."""

    samples: list[Sample]
    pictures: dict[str, bytes]


def job_args(checkpoint: Path | str, data: Path, *flags: str, prompts: int = PROMPTS) -> Args:
    """Return the arguments of the main job with the task's reward beside the teacher's scores."""
    return parse_args(
        [
            *("--hf-checkpoint", str(checkpoint), "--prompt-data", str(data), "--num-rollout", "10"),
            *("--input-key", "problem", "--label-key", "answer", "--multimodal-keys", '{"image": "images"}'),
            *("--apply-chat-template", "--rollout-max-response-len", "64"),
            *("--rollout-batch-size", str(prompts), "--n-samples-per-prompt", str(SAMPLES_PER_PROMPT)),
            *("--use-opd", "--opd-type", "sglang", "--rm-url", "http://127.0.0.1:1/generate"),
            *("--custom-rm-path", "examples.opd_vlm.opd_vlm_reward.reward_func"),
            "--custom-reward-post-process-path",
            "examples.opd_vlm.opd_vlm_reward.post_process_rewards",
            *("--rm-type", "math", "--task-reward-weight", "0.5", "--calculate-per-token-loss"),
            *("--use-dynamic-batch-size", "--max-tokens-per-gpu", "512", "--train-threads", "1"),
            *flags,
        ]
    )


def masked_ids(checkpoint: Path | str) -> tuple[int, ...]:
    """Return the ids that the student never samples."""
    facts = model_facts(str(checkpoint))
    return never_sampled(load_processor(checkpoint).tokenizer, facts.vocab_size)


def write_prompts(scratch: Path) -> Path:
    """Write the prompts' rows, the same at every call."""
    problems = list(islice(GEOMETRY.stream(random.Random(0), set()), PROMPTS))
    path = scratch / "prompts.parquet"
    pq.write_table(pa.table(GEOMETRY.columns(problems), schema=GEOMETRY.schema), path)
    return path


def scored_batch(scratch: Path) -> ScoredBatch:
    """Make the batch; its prompts are written below `scratch`."""
    data = write_prompts(scratch)
    student, teacher = checkpoint_path("student"), checkpoint_path("teacher")
    batch = prompts_of(job_args(student, data))
    solutions = pq.read_table(data)["solution"].to_pylist()
    for number, sample in enumerate(batch.samples):
        solution, right = solutions[number // SAMPLES_PER_PROMPT], number % SAMPLES_PER_PROMPT == 0
        _answer(sample, solution if right else solution.translate(WRONG), student, right=right)
    for checkpoint in (student, teacher):
        args = job_args(checkpoint, data, "--train-dtype", "float32")
        with backend_on(CPU, args, masked_ids(checkpoint)) as backend:
            scores = log_probs_of(backend, checkpoint, batch)
        for sample, log_probs in zip(batch.samples, scores, strict=True):
            if checkpoint == teacher:
                sample.teacher_log_probs = log_probs
            else:
                sample.rollout_log_probs = log_probs.tolist()
    return batch


def prompts_of(args: Args) -> ScoredBatch:
    """Return the samples of one rollout without responses, and their pictures."""
    store = PictureStore()
    groups = PromptSource(args, load_processor(args.hf_checkpoint), store).next_groups(
        args.rollout_batch_size
    )
    samples = [sample for group in groups for sample in group]
    hashes = {name for sample in samples for name in (sample.multimodal_train_inputs or {})["image_hashes"]}
    return ScoredBatch(samples, store.png(hashes))


def log_probs_of(backend: FsdpBackend, checkpoint: Path | str, batch: ScoredBatch) -> list[Tensor]:
    """Return the trainer's log-probs [R] of each sample's response, all samples in one micro-batch."""
    lengths = [sample.response_length for sample in batch.samples]
    builder = MicroBatchBuilder(load_processor(checkpoint), batch.pictures)
    [flat] = backend.compute_log_probs([builder.build([_unscored(sample) for sample in batch.samples])])
    return list(flat.split(lengths))


def _answer(sample: Sample, text: str, checkpoint: Path, *, right: bool) -> None:
    """Let a sample end with a response as a rollout leaves it, graded."""
    tokenizer = load_processor(checkpoint).tokenizer
    response = [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    sample.tokens = sample.tokens + response
    sample.response, sample.response_length = text, len(response)
    sample.status = SampleStatus.COMPLETED
    sample.metadata |= {"task_reward": float(right), "train_reward": 0.0, "raw_reward": float(right)}


def _unscored(sample: Sample) -> TrainSample:
    inputs = sample.multimodal_train_inputs or {}
    return TrainSample(
        index=sample.index or 0,
        tokens=torch.tensor(sample.tokens),
        response_length=sample.response_length,
        loss_mask=torch.ones(sample.response_length),
        advantages=torch.zeros(sample.response_length),
        image_hashes=tuple(inputs["image_hashes"]),
        image_grid_thw=tuple(tuple(grid) for grid in inputs["image_grid_thw"]),
    )
