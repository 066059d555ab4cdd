"""The GPU checks, run through on the CPU: they pass here, fail where something is wrong, and say why.

What they find on a GPU is not tested here.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from scripts.benchmarks.training.processes import NoRoomError, Worker
from scripts.benchmarks.training.published import SHAPES, build_config, checkpoint_bytes
from scripts.checks.gpu import __main__ as command
from scripts.checks.gpu import attention, losses, room, throughput, trainer_step
from scripts.checks.gpu.registry import CHECKS
from scripts.checks.gpu.report import all_passed, summary, table
from scripts.checks.gpu.result import Row, at_least, failed, measured, skipped, within
from scripts.checks.gpu.setting import CPU, Setting
from slime.backends.attention import borders, packed_attention

REPOSITORY = Path(__file__).parents[3]
SCRIPT = REPOSITORY / "scripts" / "check_gpu.sh"


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(device=CPU, tiny=True, scratch=tmp_path_factory.mktemp("scratch"))


def statuses(rows: list[Row]) -> list[str]:
    return [row.status for row in rows]


# ---- the checks ----


def test_losses_pass_and_a_wrong_divergence_does_not(setting, monkeypatch):
    rows = list(losses.run(setting))
    assert statuses(rows) == ["passed"] * 8
    right = losses.bucketed_divergence
    monkeypatch.setattr(losses, "bucketed_divergence", lambda *parts: 1.001 * right(*parts))
    assert statuses(list(losses.run(setting))) == ["failed"] * 3 + ["passed"] * 5, "against the formulas"


def test_attention_passes_but_for_the_kernel(setting):
    rows = list(attention.run(setting))
    assert statuses(rows) == ["passed"] * 5 + ["skipped"]
    assert rows[-1].what == "torch's flash attention ran"
    assert all(0 < float(row.found) < 0.01 for row in rows[:4]), "bfloat16 is not exact"
    assert rows[4].found == "0"


def test_attention_that_lets_samples_see_each_other_fails(setting, monkeypatch):
    def in_one_piece(*states: Any, lengths: tuple[int, ...], scaling: float, **_: Any) -> tuple[Tensor, None]:
        return packed_attention(*states, scaling=scaling, **borders((sum(lengths),), CPU))

    monkeypatch.setattr(attention, "packed_attention", in_one_piece)
    rows = list(attention.run(setting))
    assert statuses(rows) == ["failed"] * 5 + ["skipped"]


def test_calls_of_the_kernel_are_counted(monkeypatch):
    from slime.backends import attention as ours

    monkeypatch.setattr(ours, "varlen_attn", lambda number: number + 1)
    kernel: Any = ours
    with attention.counted_flash_calls() as calls:
        assert kernel.varlen_attn(1) == 2
    assert calls == [1]
    assert kernel.varlen_attn(1) == 2
    assert calls == [1]


def test_trainer_step_is_the_same_in_float32_and_near_it_in_bfloat16(setting):
    rows = list(trainer_step.run(setting))
    assert statuses(rows) == ["passed"] * 6
    exact, rounded = rows[:3], rows[3:]
    assert [float(row.found) for row in exact] == [0, 0, 0]
    assert all(float(row.found) > 1e-4 for row in rounded), "as if the same had been computed twice"


def test_a_gap_in_the_weights_counts_as_a_share_of_their_change():
    expected = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([[4.0]])}
    found = {"a": torch.tensor([3.0, 0.3]), "b": torch.tensor([[4.4]])}
    assert trainer_step._distance(found, expected) == pytest.approx(0.1)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["losses", "attention", "trainer"])
def test_a_check_passes_on_a_gpu(name: str, tmp_path: Path):
    setting = Setting(device=torch.device("cuda", 0), tiny=False, scratch=tmp_path)
    rows = list(CHECKS[name].function()(setting))
    assert [row for row in rows if row.status not in ("passed", "measured")] == []


# ---- sizes ----


def test_published_shapes():
    text = build_config(SHAPES["4B"]).get_text_config()
    assert (text.num_attention_heads, text.num_key_value_heads, text.head_dim) == (32, 8, 128)
    assert text.rope_parameters["mrope_section"] == [24, 20, 20]
    assert checkpoint_bytes("2B") / 2e9 == pytest.approx(2.13, abs=0.01)
    assert checkpoint_bytes("4B") / 2e9 == pytest.approx(4.44, abs=0.01)


def test_the_step_is_as_large_as_the_docs_say():
    shape = throughput.step_shape("2B")
    assert (shape.total, shape.prompt, shape.tokens, shape.padded_tokens) == (32, 232, 23_513, 44_416)


def test_a_small_disk_or_gpu_is_a_reason_to_skip(setting, monkeypatch):
    assert room.lacking(setting, "tiny", served=True) == ""
    monkeypatch.setattr(room.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**30))
    assert room.lacking(setting, "2B").startswith("too little disk: 4.4 GiB are needed, 1.0 are free in ")
    [row] = throughput._measure(setting, "2B")
    assert row.status == "skipped"
    monkeypatch.setattr(room.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**40))
    host = SimpleNamespace(available=30 * 2**30)
    monkeypatch.setattr(room.psutil, "virtual_memory", lambda: host)
    assert room.lacking(setting, "2B", served=True) == (
        "too little memory of the host: 48 GiB are needed, 30 are free"
    )
    host.available = 2**38
    monkeypatch.setattr(room.torch.cuda, "mem_get_info", lambda _: (40 * 2**30, 48 * 2**30))
    on_gpu = Setting(device=torch.device("cuda", 0), tiny=False, scratch=setting.scratch)
    assert room.lacking(on_gpu, "2B") == ""
    assert room.lacking(on_gpu, "4B") == ("too little memory: about 71 GiB are needed, 40 of 48 are free")


def test_a_way_that_does_not_fit_says_so():
    program = "print('a word of a library'); input(); print('{\"out_of_memory\": \"2 GiB too few\"}')"
    with (
        subprocess.Popen(
            [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process,
        pytest.raises(NoRoomError, match="2 GiB too few"),
    ):
        Worker(process, "plain").turn()


# ---- rows, table, command ----


def test_only_what_holds_passes():
    assert within("c", "w", 1.0, 1.0).status == "passed"
    assert within("c", "w", 1.1, 1.0).status == "failed"
    assert within("c", "w", math.nan, 1.0).status == "failed"
    assert at_least("c", "w", 1.0, 1.0).status == "passed"
    assert at_least("c", "w", math.nan, 1.0).status == "failed"
    good = [within("c", "w", 0, 1), measured("c", "w", "3 GiB")]
    assert all_passed(good)
    assert not all_passed([*good, skipped("c", "w", "why")])
    assert not all_passed([*good, failed("c", "w", "why")])
    assert summary([*good, skipped("c", "w", "why")]) == "1 passed, 0 failed, 1 skipped."


def test_a_row_stays_one_line_of_the_table():
    lines = table([failed("engine", "release", "400:\n {a|b}"), within("losses", "gap", 0.5, 1)]).splitlines()
    assert lines[2] == "| engine | release |  |  | **FAILED**: 400: {a/b} |"
    assert lines[3] == "| losses | gap | 0.5 | ≤ 1 | passed |"


def options(**changes: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"device": "cpu", "tiny": True} | changes)


def test_a_check_that_crashes_or_takes_too_long_is_a_failed_row(tmp_path, monkeypatch):
    [row] = command.run_check(CHECKS["engine"], options(), tmp_path, 0.2)
    assert (row.status, row.check) == ("failed", "engine")
    assert row.why.startswith("took more than 0 s")
    (tmp_path / "losses.json").write_text('{"check": "losses", "what": "b", "status": "passed"}\n')
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    rows = command.run_check(CHECKS["losses"], options(), tmp_path, 60)
    assert [(row.status, row.why) for row in rows] == [
        ("passed", ""),
        ("failed", "ended with status 1: it said nothing"),
    ]


def test_rows_before_a_crash_are_kept(tmp_path):
    path = tmp_path / "rows"
    assert command.read_rows(path) == []
    path.write_text('{"check": "a", "what": "b", "status": "passed"}\n{"check": "a", "wh')
    assert command.read_rows(path) == [Row(check="a", what="b", status="passed")]


def run_script(*arguments: str, timeout: float) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"VIRTUAL_ENV": sys.prefix, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )


def test_without_a_gpu_it_says_so():
    done = run_script("--only", "losses", timeout=500)
    assert done.returncode == 1
    assert "sees no GPU (CUDA_VISIBLE_DEVICES is '')" in done.stderr
    assert "bash scripts/check_gpu.sh --device cpu --tiny" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_all_checks_run_on_the_cpu_and_only_a_gpus_matters_are_left_out(tmp_path):
    out = tmp_path / "table.md"
    done = run_script("--device", "cpu", "--tiny", "--out", str(out), timeout=580)
    assert done.returncode == 1, "what was skipped has not passed"
    text = out.read_text()
    assert text in done.stdout
    assert "FAILED" not in text, done.stdout
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")][1:]
    assert {row[0] for row in rows} == {
        "losses",
        "packed attention",
        "trainer step",
        "engine",
        "training step",
    }
    left_out = [row[1] for row in rows if "**skipped**" in row[-1]]
    assert left_out[0] == "torch's flash attention ran"
    assert all(", GiB " in what for what in left_out[1:]), left_out
    assert len(left_out) == 6
    agreed = [row[1] for row in rows if row[0] == "engine" and " gap of " in row[1]]
    assert len(agreed) == 8
    assert sum("after a turn of colocation" in what for what in agreed) == 4
