"""Save and load: an interrupted run goes on as if it had not been, whatever shares the model afterwards."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("megatron.core")

from slime.backends.megatron.optimizer_state import KINDS
from tests.fakes.tiny_model import make_samples, save_mixture_model, save_vision_model
from tests.fakes.training import (
    DISTILL,
    ONE_BATCH,
    Job,
    Outcome,
    joined_backend,
    make_args,
    train,
    train_on_ranks,
)

FLAGS = (*DISTILL, *ONE_BATCH, "--lr", "0.01", "--adam-eps", "1e-3", "--lr-warmup-iters", "3")
MEGATRON = ("--train-backend", "megatron")
TENSOR = ("--tensor-model-parallel-size", "2", "--sequence-parallel")
PIPELINE = ("--pipeline-model-parallel-size", "2")
ZERO1 = ("--use-distributed-optimizer",)
EXPERTS = ("--expert-model-parallel-size", "2", "--expert-tensor-parallel-size", "1")
BFLOAT16 = ("--train-dtype", "bfloat16")
RESHARDED = {
    "tensor to pipeline": ("dense", TENSOR, PIPELINE),
    "sharded optimizer to tensor": ("dense", ZERO1, TENSOR),
    "experts to experts split by tensor": ("mixture", (*EXPERTS, *ZERO1), TENSOR),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "dense": save_vision_model(folder / "dense"),
        "mixture": save_mixture_model(folder / "mixture"),
    }


def job(
    rollouts: int, *flags: str, load: Path | None = None, save: Path | None = None, model: Path | None = None
) -> Job:
    samples, pictures = make_samples(4)
    return Job(
        (*FLAGS, *flags),
        samples,
        pictures,
        rollouts,
        load=load and str(load),
        save=save and str(save),
        model=model,
    )


@pytest.fixture(scope="module")
def whole(models: dict[str, Path]) -> dict[str, Outcome]:
    """Three steps without a break, by FSDP."""
    return {name: train(path, job(3)) for name, path in models.items()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("saved")


@pytest.fixture(scope="module")
def resumed(
    models: dict[str, Path], saved: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[Outcome]]:
    """Two steps and a checkpoint, then the third step under another parallelism, on two ranks."""
    jobs = []
    for name, (model, before, after) in RESHARDED.items():
        jobs.append(job(2, *MEGATRON, *before, save=saved / name, model=models[model]))
        jobs.append(job(1, *MEGATRON, *after, load=saved / name, model=models[model]))
    outcomes = train_on_ranks(Path("unused"), jobs, tmp_path_factory.mktemp("ranks"))
    return dict(zip(RESHARDED, outcomes[1::2], strict=True))


def assert_goes_on(outcome: Outcome, whole: Outcome) -> None:
    for name in ("loss", "grad_norm", "lr"):
        assert outcome.metrics[-1][name] == pytest.approx(whole.metrics[-1][name], rel=1e-3), name
    for name, weight in whole.weights.items():
        torch.testing.assert_close(outcome.weights[name], weight, rtol=0, atol=2e-5, msg=name)


@pytest.mark.parametrize("name", RESHARDED)
def test_a_run_goes_on_under_another_parallelism(
    whole: dict[str, Outcome], resumed: dict[str, list[Outcome]], name: str
) -> None:
    for outcome in resumed[name]:
        assert_goes_on(outcome, whole[RESHARDED[name][0]])


@pytest.mark.parametrize("name", RESHARDED)
@pytest.mark.usefixtures("resumed")
def test_ranks_share_the_writing(models: dict[str, Path], saved: Path, name: str) -> None:
    whole = load_file(models[RESHARDED[name][0]] / "model.safetensors")
    for kind in KINDS:
        parts = [load_file(path) for path in sorted((saved / name / kind).iterdir())]
        first, second = (sum(tensor.nbytes for tensor in part.values()) for part in parts)
        assert abs(first - second) <= max(tensor.nbytes for tensor in whole.values()) * 2
        assert sorted(source for part in parts for source in part) == sorted(whole)


@pytest.mark.parametrize("name", RESHARDED)
@pytest.mark.usefixtures("resumed")
def test_a_run_goes_on_on_one_rank(
    models: dict[str, Path], whole: dict[str, Outcome], saved: Path, name: str
) -> None:
    model = RESHARDED[name][0]
    assert_goes_on(train(models[model], job(1, *MEGATRON, load=saved / name)), whole[model])


def test_the_comparison_can_see(models: dict[str, Path], whole: dict[str, Outcome]) -> None:
    """Adam's means and the step count matter at the third step."""
    fresh = train(models["dense"], job(1, *MEGATRON))
    assert fresh.metrics[-1]["lr"] != whole["dense"].metrics[-1]["lr"]
    assert abs(fresh.metrics[-1]["loss"] - whole["dense"].metrics[-1]["loss"]) > 1e-2


def test_a_run_goes_on_in_the_fused_kernel(
    models: dict[str, Path], whole: dict[str, Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which a GPU without TransformerEngine has; its step counts are elsewhere."""
    stepped: list[bool] = []
    module: Any = import_module("torch.optim.adam")
    kernel = module.adam

    def adam(*arguments: Any, **settings: Any) -> None:
        stepped.append(bool(settings["fused"]))
        kernel(*arguments, **settings)

    monkeypatch.setattr(module, "adam", adam)
    monkeypatch.setattr("slime.backends.megatron.optimizer.fuses", lambda _: True)
    train(models["dense"], job(2, *MEGATRON, save=tmp_path))
    assert_goes_on(train(models["dense"], job(1, *MEGATRON, load=tmp_path)), whole["dense"])
    assert stepped
    assert all(stepped)


@pytest.mark.parametrize(("flags", "dtype"), [((), torch.float32), (BFLOAT16, torch.bfloat16)])
def test_alone_a_run_goes_on_bit_for_bit(
    models: dict[str, Path], tmp_path: Path, flags: tuple[str, ...], dtype: torch.dtype
) -> None:
    """Half precision too: its master weights are kept."""
    unbroken = train(models["dense"], job(3, *MEGATRON, *flags))
    train(models["dense"], job(2, *MEGATRON, *flags, save=tmp_path))
    outcome = train(models["dense"], job(1, *MEGATRON, *flags, load=tmp_path))
    assert outcome.metrics[-1] == unbroken.metrics[-1]
    for name, weight in unbroken.weights.items():
        assert weight.dtype == dtype
        assert torch.equal(outcome.weights[name], weight), name


@pytest.mark.parametrize("sharded", [(), ZERO1], ids=["whole", "sharded"])
def test_master_weights_are_the_checkpoints_own(
    models: dict[str, Path], tmp_path: Path, sharded: tuple[str, ...]
) -> None:
    """Those of a float32 checkpoint are not rounded to the precision of the forward pass."""
    train(models["mixture"], job(0, *MEGATRON, *BFLOAT16, *sharded, save=tmp_path))
    masters = load_file(tmp_path / "master" / "00000-00000.safetensors")
    weights = load_file(models["mixture"] / "model.safetensors")
    assert masters.keys() == weights.keys()
    assert all(torch.equal(masters[name], weight) for name, weight in weights.items())


def test_a_folder_without_checkpoint_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    with (
        joined_backend(make_args(models["dense"], *FLAGS, *MEGATRON)) as backend,
        pytest.raises(FileNotFoundError, match="--load takes"),
    ):
        backend.load_checkpoint(tmp_path)


def test_a_checkpoint_of_another_model_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    """One with more of everything, of which slices could be read."""
    save, flags = tmp_path / "saved", (*FLAGS, *MEGATRON)
    train(models["dense"], job(0, *MEGATRON, save=save))
    smaller = save_vision_model(tmp_path / "smaller", ffn=16)
    reason = r"not of the model .*: .*mlp\.gate_proj\.weight is \(128, 48\) and should be \(16, 48\)"
    with joined_backend(make_args(smaller, *flags)) as backend, pytest.raises(ValueError, match=reason):
        backend.load_checkpoint(save)
