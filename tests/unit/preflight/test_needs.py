"""How much memory a run takes at least."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest

from slime.preflight.launch import Launch
from slime.preflight.needs import gpu_needs, host_needs, state_bytes, training_bytes
from slime.preflight.weights import Weights
from tests.fakes.launches import launch, teacher, write_model

MODEL = Weights(parameters=1000, stored=2000, vision=100)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((), 16 * 1000 / 1),
        (("--actor-num-gpus-per-node", "4"), 16 * 1000 / 4),
        (("--freeze-vision-tower",), 16 * 900 + 4 * 100),
    ],
)
def test_fsdp_shares_all_over_all_ranks(flags: tuple[str, ...], expected: float) -> None:
    args = launch(*flags, student_gpus=("0", "1", "2", "3", "4")).args
    assert training_bytes(args, MODEL) == expected


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((), (2 + 4 + 12) * 1000),
        (("--tensor-model-parallel-size", "2"), (2 + 4 + 12) * 1000 / 2),
        (("--tensor-model-parallel-size", "2", "--use-distributed-optimizer"), 6 * 1000 / 2 + 12 * 1000 / 4),
        (("--train-dtype", "float32"), 16 * 1000),
    ],
)
def test_megatron_shares_by_its_parallelism(flags: tuple[str, ...], expected: float) -> None:
    megatron = ("--train-backend", "megatron", "--actor-num-gpus-per-node", "4")
    args = launch(*megatron, *flags, student_gpus=("0", "1", "2", "3", "4")).args
    assert training_bytes(args, MODEL) == expected


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model", {"visual.a": [100], "b": [900]})


def by_gpu(launch: Launch) -> dict[str, list[tuple[str, float]]]:
    needs: dict[str, list[tuple[str, float]]] = defaultdict(list)
    for gpu, need in gpu_needs(launch):
        needs[gpu].append((need.label, need.size))
    return dict(needs)


def test_each_gpu_bears_what_the_split_puts_there(model: Path) -> None:
    flags = (
        "--actor-num-gpus-per-node",
        "2",
        "--rollout-num-gpus",
        "2",
        "--rollout-num-gpus-per-engine",
        "2",
    )
    apart = launch(*flags, student=model, student_gpus=("2", "3", "4", "5"), teacher=teacher(model, "0", "1"))
    stored = (model / "model.safetensors").stat().st_size
    assert by_gpu(apart) == {
        **{gpu: [("the teacher's weights", stored / 2)] for gpu in "01"},
        **{gpu: [("training", 8000)] for gpu in "23"},
        **{gpu: [("an engine's weights", 1000)] for gpu in "45"},
    }


def test_of_those_that_take_turns_the_larger_counts_and_on_one_gpu_for_all_they_add_up(model: Path) -> None:
    turns = ("--colocate", "--weight-sync", "tensor", "--actor-num-gpus-per-node", "2")
    assert by_gpu(launch(*turns, student=model, student_gpus=("0", "1"))) == {
        gpu: [("training", 8000)] for gpu in "01"
    }
    shared = ("--engine", "transformers", "--weight-sync", "disk", "--rollout-num-gpus", "1")
    (needs,) = by_gpu(
        launch(*shared, student=model, student_gpus=("0",), teacher=teacher(model, "0"))
    ).values()
    assert [label for label, _ in needs] == ["the teacher's weights", "training", "an engine's weights"]


def test_the_host_bears_a_run_without_gpus_and_what_is_parked(model: Path) -> None:
    stored = (model / "model.safetensors").stat().st_size
    on_cpu = launch("--kl-loss-coef", "0.1", student=model, teacher=teacher(model))
    sizes = {need.label: need.size for need in host_needs(on_cpu) if need.sure}
    assert sizes == {
        "training": 16000,
        "the student's engines": 4000,
        "the model of --ref-load": 4000,
        "the teacher": stored,
    }
    turns = ("--colocate", "--weight-sync", "tensor")
    parked = launch(*turns, student=model, student_gpus=("0",), teacher=teacher(model, "1"))
    (need,) = [need for need in host_needs(parked) if need.sure]
    assert need.size == state_bytes(parked.args, MODEL) == 12000
    assert list(gpu_needs(launch(student=model))) == []


def test_models_that_megatron_holds_lie_on_the_host(model: Path) -> None:
    flags = ("--train-backend", "megatron", "--use-opd", "--opd-type", "megatron", "--opd-teacher-load")
    held = launch(*flags, str(model), student=model, student_gpus=("0", "1"))
    stored = (model / "model.safetensors").stat().st_size
    assert [(need.label, need.size) for need in host_needs(held) if need.sure] == [
        ("the model of --opd-teacher-load, held for the trainers", stored)
    ]
