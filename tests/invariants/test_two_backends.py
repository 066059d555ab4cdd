"""Two backends, one trainer: Megatron takes a batch of the main job to FSDP's metrics and weights, whatever
shares the model; and a checkpoint that it has loaded leaves it bit for bit.

Weights are compared after one step of an AdamW that moves them by g / (|g| + 1), so a gradient that differs
anywhere shows; gradient norms are among the metrics. All two-rank cases run in one start of two processes.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from slime.backends.batching import MicroBatchBuilder
from slime.skipping.account import MOST_SUSPECTS
from slime.tiny.paths import checkpoint_path
from slime.trainer import build_shards
from slime.utils.processing_utils import load_processor
from tests.fakes.tiny_model import make_samples, save_mixture_model, save_text_model, save_vision_model
from tests.fakes.training import (
    DISTILL,
    LINEAR_STEP,
    ONE_BATCH,
    Job,
    Outcome,
    joined_backend,
    make_args,
    train,
    train_on_ranks,
)

pytest.importorskip("megatron.core")

TOLERANCE = 2e-6
MASKED = (3, 4, 6, 7, 129)
"""Pictures' marks and one ordinary token, in both halves of the vocabulary."""
MEGATRON = ("--train-backend", "megatron")
INNER_TEACHER = ("--use-opd", "--opd-type", "megatron", *MEGATRON, "--rm-type", "math", "--opd-teacher-load")
TP2 = ("--tensor-model-parallel-size", "2")
SP = ("--sequence-parallel",)
PP2 = ("--pipeline-model-parallel-size", "2")
CP2 = ("--context-parallel-size", "2")
EP2 = ("--expert-model-parallel-size", "2", "--expert-tensor-parallel-size", "1")
SPLIT_EXPERTS = ("--expert-model-parallel-size", "2", "--expert-tensor-parallel-size", "2")
EP4 = ("--expert-model-parallel-size", "4", "--expert-tensor-parallel-size", "1")
ZERO1 = ("--use-distributed-optimizer",)
CLIPPED = ("--clip-grad", "0.05", "--weight-decay", "0.1")
PADDED = ("--train-layout", "padded")
RECOMPUTED = ("--gradient-checkpointing",)
SELECTIVE = ("--recompute-granularity", "selective")

SIGNALS = {
    "sampled": (
        *("--entropy-coef", "0.01", "--kl-loss-coef", "0.1", "--kl-loss-type", "k2", "--use-tis"),
        *("--rollout-temperature", "0.7", "--calculate-per-token-loss"),
    ),
    "topk": ("--opd-loss", "topk", "--opd-top-k", "5", "--opd-divergence", "jsd"),
}


@dataclass(frozen=True)
class Case:
    """A model and a signal under a parallelism."""

    model: str
    signal: str
    flags: tuple[str, ...]
    samples: int = 8
    of_both: tuple[str, ...] = ()
    """Flags that FSDP is given too."""

    def job(self, folder: Path, *more: str) -> Job:
        drawn, pictures = make_samples(
            self.samples, top_k=5, with_pictures=(False,) if "text" in self.model else (True, False)
        )
        if self.samples == 2:  # one rank without samples
            drawn[0].response_length, drawn[0].loss_mask = 0, []
        flags = (*DISTILL, *LINEAR_STEP, *SIGNALS[self.signal], "--logprob-chunk-size", "7")
        flags = (*flags, *self.of_both, *more)
        return Job(flags, drawn, pictures, model=folder, masked_ids=MASKED, keep_loaded=True)


TAUGHT = {
    "inner teacher": ("--opd-kl-clip", "9"),
    "inner teacher, top-k": ("--opd-loss", "topk", "--opd-top-k", "5", "--opd-divergence", "jsd"),
    "inner teacher, whole vocabulary": ("--opd-loss", "topk", "--opd-top-k", "1000"),
}
SPLIT = ("--use-dynamic-batch-size", "--max-tokens-per-gpu", "45")
CASES = {
    "tensor and sequence": Case("dense", "sampled", (*TP2, *SP)),
    "tensor and sequence, top-k": Case("dense", "topk", (*TP2, *SP)),
    "tensor, padded rows": Case("tied", "sampled", (*TP2, *PADDED)),
    "pipeline, tied": Case("tied", "sampled", PP2),
    "context, sharded optimizer": Case("dense", "sampled", (*CP2, *ZERO1)),
    "context, top-k": Case("tied", "topk", CP2),
    "experts, sharded optimizer": Case("mixture", "sampled", (*EP2, *ZERO1)),
    "experts, one rank without samples": Case("mixture as saved", "sampled", EP2, samples=2),
    "experts beside tensor and sequence, top-k": Case("mixture", "topk", (*TP2, *SP, *EP2)),
    "pipeline of mixtures": Case("mixture", "sampled", PP2),
    "pipeline, text": Case("text", "topk", PP2),
}
MORE_CASES = {
    "data, sharded optimizer": Case("dense", "sampled", ZERO1),
    "pipeline, top-k": Case("dense", "topk", PP2),
    "experts split by tensor": Case("mixture", "sampled", (*TP2, *SP)),
    "context of mixtures": Case("mixture", "topk", CP2),
    "experts, padded rows": Case("mixture", "topk", (*EP2, *PADDED)),
    "tensor, recomputed": Case("dense", "sampled", (*TP2, *RECOMPUTED)),
    "pipeline, recomputed": Case("mixture", "sampled", (*PP2, *RECOMPUTED)),
    "pipeline, attention recomputed": Case("dense", "sampled", (*PP2, *SELECTIVE)),
    "pipeline, sharded optimizer": Case("tied", "sampled", (*PP2, *ZERO1)),
    "text, tensor": Case("text", "topk", TP2),
    "text, experts": Case("text mixture", "sampled", (*EP2, *ZERO1)),
    "text, experts split by tensor": Case("text mixture", "topk", (*TP2, *SP)),
    "context of experts": Case("mixture", "sampled", (*CP2, *EP2)),
    "context, recomputed": Case("dense", "sampled", (*CP2, *RECOMPUTED)),
    "clipped and decayed": Case("mixture", "sampled", (*EP2, *ZERO1), of_both=CLIPPED),
}
FOUR_RANKS = {
    "tensor, pipeline": Case("dense", "sampled", (*TP2, *SP, *PP2)),
    "tensor, experts, sharded optimizer": Case("mixture", "sampled", (*TP2, *SP, *EP2, *ZERO1)),
    "pipeline, experts": Case("mixture", "topk", (*PP2, *EP2)),
    "context, pipeline": Case("dense", "topk", (*CP2, *PP2)),
    "tensor, context": Case("tied", "sampled", (*TP2, *SP, *CP2)),
    "pipeline, tied, sharded optimizer": Case("tied", "sampled", (*PP2, *ZERO1)),
    "experts split and spread": Case("mixture", "sampled", (*TP2, *SP, *SPLIT_EXPERTS)),
    "experts over all ranks": Case("mixture", "topk", (*TP2, *SP, *EP4, *ZERO1)),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "dense": save_vision_model(folder / "dense", tied=False),
        "tied": save_vision_model(folder / "tied"),
        "mixture": save_mixture_model(folder / "mixture"),
        "mixture as saved": save_mixture_model(folder / "saved", published=False),
        "text": save_text_model(folder / "text"),
        "text mixture": save_text_model(folder / "text_mixture", experts=4),
        "shipped": checkpoint_path("student"),
    }


@pytest.fixture(scope="module")
def two_ranks(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Outcome]]:
    """Every case of the default selection, in one start of two processes."""
    jobs = jobs_of(CASES, models)
    jobs["shipped"] = Job((*DISTILL, *MEGATRON, *TP2), make_samples(8)[0], {}, rollouts=0)
    jobs["shipped"].model, jobs["shipped"].keep_loaded = models["shipped"], True
    broken = tmp_path_factory.mktemp("broken")
    shutil.copytree(models["tied"], broken, dirs_exist_ok=True)
    weights = load_file(broken / "model.safetensors")
    weights["model.language_model.norm.weight"][0] = torch.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    for name, signal in TAUGHT.items():
        jobs[name] = taught_job(models, *INNER_TEACHER, str(models["mixture"]), *signal, *TP2, *SP, *EP2)
    jobs |= jobs_of({"not finite": Case("broken", "topk", PP2)}, {"broken": broken})
    return run(jobs, tmp_path_factory.mktemp("ranks"), 2)


def jobs_of(cases: dict[str, Case], models: dict[str, Path]) -> dict[str, Job]:
    return {
        name: case.job(models[case.model], *SPLIT, *MEGATRON, *case.flags) for name, case in cases.items()
    }


def run(jobs: dict[str, Job], folder: Path, ranks: int, timeout: float = 500) -> dict[str, list[Outcome]]:
    outcomes = train_on_ranks(Path("unused"), list(jobs.values()), folder, ranks, timeout)
    return dict(zip(jobs, outcomes, strict=True))


def taught_job(models: dict[str, Path], *flags: str) -> Job:
    """A dense student that learns from a mixture of experts, pure distillation."""
    samples, pictures = make_samples(8)
    more = (*LINEAR_STEP, *SPLIT, "--calculate-per-token-loss")
    return Job((*flags, *more), samples, pictures, model=models["dense"], masked_ids=MASKED)


EXPECTED: dict[tuple[object, ...], Outcome] = {}


def expected(models: dict[str, Path], case: Case) -> Outcome:
    """Return what FSDP makes of the same batch on one rank, in one micro-batch."""
    key = (case.model, case.signal, case.samples, *case.of_both)
    if key not in EXPECTED:
        EXPECTED[key] = train(Path("unused"), case.job(models[case.model], *ONE_BATCH))
    return EXPECTED[key]


def assert_same(outcome: Outcome, of_fsdp: Outcome) -> None:
    assert outcome.weights.keys() == of_fsdp.weights.keys()
    for name, weight in of_fsdp.weights.items():
        torch.testing.assert_close(outcome.weights[name], weight, atol=TOLERANCE, rtol=0, msg=name)
    for name, value in of_fsdp.metrics[0].items():
        if name != "micro_batches":
            assert outcome.metrics[0][name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_agree_with_fsdp(
    models: dict[str, Path], two_ranks: dict[str, list[Outcome]], name: str
) -> None:
    for outcome in two_ranks[name]:
        assert_same(outcome, expected(models, CASES[name]))
    assert two_ranks[name][0].metrics == two_ranks[name][1].metrics


@pytest.mark.parametrize("model", ["dense", "mixture"])
@pytest.mark.parametrize("signal", SIGNALS)
def test_one_rank_agrees_with_fsdp(models: dict[str, Path], model: str, signal: str) -> None:
    case = Case(model, signal, ())
    outcome = train(Path("unused"), case.job(models[model], *SPLIT, *MEGATRON))
    assert outcome.metrics[0]["micro_batches"] > 1
    assert_same(outcome, expected(models, case))


@pytest.mark.parametrize("name", [*CASES, "shipped"])
def test_a_checkpoint_leaves_as_it_came(
    models: dict[str, Path], two_ranks: dict[str, list[Outcome]], name: str
) -> None:
    """Bit for bit, in the published layout, before the first step."""
    model = CASES[name].model if name in CASES else name
    on_disk = load_file(models["mixture" if model == "mixture as saved" else model] / "model.safetensors")
    for outcome in two_ranks[name]:
        assert outcome.loaded.keys() == on_disk.keys()
        for source, tensor in on_disk.items():
            assert torch.equal(outcome.loaded[source], tensor.float()), source


@pytest.mark.parametrize("name", TAUGHT)
def test_a_teacher_in_the_trainer_says_what_a_served_one_does(
    models: dict[str, Path], two_ranks: dict[str, list[Outcome]], name: str
) -> None:
    """A mixture of experts, shared by tensor and expert parallelism, teaches a dense student without server;
    its scores are over all tokens, those that are never sampled among them."""
    job = taught_job(models, *DISTILL, *TAUGHT[name])
    args = make_args(models["mixture"], *DISTILL)
    builder = MicroBatchBuilder(load_processor(models["mixture"]), job.pictures)
    with joined_backend(args) as teacher:
        for sample in job.samples:
            shard = build_shards(args, [sample], job.pictures, 1, 0)[0]
            (scores,) = teacher.score([builder.build(shard.samples)], "student", 1000)
            sample.teacher_log_probs, sample.teacher_tail_mass = scores.log_probs, scores.tail_mass
            sample.teacher_top_ids, sample.teacher_top_log_probs = scores.top_ids, scores.top_log_probs
    served = train(Path("unused"), job)
    for outcome in two_ranks[name]:
        assert_same(outcome, served)
    assert served.metrics[0]["opd_reverse_kl"] > 0.01


def test_a_loss_that_is_not_finite_is_known_on_every_stage(two_ranks: dict[str, list[Outcome]]) -> None:
    first, last = two_ranks["not finite"]
    for outcome in (first, last):
        assert [(step.number, step.version, step.reason) for step in outcome.skipped] == [
            (0, 0, "the loss is nan")
        ]
        assert (outcome.metrics[0]["skipped_steps"], outcome.metrics[0]["optimizer_steps"]) == (1, 0)
        for name, weight in outcome.weights.items():
            assert torch.equal(weight.nan_to_num(9), outcome.loaded[name].nan_to_num(9)), name
    assert first.skipped[0].suspects == (), "it computes no loss"
    assert len(last.skipped[0].suspects) == MOST_SUSPECTS
    assert {suspect.gap for suspect in last.skipped[0].suspects} == {math.inf}


def test_a_frozen_tower_stays(models: dict[str, Path]) -> None:
    jobs = [
        Case("tied", "sampled", ()).job(models["tied"], *SPLIT, "--freeze-vision-tower", *flags)
        for flags in ((), MEGATRON)
    ]
    of_fsdp, outcome = (train(Path("unused"), job) for job in jobs)
    assert_same(outcome, of_fsdp)
    for name, weight in outcome.weights.items():
        assert torch.equal(weight, outcome.loaded[name]) == ("visual" in name), name


def log_probs(models: dict[str, Path], *flags: str) -> Tensor:
    """Return the student's log-probs of the batch's responses."""
    case = Case("tied", "sampled", ())
    job = case.job(models["tied"], *ONE_BATCH, *flags)
    args = make_args(models["tied"], *job.flags)
    shard = build_shards(args, job.samples, job.pictures, 1, 0)[0]
    batch = MicroBatchBuilder(load_processor(models["tied"]), job.pictures).build(shard.samples)
    with joined_backend(args) as backend:
        return backend.compute_log_probs([batch])[0]


@pytest.mark.parametrize("blinded", ["deepstack", "mrope"])
def test_the_comparison_can_see(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, blinded: str
) -> None:
    """Without the features behind the first layer, or with plain positions, it would be far off."""
    from slime.backends.megatron import rotary, spec

    of_fsdp = log_probs(models)
    torch.testing.assert_close(log_probs(models, *MEGATRON), of_fsdp, atol=1e-5, rtol=0)
    if blinded == "deepstack":
        monkeypatch.setattr(spec.DeepstackLayer, "forward", spec.TransformerLayer.forward)
    else:
        monkeypatch.setattr(rotary, "HEIGHT", rotary.TIME)
        monkeypatch.setattr(rotary, "WIDTH", rotary.TIME)
    assert (log_probs(models, *MEGATRON) - of_fsdp).abs().max() > 0.01


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_more_cases_on_two_ranks(models: dict[str, Path], tmp_path: Path) -> None:
    outcomes = run(jobs_of(MORE_CASES, models), tmp_path, 2, timeout=800)
    for name, case in MORE_CASES.items():
        for outcome in outcomes[name]:
            assert_same(outcome, expected(models, case))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_four_ranks_agree_with_fsdp(models: dict[str, Path], tmp_path: Path) -> None:
    outcomes = run(jobs_of(FOUR_RANKS, models), tmp_path, 4, timeout=800)
    for name, case in FOUR_RANKS.items():
        for outcome in outcomes[name]:
            assert_same(outcome, expected(models, case))
