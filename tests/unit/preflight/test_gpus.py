"""What is said of the GPUs; the driver is a stand-in on the path."""

from __future__ import annotations

from pathlib import Path

import pytest

from slime.preflight.finding import GIB, Finding
from slime.preflight.gpus import DriverError, check_gpus, query_gpus
from slime.preflight.launch import Launch
from tests.fakes.launches import launch, teacher, write_model

LINE = "{index}, GPU-{index}abc, NVIDIA H100 80GB HBM3, {total}, {used}, 580.65.06"


def nvidia_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    """Put a driver onto the path that answers so."""
    program = folder / "programs" / "nvidia-smi"
    program.parent.mkdir(exist_ok=True)
    program.write_text("#!/bin/sh\ncat <<'END'\n" + "\n".join(lines) + "\nEND\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/bin:/usr/bin")


def machine(count: int, total: int = 81559, used: int = 4) -> list[str]:
    return [LINE.format(index=index, total=total, used=used) for index in range(count)]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """16 MiB of parameters: 256 MiB to train, 32 MiB to serve."""
    return write_model(tmp_path / "model", {"a": [2**12, 2**12]})


def found(launch: Launch) -> list[Finding]:
    return list(check_gpus(launch))


def run(model: Path, *flags: str, gpus: tuple[str, ...] = ("1", "2")) -> Launch:
    flags = (*("--actor-num-gpus-per-node", "1", "--rollout-num-gpus", "1"), *flags)
    return launch(*flags, student=model, student_gpus=gpus, teacher=teacher(model, "0"))


def test_the_driver_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi(tmp_path, monkeypatch, *machine(2, total=1024, used=10))
    first, second = query_gpus()
    assert (first.index, first.name, first.total, first.used) == (
        "0",
        "NVIDIA H100 80GB HBM3",
        GIB,
        10 * 2**20,
    )
    assert second.is_called("1")
    assert second.is_called("GPU-1a")
    assert not second.is_called("0")
    assert not second.is_called("GPU-0abc")
    nvidia_smi(tmp_path, monkeypatch, "Failed to initialize NVML: Driver/library version mismatch")
    with pytest.raises(DriverError, match="Failed to initialize NVML"):
        query_gpus()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DriverError, match="no nvidia-smi"):
        query_gpus()


def test_gpus_that_are_there_and_free_are_no_news(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Path
) -> None:
    nvidia_smi(tmp_path, monkeypatch, *machine(3))
    assert found(run(model)) == []
    assert found(run(model, gpus=("GPU-1abc", "MIG-1"))) == []
    monkeypatch.setenv("PATH", "")
    assert found(launch(student=model)) == [], "nobody asks for a driver without GPUs"


def test_no_driver_is_an_error_where_gpus_are_given_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (finding,) = found(run(model))
    assert finding.fatal
    assert finding.what == "there is no nvidia-smi here, and the run is given 3 GPUs (0, 1, 2)"
    assert "SLIME_SCRIPT_NUM_GPUS=0" in finding.remedy


def test_a_gpu_that_is_not_there_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Path
) -> None:
    nvidia_smi(tmp_path, monkeypatch, *machine(2))
    (finding,) = found(run(model))
    assert finding.fatal
    assert finding.what == "GPU 2 is not there; the driver lists 0, 1"


@pytest.mark.parametrize(("total", "fatal"), [(300, None), (270, False), (255, True)])
def test_memory_that_surely_does_not_do_is_an_error_and_little_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Path, total: int, fatal: bool | None
) -> None:
    nvidia_smi(tmp_path, monkeypatch, *machine(3, total=total, used=0))
    findings = found(run(model))
    assert [finding.fatal for finding in findings] == ([] if fatal is None else [fatal])
    for finding in findings:
        assert finding.what == (
            f"GPU 1 (NVIDIA H100 80GB HBM3) has {total / 1024:.1f} GiB, and at least 0.2 GiB are needed: "
            "training 0.2 GiB, activations not counted"
        )


@pytest.mark.parametrize(("used", "fatal"), [(2000, None), (3000, False), (3900, True)])
def test_memory_that_others_use_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Path, used: int, fatal: bool | None
) -> None:
    nvidia_smi(tmp_path, monkeypatch, *machine(1, total=4096, used=4), *machine(3, total=4096, used=used)[1:])
    by_gpu = {finding.what.split()[1]: finding.fatal for finding in found(run(model))}
    # the engine's 32 MiB fit beside 3900 of 4096
    assert by_gpu == ({} if fatal is None else {"1": fatal, "2": False})


def test_a_split_that_the_flags_do_not_fit_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Path
) -> None:
    nvidia_smi(tmp_path, monkeypatch, *machine(3))
    (finding,) = found(run(model, "--rollout-num-gpus", "2"))
    assert finding.fatal
    assert finding.what.startswith("Ray sees 2 GPUs; 1 training ranks")


def test_a_driver_before_cuda_13_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Path
) -> None:
    nvidia_smi(tmp_path, monkeypatch, *(line.replace("580.65.06", "550.54.14") for line in machine(3)))
    (finding,) = found(run(model))
    assert not finding.fatal
    assert finding.what.startswith("the driver is 550.54.14, and CUDA 13")
