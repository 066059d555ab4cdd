"""`--save-hf-interval`: the folder is the trained model to transformers and to a real SGLang server."""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoTokenizer

from slime.backends.batching import MicroBatchBuilder
from slime.tiny.examples import Encoder
from slime.tiny.geometry import GEOMETRY
from slime.tiny.paths import checkpoint_path
from slime.trainer import Trainer, build_shards
from slime.utils.processing_utils import load_processor
from slime.utils.types import Sample
from slime.weight_sync.checked import checked
from slime.weight_sync.disk import fill_folder
from tests.contracts.reference import TOLERANCE, Http, Reference, running_sglang
from tests.fakes.training import DISTILL, ONE_BATCH, joined_backend, make_args

STUDENT = checkpoint_path("student")
BACKENDS = ("fsdp", "megatron")
SAMPLES, RESPONSE = 4, 12


@dataclass(frozen=True)
class Exported:
    """A folder, and the trainer's log-probs [SAMPLES, RESPONSE] of the model in it."""

    folder: Path
    log_probs: Tensor


def images() -> list[Image.Image]:
    problems = GEOMETRY.make_splits()["test"][:SAMPLES]
    return [problem.image for problem in problems if problem.image is not None]


def make_samples() -> tuple[list[Sample], dict[str, bytes]]:
    """Return problems with a picture and arbitrary tokens as the response, and the pictures by hash."""
    encoder = Encoder(STUDENT)
    generator = torch.Generator().manual_seed(0)
    letters = torch.tensor(encoder.tokenizer.convert_tokens_to_ids(list("0123456789*/=+abch")))
    samples, pictures = [], {}
    for index, problem in enumerate(GEOMETRY.make_splits()["test"][:SAMPLES]):
        assert problem.image is not None
        encoded = io.BytesIO()
        problem.image.save(encoded, format="PNG")
        sha256 = hashlib.sha256(encoded.getvalue()).hexdigest()
        pictures[sha256] = encoded.getvalue()
        grid = encoder.image_processor(images=[problem.image], return_tensors="pt")["image_grid_thw"][0]
        response = letters[torch.randint(len(letters), (RESPONSE,), generator=generator)].tolist()
        samples.append(
            Sample(
                index=index,
                group_index=index // 2,
                tokens=[*encoder.prompt_ids(problem.text), *response],
                multimodal_train_inputs={
                    "image_hashes": [sha256],
                    "image_grid_thw": [tuple(grid.tolist())],
                },
                response_length=RESPONSE,
                loss_mask=[1] * RESPONSE,
                rollout_log_probs=[-1.0] * RESPONSE,
                teacher_log_probs=-torch.rand(RESPONSE, generator=generator) * 3,
                status=Sample.Status.COMPLETED,
                metadata={"task_reward": 0.0, "train_reward": 0.0},
            )
        )
    return samples, pictures


def export(backend_name: str, folder: Path, *flags: str) -> Exported:
    """Train the student for a step and write it down as a training rank does."""
    samples, pictures = make_samples()
    flags = (*DISTILL, *ONE_BATCH, "--lr", "0.003", "--train-backend", backend_name, *flags)
    args = make_args(STUDENT, *flags, samples=SAMPLES)
    processor = load_processor(STUDENT)
    shard = build_shards(args, samples, pictures, 1, 0)[0]
    batch = MicroBatchBuilder(processor, pictures).build(
        sorted(shard.samples, key=lambda sample: sample.index)
    )
    folder.mkdir(parents=True)
    with joined_backend(args) as backend:
        (before,) = backend.compute_log_probs([batch])
        Trainer(args, backend, processor).train(0, shard)
        (after,) = backend.compute_log_probs([batch])
        parameters = checked(backend.hf_named_parameters(), STUDENT)
        fill_folder(parameters, folder, checkpoint=STUDENT, writes=True)
    assert (after - before).abs().max() > 0.1
    return Exported(folder, after.view(SAMPLES, RESPONSE))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    pytest.importorskip("megatron.core")
    folder = tmp_path_factory.mktemp("exported")
    return {name: export(name, folder / name) for name in BACKENDS}


@pytest.mark.parametrize("name", BACKENDS)
def test_transformers_has_the_trainers_log_probs(exported: dict[str, Exported], name: str) -> None:
    made = exported[name]
    model = AutoModelForImageTextToText.from_pretrained(made.folder)
    assert model.dtype == torch.float32
    reference = Reference(made.folder)
    for sample, image, expected in zip(make_samples()[0], images(), made.log_probs, strict=True):
        found = reference.log_probs(sample.tokens, [image], RESPONSE)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_the_folder_has_all_that_the_first_one_had(exported: dict[str, Exported]) -> None:
    names = {path.name for path in STUDENT.iterdir()}
    for made in exported.values():
        assert {path.name for path in made.folder.iterdir()} == names
    assert {"chat_template.jinja", "preprocessor_config.json", "generation_config.json"} <= names
    folder = exported["fsdp"].folder
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "b=3"}]}]
    templates = [AutoTokenizer.from_pretrained(path) for path in (folder, STUDENT)]
    ours, theirs = (each.apply_chat_template(chat, tokenize=False) for each in templates)
    assert ours == theirs
    assert "b=3" in ours


def test_both_backends_write_the_same_tensors(exported: dict[str, Exported]) -> None:
    ours, theirs = (load_file(exported[name].folder / "model.safetensors") for name in BACKENDS)
    assert {name: tensor.shape for name, tensor in ours.items()} == {
        name: tensor.shape for name, tensor in theirs.items()
    }
    assert {tensor.dtype for tensor in (*ours.values(), *theirs.values())} == {torch.float32}


def test_half_precision_is_said_in_the_config(tmp_path: Path) -> None:
    made = export("fsdp", tmp_path / "half", "--train-dtype", "bfloat16")
    assert {tensor.dtype for tensor in load_file(made.folder / "model.safetensors").values()} == {
        torch.bfloat16
    }
    assert json.loads((made.folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForImageTextToText.from_pretrained(made.folder).dtype == torch.bfloat16


@pytest.mark.sglang
@pytest.mark.timeout(900)
def test_a_real_server_has_the_trainers_log_probs(exported: dict[str, Exported], tmp_path: Path) -> None:
    with running_sglang(exported["fsdp"].folder, tmp_path / "sglang.log", role="student") as server:
        http = Http(server)
        for name in BACKENDS:
            if name != "fsdp":
                http.update_weights(exported[name].folder, name)
            for sample, image, expected in zip(
                make_samples()[0], images(), exported[name].log_probs, strict=True
            ):
                found = http.score(sample.tokens, [image], RESPONSE)
                torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)
