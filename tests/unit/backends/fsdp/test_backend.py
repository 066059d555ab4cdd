"""The FSDP backend as one rank: the verbs against plain transformers and AdamW."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from slime.backends.batching import MicroBatch, MicroBatchBuilder
from slime.backends.fsdp.backend import FsdpBackend
from slime.tiny.paths import checkpoint_path
from slime.trainer import Trainer, build_shards
from slime.utils.processing_utils import load_processor
from slime.utils.types import Sample
from tests.fakes.tiny_model import make_samples, save_text_model, save_vision_model
from tests.fakes.training import DISTILL, LINEAR_STEP, ONE_BATCH, Job, joined, make_args, train


@pytest.fixture(scope="module")
def vision_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vision_model(tmp_path_factory.mktemp("vision"))


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text_model(tmp_path_factory.mktemp("text"))


def make_batch(
    model: Path, samples: list[Sample], pictures: dict[str, bytes], *, packed: bool = True
) -> MicroBatch:
    shard = build_shards(make_args(model, *DISTILL, *ONE_BATCH), samples, pictures, 1, 0)[0]
    return MicroBatchBuilder(load_processor(model), pictures, packed=packed).build(shard.samples)


def plain_log_probs(model: Any, batch: MicroBatch) -> Tensor:
    """Return the log-probs [P] of the response through transformers' own padded forward pass."""
    assert batch.lengths is None
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    if batch.pixel_values is not None and batch.picture_grids is not None:
        sizes = batch.picture_grids.prod(-1).tolist()
        parts = batch.pixel_values.split(sizes)
        inputs |= {
            "pixel_values": torch.cat([parts[row] for row in batch.picture_rows]),
            "image_grid_thw": batch.picture_grids[list(batch.picture_rows)],
            "mm_token_type_ids": batch.image_token_mask,
        }
    logits = model(**inputs, use_cache=False).logits.float().flatten(0, 1)[batch.response_positions]
    return logits.log_softmax(-1).gather(1, batch.response_ids[:, None])[:, 0]


@pytest.mark.parametrize("pictures_in", [(True, False), (True,), (False,)])
def test_log_probs_are_transformers_own_on_the_shipped_student(pictures_in: tuple[bool, ...]) -> None:
    path = checkpoint_path("student")
    samples, pictures = make_samples(8, with_pictures=pictures_in)
    reference = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
    with joined(make_args(path, *DISTILL)) as backend, torch.no_grad():
        (log_probs,) = backend.compute_log_probs([make_batch(path, samples, pictures)])
        expected = plain_log_probs(reference, make_batch(path, samples, pictures, packed=False))
    torch.testing.assert_close(log_probs, expected, rtol=0, atol=1e-5)


def test_each_sample_alone_has_the_log_probs_it_has_in_the_batch(vision_model: Path) -> None:
    """Padding, neighbours and a shared picture change nothing."""
    samples, pictures = make_samples(6)
    with joined(make_args(vision_model, *DISTILL)) as backend:
        (together,) = backend.compute_log_probs([make_batch(vision_model, samples, pictures)])
        alone = backend.compute_log_probs([make_batch(vision_model, [one], pictures) for one in samples])
    order = build_shards(make_args(vision_model, *DISTILL, *ONE_BATCH), samples, pictures, 1, 0)[0].samples
    torch.testing.assert_close(
        together, torch.cat([alone[sample.index] for sample in order]), rtol=0, atol=1e-5
    )


def test_a_text_model_trains_and_refuses_pictures(text_model: Path) -> None:
    samples, pictures = make_samples(4, with_pictures=(False,))
    batch = make_batch(text_model, samples, pictures)
    reference = AutoModelForCausalLM.from_pretrained(text_model, dtype=torch.float32)
    with joined(make_args(text_model, *DISTILL)) as backend, torch.no_grad():
        (log_probs,) = backend.compute_log_probs([batch])
        expected = plain_log_probs(reference, make_batch(text_model, samples, pictures, packed=False))
        torch.testing.assert_close(log_probs, expected, rtol=0, atol=1e-5)
        with pytest.raises(
            ValueError, match=r"samples \(0, .* carry pictures and Qwen3ForCausalLM has no vision"
        ):
            backend.compute_log_probs([replace(batch, sample_indices=(0, 1), picture_rows=(0,))])


def test_three_steps_are_those_of_plain_adamw(vision_model: Path) -> None:
    """Loss, gradient norm, learning rate and weights, clipping and warm-up included."""
    samples, pictures = make_samples(8)
    flags = (
        *(*DISTILL, *ONE_BATCH, "--calculate-per-token-loss", "--lr", "0.01", "--adam-eps", "0.01"),
        *("--weight-decay", "0.1", "--lr-warmup-iters", "2", "--clip-grad", "0.5"),
    )
    outcome = train(vision_model, Job(flags, samples, pictures, rollouts=3))

    model = AutoModelForImageTextToText.from_pretrained(vision_model, dtype=torch.float32)
    batch = make_batch(vision_model, samples, pictures, packed=False)
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
        eps=0.01,
    )
    for step, lr in enumerate((0.005, 0.01, 0.01)):
        log_probs = plain_log_probs(model, batch)
        assert batch.teacher_log_probs is not None
        advantages = batch.advantages - (log_probs.detach() - batch.teacher_log_probs)
        weights = batch.loss_mask / batch.loss_mask.sum()
        (-(log_probs - log_probs.detach()).exp() * advantages * weights).sum().backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        assert outcome.metrics[step]["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        assert outcome.metrics[step]["lr"] == pytest.approx(lr)
    for name, weight in outcome.weights.items():
        torch.testing.assert_close(weight, model.get_parameter(name).detach(), rtol=0, atol=2e-5, msg=name)


def test_gradient_checkpointing_and_frozen_towers(vision_model: Path) -> None:
    samples, pictures = make_samples(4)
    flags = (*DISTILL, *ONE_BATCH, *LINEAR_STEP)
    plain = train(vision_model, Job(flags, samples, pictures))
    recomputed = train(vision_model, Job((*flags, "--gradient-checkpointing"), samples, pictures))
    frozen = train(vision_model, Job((*flags, "--freeze-vision-tower"), samples, pictures))
    before = AutoModelForImageTextToText.from_pretrained(vision_model, dtype=torch.float32)
    for name, weight in plain.weights.items():
        torch.testing.assert_close(recomputed.weights[name], weight, rtol=0, atol=1e-6)
        moved = not torch.equal(frozen.weights[name], before.get_parameter(name))
        assert moved == ("visual" not in name), name
    assert any("visual" in name for name in plain.weights)
    assert frozen.metrics[0]["loss"] == pytest.approx(plain.metrics[0]["loss"], abs=1e-6)


def master_weights(backend: FsdpBackend) -> list[Tensor]:
    """Return copies of the weights as they are stored between steps."""
    sharded = [parameter.data for parameter in backend._student.parameters()]
    return [shard.full_tensor().clone() for shard in sharded if isinstance(shard, DTensor)]


def test_bfloat16_computes_in_half_and_steps_in_float32(vision_model: Path) -> None:
    """A step far below bfloat16's resolution still moves the master weights."""
    samples, pictures = make_samples(4)
    flags = (*DISTILL, *ONE_BATCH, "--lr", "1e-5", "--calculate-per-token-loss")
    args = make_args(vision_model, *flags, "--train-dtype", "bfloat16", samples=4)
    exact = train(vision_model, Job(flags, samples, pictures))
    with joined(args) as backend:
        before = master_weights(backend)
        shard = build_shards(args, samples, pictures, 1, 0)[0]
        metrics = Trainer(args, backend, load_processor(vision_model)).train(0, shard)
        after = master_weights(backend)
        exported = dict(backend.hf_named_parameters())
    assert {tensor.dtype for tensor in after} == {torch.float32}
    assert {tensor.dtype for tensor in exported.values()} == {torch.bfloat16}
    moves = [(new - old).abs().max().item() for new, old in zip(after, before, strict=True)]
    assert 0 < max(moves) < 2e-5
    assert metrics["loss"] == pytest.approx(exact.metrics[0]["loss"], rel=0.05)
    assert metrics["grad_norm"] == pytest.approx(exact.metrics[0]["grad_norm"], rel=0.1)


def test_several_steps_a_rollout_use_the_log_probs_from_before(vision_model: Path) -> None:
    samples, pictures = make_samples(8)
    flags = (*DISTILL, *ONE_BATCH, "--global-batch-size", "4", "--lr", "0.03")
    outcome = train(vision_model, Job(flags, samples, pictures))
    assert outcome.metrics[0]["optimizer_steps"] == 2
    assert outcome.metrics[0]["policy_kl"] != 0, "the second step's ratio is not 1"
    one_step = train(vision_model, Job((*DISTILL, *ONE_BATCH, "--lr", "0.03"), samples, pictures))
    assert one_step.metrics[0]["policy_kl"] == 0
    gap = "train_rollout_logprob_abs_diff"
    assert outcome.metrics[0][gap] == pytest.approx(one_step.metrics[0][gap], rel=0.1)


def test_the_reference_is_the_start_and_stays_there(vision_model: Path, tmp_path: Path) -> None:
    samples, pictures = make_samples(4)
    flags = (*DISTILL, *ONE_BATCH, "--kl-loss-coef", "0.5", "--lr", "0.01")
    outcome = train(vision_model, Job(flags, samples, pictures, rollouts=2))
    assert outcome.metrics[0]["kl_loss"] == pytest.approx(0, abs=1e-6)
    assert outcome.metrics[1]["kl_loss"] > 1e-4
    other = save_vision_model(tmp_path, seed=1)
    outcome = train(vision_model, Job((*flags, "--ref-load", str(other)), samples, pictures))
    assert outcome.metrics[0]["kl_loss"] > 1e-2


def test_models_that_are_not_loaded_are_refused(vision_model: Path) -> None:
    with joined(make_args(vision_model, *DISTILL)) as backend:
        with pytest.raises(ValueError, match="--kl-loss-coef above 0"):
            backend.compute_log_probs([], "reference")
        with pytest.raises(ValueError, match="--opd-type megatron loads the teacher inside Megatron"):
            backend.compute_log_probs([], "teacher")
