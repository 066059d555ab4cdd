"""The launcher and the real preflight: all that is wrong is said at once, and nothing is started."""

from __future__ import annotations

import json
import shutil
import socket
import sys
from pathlib import Path

from slime.engines.process import free_port
from slime.tiny.paths import checkpoint_path
from tests.fakes.launcher import Machine
from tests.fakes.processes import PATIENCE_SECONDS

PREFLIGHT = "slime.preflight"
TEACHERS = ("slime.engines.transformers_engine", "slime.engines.sglang_engine")
DRIVER = "slime.train"
SPLITS = ("train", "test")


def ready(root: Path, gpus: int = 0, *, gpu_mebibytes_used: int = 4) -> Machine:
    """Return a machine with real models and data, on which the preflight is the real one."""
    machine = Machine(root, gpus, gpu_mebibytes_used=gpu_mebibytes_used)
    machine.environment |= {"PREFLIGHT_PLAYS": "real", "TEACHER_PLAYS": "serve"}
    for name in ("student", "teacher"):
        shutil.copytree(checkpoint_path(name), root / name, dirs_exist_ok=True)
    rows = [{"problem": f"{n} + {n}?", "answer": str(2 * n), "images": []} for n in range(4)]
    for split in SPLITS:
        write_rows(machine, split, rows)
    return machine


def write_rows(machine: Machine, split: str, rows: list[dict[str, object]]) -> None:
    (machine.data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(machine: Machine, **knobs: str) -> tuple[int, str, str]:
    """Run the launcher to its end; return status, stdout and stderr."""
    knobs = {"TEACHER_PORT": str(free_port()), "OUTPUT_DIR": str(machine.root / "out")} | knobs
    launcher = machine.start(SKIP_SETUP="1", **machine.local() | knobs)
    stdout, stderr = launcher.communicate(timeout=PATIENCE_SECONDS)
    return launcher.returncode, stdout, stderr


def findings(stderr: str) -> dict[str, tuple[str, str]]:
    """Return (what, remedy) of each error that the preflight lists, by its check."""
    lines = stderr.splitlines()
    return {
        line.split(":")[0].removeprefix("  error, "): (line, lines[place + 1])
        for place, line in enumerate(lines)
        if line.startswith("  error, ")
    }


def test_where_all_is_well_it_is_one_line_and_the_run_starts(tmp_path: Path) -> None:
    machine = ready(tmp_path)
    status, stdout, stderr = run(machine)
    assert status == 0, stderr
    (line,) = [line for line in stdout.splitlines() if line.startswith("Preflight: ")]
    assert line == "Preflight: 9 checks passed." or line.startswith("Preflight: 9 checks passed, with ")
    assert len(machine.pids(PREFLIGHT)) == len(machine.pids(DRIVER)) == 1


def test_all_that_is_wrong_is_listed_at_once_with_remedies_and_nothing_is_started(tmp_path: Path) -> None:
    """A taken port, a folder that is a file, a cut weight file, a teacher of another vocabulary, a missing
    column, and a GPU that is not there: six mistakes of six kinds."""
    machine = ready(tmp_path, gpus=2)
    machine.environment["CUDA_VISIBLE_DEVICES"] = "0,7"
    weights = machine.student / "model.safetensors"
    whole = weights.stat().st_size
    with weights.open("r+b") as file:
        file.truncate(whole - 1000)
    swap_tokens(machine.teacher / "tokenizer.json")
    write_rows(machine, "test", [{"question": "2 + 2?", "answer": "4", "images": []}])
    (tmp_path / "file").touch()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, stdout, stderr = run(
            machine, NUM_GPUS="2", TEACHER_PORT=str(port), OUTPUT_DIR=str(tmp_path / "file" / "out")
        )
    assert status == 1
    found = findings(stderr)
    assert found.keys() >= {"GPUs", "folders", "ports", "models", "tokens", "data"}, stderr
    assert f"port {port}, where the teacher is to listen, is taken by " in found["ports"][0]
    assert "SLIME_SCRIPT_TEACHER_PORT" in found["ports"][1]
    assert f"{tmp_path}/file is a file" in found["folders"][0]
    assert "SLIME_SCRIPT_OUTPUT_DIR" in found["folders"][1]
    assert f"has {whole - 1000} bytes and its header speaks of {whole}" in found["models"][0]
    assert "ids are other tokens" in found["tokens"][0]
    assert "--eval-prompt-data test: 1 of the first 1 rows cannot be used" in found["data"][0]
    assert "no column 'problem' (--input-key)" in found["data"][0]
    assert "GPU 7 is not there; the driver lists 0, 1" in found["GPUs"][0]
    assert "CUDA_VISIBLE_DEVICES" in found["GPUs"][1]
    assert all(remedy.startswith("    remedy: ") for _, remedy in found.values())
    assert "this run cannot work here" in stderr
    assert "SLIME_SCRIPT_SKIP_PREFLIGHT=1" in stderr
    assert not any(machine.pids(name) for name in (*TEACHERS, DRIVER, "slime.engines.doctor"))
    assert "Starting the teacher" not in stdout


def swap_tokens(path: Path) -> None:
    """Exchange the ids of two ordinary tokens."""
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, other = [token for token in vocabulary if token.isalnum()][:2]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    path.write_text(json.dumps(tokenizer))


def test_a_gpu_that_others_use_is_a_warning_while_the_model_fits(tmp_path: Path) -> None:
    machine = ready(tmp_path, gpus=1, gpu_mebibytes_used=60000)
    status, stdout, _ = run(machine)
    assert status == 0
    assert "warning, GPUs: GPU 0 (Stand-in) is in use: 58.6 GiB of 79.6 GiB are taken" in stdout
    assert machine.pids(DRIVER)


def test_room_for_downloads_is_looked_at_before_them(tmp_path: Path) -> None:
    """A model far larger than any disk is not even begun."""
    machine = ready(tmp_path)
    program = Path(machine.environment["VIRTUAL_ENV"]) / "bin" / "hf"
    program.write_text(f"#!{sys.executable}\nimport os; open(os.environ['STAGE'] + '/hf', 'w')\n")
    program.chmod(0o755)
    status, stdout, stderr = run(machine, STUDENT_MODEL="nobody/Huge-900000B")
    assert status == 1
    assert "the download of nobody/Huge-900000B " in findings(stderr)["disk"][0]
    assert "Downloading" not in stdout
    assert not (machine.stage / "hf").exists()


def test_the_preflight_can_be_left_out_and_a_dry_run_prints_it(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.environment |= {"PREFLIGHT_PLAYS": "fail", "TEACHER_PLAYS": "serve"}
    status, _, stderr = run(machine, SKIP_PREFLIGHT="1")
    assert status == 0, stderr
    assert not machine.pids(PREFLIGHT)
    words = machine.dry_run(**machine.local()).arguments(PREFLIGHT)
    assert words[words.index("--teacher-path") + 1] == str(machine.teacher)
    assert words[words.index("--hf-checkpoint") + 1] == str(machine.student)
    assert words.index("--teacher-port") < words.index("--") < words.index("--hf-checkpoint")
