"""What Megatron has made of a mixture of experts, read by others: from its export and its checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

pytest.importorskip("megatron.core")

from scripts.convert_hf_to_mcore import main as to_mcore
from scripts.convert_mcore_to_hf import main
from slime.backends.batching import MicroBatch, MicroBatchBuilder
from slime.checkpoints import CheckpointError, RunState, begin_checkpoint, finish_checkpoint, maker_of
from slime.trainer import Trainer, build_shards
from slime.utils.processing_utils import load_processor
from slime.weight_sync.disk import write_weights
from tests.fakes.tiny_model import make_samples, save_mixture_model
from tests.fakes.training import DISTILL, ONE_BATCH, joined, joined_backend, make_args

FLAGS = (*DISTILL, *ONE_BATCH, "--lr", "0.01")


def test_engines_and_converted_folders_have_the_trainers_log_probs(tmp_path: Path) -> None:
    model = save_mixture_model(tmp_path / "model")
    samples, pictures = make_samples(4)
    args = make_args(model, *FLAGS, "--train-backend", "megatron", samples=4)
    shard = build_shards(args, samples, pictures, 1, 0)[0]
    processor = load_processor(model)
    batch = MicroBatchBuilder(processor, pictures).build(shard.samples)
    partial = begin_checkpoint(tmp_path / "checkpoints", 1)
    with joined_backend(args) as backend:
        (before,) = backend.compute_log_probs([batch])
        Trainer(args, backend, processor).train(0, shard)
        (trained,) = backend.compute_log_probs([batch])
        synced = tmp_path / "synced"
        write_weights(backend.hf_named_parameters(), synced, checkpoint=model, writes=True)
        backend.save_checkpoint(partial / "trainer")
    finish_checkpoint(partial, RunState(rollout_id=1), maker_of(args))
    assert (trained - before).abs().max() > 0.01
    torch.testing.assert_close(log_probs(synced, batch), trained, rtol=0, atol=1e-5)

    converted = tmp_path / "converted"
    command = [
        "--load",
        str(tmp_path / "checkpoints"),
        "--hf-checkpoint",
        str(model),
        "--save",
        str(converted),
    ]
    main([*command, "--dtype", "float32"])
    expected = load_file(synced / "model.safetensors")
    found = load_file(converted / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    with pytest.raises(CheckpointError, match="neither a checkpoint"):
        main([*command[:1], str(model), *command[2:]])


@pytest.mark.parametrize("published", [True, False])
def test_a_folder_becomes_a_checkpoint_and_comes_back_as_it_was(tmp_path: Path, published: bool) -> None:
    """Bit for bit, in the published layout, and a run that loads it begins like one that reads the folder."""
    model = save_mixture_model(tmp_path / "model", published=published)
    as_published = save_mixture_model(tmp_path / "published")
    to_mcore(["--hf-checkpoint", str(model), "--save", str(tmp_path / "checkpoints")])
    back = ["--load", str(tmp_path / "checkpoints"), "--hf-checkpoint", str(model), "--save"]
    main([*back, str(tmp_path / "back"), "--dtype", "float32"])
    expected = load_file(as_published / "model.safetensors")
    found = load_file(tmp_path / "back" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor.float()) for name, tensor in expected.items())

    other = save_mixture_model(tmp_path / "other", seed=1)
    samples, pictures = make_samples(4)
    args = make_args(other, *FLAGS, "--train-backend", "megatron", samples=4)
    shard = build_shards(args, samples, pictures, 1, 0)[0]
    batch = MicroBatchBuilder(load_processor(other), pictures).build(shard.samples)
    with joined_backend(args) as backend:
        (before,) = backend.compute_log_probs([batch])
        backend.load_checkpoint(tmp_path / "checkpoints" / "rollout-000000" / "trainer")
        assert backend.weight_version == 0
        (loaded,) = backend.compute_log_probs([batch])
    assert (loaded - before).abs().max() > 0.01
    torch.testing.assert_close(loaded, log_probs(as_published, batch), rtol=0, atol=1e-5)


def log_probs(folder: Path, batch: MicroBatch) -> Tensor:
    """Return what transformers' model of a folder gives."""
    with joined(make_args(folder, *DISTILL)) as backend:
        return backend.compute_log_probs([batch])[0]
