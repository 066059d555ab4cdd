"""The command line and environment of a real SGLang server: built, checked, printed, never started here."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from slime.engines.sglang_engine import main, require_sglang, sglang_command, sglang_python
from slime.engines.sglang_serve import ADMIN_KEY_VARIABLE, API_KEY_VARIABLE

ROOT = Path(__file__).parents[3]
BASE = {"PATH": "/bin", "SLIME_SGLANG_PYTHON": "/opt/sglang/python"}


def value_of(argv: list[str], flag: str) -> str:
    """Return what `flag` is set to: the last one given, as SGLang's parser has it."""
    return argv[len(argv) - 1 - argv[::-1].index(flag) + 1]


def test_a_teacher_on_eight_gpus():
    argv, env = sglang_command("Qwen/T", 13141, role="teacher", gpus=range(8), tp=8, env=BASE)
    assert argv[0] == "/opt/sglang/python"
    assert Path(argv[2]).name == "sglang_serve.py"
    assert value_of(argv, "--model-path") == "Qwen/T"
    assert value_of(argv, "--host") == "127.0.0.1"
    assert value_of(argv, "--port") == "13141"
    assert value_of(argv, "--tp-size") == "8"
    assert value_of(argv, "--image-processor-backend") == "pil"
    assert value_of(argv, "--chunked-prefill-size") == "8192"
    assert "--enable-fp32-lm-head" in argv
    assert "--device" not in argv
    assert "--dtype" not in argv
    assert env["CUDA_VISIBLE_DEVICES"] == "0,1,2,3,4,5,6,7"
    assert env["SGLANG_VLM_CACHE_SIZE_MB"] == "2048"
    assert int(env["SGLANG_TIMEOUT_KEEP_ALIVE"]) > 60
    assert "SGLANG_USE_CPU_ENGINE" not in env
    assert "HF_HUB_OFFLINE" not in env


def test_a_student_engine_never_keeps_vision_embeddings():
    kept = {**BASE, "SGLANG_VLM_CACHE_SIZE_MB": "100"}
    argv, env = sglang_command("m", 1, role="student", gpus=[8], env=kept)
    assert env["SGLANG_VLM_CACHE_SIZE_MB"] == "0"
    assert env["CUDA_VISIBLE_DEVICES"] == "8"
    assert "--enable-fp32-lm-head" not in argv
    assert sglang_command("m", 1, role="student", env=kept)[1]["SGLANG_VLM_CACHE_SIZE_MB"] == "0"
    assert sglang_command("m", 1, role="teacher", gpus=[0], env=kept)[1]["SGLANG_VLM_CACHE_SIZE_MB"] == "100"


def test_a_server_on_the_cpu(tmp_path):
    base = {**BASE, "PYTHONPATH": "/our/packages", "PYTHONHOME": "/our/python"}
    argv, env = sglang_command(str(tmp_path), 1, threads=2, env=base)
    assert value_of(argv, "--device") == "cpu"
    assert value_of(argv, "--attention-backend") == "torch_native"
    assert value_of(argv, "--dtype") == "float32"
    assert env["SGLANG_USE_CPU_ENGINE"] == "1"
    assert env["CUDA_VISIBLE_DEVICES"] == ""
    assert env["OMP_NUM_THREADS"] == "2"
    assert env["HF_HUB_OFFLINE"] == env["TRANSFORMERS_OFFLINE"] == "1"
    assert "PYTHONHOME" not in env
    (stand_ins,) = env["PYTHONPATH"].split(os.pathsep)
    assert {path.name for path in Path(stand_ins).iterdir()} >= {"sgl_kernel", "torchvision_operators.py"}


def test_what_the_user_passes_wins():
    argv, _ = sglang_command("m", 1, dtype="bfloat16", extra_args=["--max-running-requests", "7"], env=BASE)
    assert value_of(argv, "--dtype") == "bfloat16"
    assert value_of(argv, "--max-running-requests") == "7"


def test_keys_travel_by_environment_only():
    chosen = {**BASE, ADMIN_KEY_VARIABLE: "s3cret", API_KEY_VARIABLE: "other"}
    argv, env = sglang_command("m", 1, env=chosen)
    assert env[ADMIN_KEY_VARIABLE] == "s3cret"
    assert env[API_KEY_VARIABLE] == "other"
    assert not any("s3cret" in word or "other" in word for word in argv)

    first, second = (sglang_command("m", 1, env=BASE)[1][ADMIN_KEY_VARIABLE] for _ in range(2))
    assert len(first) >= 32
    assert first != second
    assert ADMIN_KEY_VARIABLE not in BASE


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tp": 2}, "--tp 2 splits the model over GPUs, and none are given"),
        ({"gpus": [0, 1], "tp": 4}, r"--tp 4 needs 4 GPUs, but --gpus gives \[0, 1\]"),
        ({"extra_args": ["--admin-api-key", "k"]}, "--admin-api-key would show the key"),
        ({"extra_args": ["--api-key=k"]}, "--api-key would show the key"),
        ({"host": "0.0.0.0"}, "--host 0.0.0.0 can be reached from other machines"),
    ],
)
def test_what_cannot_work_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        sglang_command("m", 1, env=BASE, **settings)


def test_an_open_host_is_allowed_with_a_key():
    argv, _ = sglang_command("m", 1, host="0.0.0.0", env={**BASE, API_KEY_VARIABLE: "k"})
    assert value_of(argv, "--host") == "0.0.0.0"


def test_which_python_has_sglang():
    assert sglang_python({}, on_cpu=False) == sys.executable
    assert sglang_python({}, on_cpu=True) == str(ROOT / ".venv-sglang" / "bin" / "python")
    assert sglang_python({"SLIME_SGLANG_ENV": "/e"}, on_cpu=True) == "/e/bin/python"
    assert sglang_python(BASE, on_cpu=True) == sglang_python(BASE, on_cpu=False) == "/opt/sglang/python"


@pytest.mark.parametrize(
    ("on_cpu", "remedy"), [(True, "scripts/setup.sh --sglang-cpu"), (False, "extra `gpu`")]
)
@pytest.mark.parametrize("broken", ["missing", "without sglang"])
def test_a_missing_sglang_is_explained(tmp_path, on_cpu, remedy, broken):
    python = tmp_path / "python"
    if broken == "without sglang":
        python.write_text("#!/bin/sh\nexit 1\n")
        python.chmod(0o755)
    with pytest.raises(RuntimeError, match="SGLang is not installed for") as error:
        require_sglang({"SLIME_SGLANG_PYTHON": str(python)}, on_cpu=on_cpu)
    assert str(python) in str(error.value)
    assert remedy in str(error.value)


def test_the_command_prints_what_it_would_run(capsys, monkeypatch):
    monkeypatch.setenv("SLIME_SGLANG_PYTHON", "/opt/sglang/python")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    arguments = ["--model-path", "Qwen/T", "--port", "13141", "--tp", "2", "--role", "teacher", "--dry-run"]
    assert main([*arguments, "--mem-fraction-static", "0.8"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("SGLang (teacher) on GPUs 4,5: /opt/sglang/python ")
    assert line.endswith("--mem-fraction-static 0.8")
    assert main([*arguments, "--gpus", "8,9"]) == 0
    assert "on GPUs 8,9:" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--tp", "2"], ["--admin-api-key", "k"], ["--gpus", "GPU-1f"]])
def test_the_command_refuses_with_a_message(capsys, monkeypatch, arguments):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(SystemExit) as ended:
        main(["--model-path", "m", "--port", "1", *arguments])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("python -m slime.engines.sglang_engine: ")
    assert arguments[0] in error


def test_the_command_says_that_sglang_is_missing(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("SLIME_SGLANG_PYTHON", str(tmp_path / "none"))
    with pytest.raises(SystemExit) as ended:
        main(["--model-path", "m", "--port", "1", "--gpus", ""])
    assert ended.value.code == 2
    assert "SGLang is not installed" in capsys.readouterr().err


@pytest.mark.parametrize("stop", ["signal", "end of the parent"])
def test_the_command_supervises_its_server(tmp_path, stop):
    """A stand-in for SGLang's Python shows what runs, and that its key is on no command line."""
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\ncase "$*" in *find_spec*) exit 0;; esac\n'
        'echo "args $*"\necho "key ${SLIME_ENGINE_ADMIN_KEY}"\necho "pid $$"\nexec sleep 600\n'
    )
    python.chmod(0o755)
    log = tmp_path / "log"
    arguments = ["--model-path", "m", "--port", "31000", "--gpus", "", "--end-with-parent"]
    # A shell in between is the parent that dies.
    shell = 'exec 3>&1; "$@" >"$LOG" 2>&1 & echo $! >&3; exec 3>&-; wait'
    command = [sys.executable, "-m", "slime.engines.sglang_engine", *arguments]
    env = {
        **os.environ,
        "SLIME_SGLANG_PYTHON": str(python),
        "SLIME_ENGINE_ADMIN_KEY": "s3cret",
        "LOG": str(log),
    }
    with subprocess.Popen(
        ["bash", "-c", shell, "_", *command], cwd=ROOT, env=env, stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None
        supervisor = psutil.Process(int(parent.stdout.readline()))
        while "pid " not in (text := log.read_text() if log.exists() else ""):
            assert supervisor.is_running(), text
            time.sleep(0.02)
        server = psutil.Process(int(text.rsplit("pid ", 1)[1]))
        assert "key s3cret" in text
        assert "s3cret" not in text.replace("key s3cret", "")
        assert "SGLang (student) on the CPU: " in text
        if stop == "signal":
            supervisor.terminate()
        else:
            parent.kill()
        psutil.wait_procs([server, supervisor], timeout=120)
    assert not server.is_running()
    assert not supervisor.is_running()


def test_importing_the_engine_imports_nothing_heavy():
    heavy = "{'sglang', 'torch', 'ray', 'transformers'} & set(sys.modules)"
    heavy = f"import sys, slime.engines.process; print(sorted({heavy}))"
    answer = subprocess.run(
        [sys.executable, "-c", heavy], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert answer.stdout.strip() == "[]"


def test_the_cpu_defaults_hold_a_whole_rollout():
    argv, _ = sglang_command("m", 1, env=BASE)
    assert int(value_of(argv, "--max-running-requests")) >= 128
    assert int(value_of(argv, "--max-total-tokens")) >= 128 * 256
