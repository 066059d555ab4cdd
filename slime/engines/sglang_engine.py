"""The command that starts a real SGLang server, on given GPUs or on a CPU.

`process.py` runs it for Ray's actors and the tests; `python -m slime.engines.sglang_engine --model-path …
--port …` runs it in the foreground for the launcher. Nothing here imports SGLang: without a GPU it lives in
an environment of its own (`scripts/setup.sh --sglang-cpu`), and its settings are its own, passed through as
they are.
"""

import argparse
import os
import secrets
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from slime.engines.sglang_serve import ADMIN_KEY_VARIABLE, API_KEY_VARIABLE, CHECK_FLAG, CPU_VARIABLE
from slime.engines.supervisor import Supervisor

Role = Literal["student", "teacher"]
LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")
PYTHON_VARIABLE = "SLIME_SGLANG_PYTHON"
ENVIRONMENT_VARIABLE = "SLIME_SGLANG_ENV"
CPU_GRACE_SECONDS = 1.0
GPU_GRACE_SECONDS = 40.0  # schedulers have 15 s of it to free their GPU memory; killed, they may keep it
_ENGINES = Path(__file__).parent
_SERVE = _ENGINES / "sglang_serve.py"
_STAND_INS = _ENGINES / "sglang_cpu"
_REPOSITORY = _ENGINES.parents[1]
_KEY_FLAGS = ("--api-key", "--admin-api-key")
# The trainer reads pictures with Pillow. SGLang's default, torchvision, resizes to slightly other pixels. A
# log line for each of a run's many thousand requests would bury what matters.
_COMMON_FLAGS = ("--image-processor-backend", "pil", "--log-level-http", "warning")
_CPU_FLAGS = (
    *("--device", "cpu", "--attention-backend", "torch_native", "--disable-overlap-schedule"),
    *("--cuda-graph-backend-decode", "disabled", "--cuda-graph-backend-prefill", "disabled"),
    *("--max-running-requests", "128", "--max-total-tokens", "65536", "--mem-fraction-static", "0.2"),
    "--sleep-on-idle",
)
# A teacher only scores. Its head in float32 keeps the log-probs from moving in steps of bfloat16, and prompts
# go through in pieces small enough that the logits of a long one fit beside the weights.
_GPU_TEACHER_FLAGS = ("--enable-fp32-lm-head", "--chunked-prefill-size", "8192")


def sglang_command(
    model_path: str,
    port: int,
    *,
    role: Role = "student",
    gpus: Sequence[int] | None = None,
    tp: int = 1,
    dtype: str | None = None,
    host: str = "127.0.0.1",
    threads: int = 1,
    extra_args: Sequence[str] = (),
    env: Mapping[str, str],
) -> tuple[list[str], dict[str, str]]:
    """Return the command and the complete environment of one SGLang server; start nothing.

    `gpus` are device numbers, None means the CPU with `threads` threads; `dtype` None is the checkpoint's on
    GPUs and float32 on a CPU; `extra_args` come last, so they win over what is chosen here; `env` is the
    environment to build on. Raise ValueError for GPUs that do not fit `tp`, a key among the arguments, or an
    open host without a key.
    """
    _check(gpus, tp, host, extra_args, env)
    on_cpu = gpus is None
    argv = [*_serve(env, on_cpu), "--model-path", model_path, "--host", host, "--port", str(port)]
    argv += ["--tp-size", str(tp), *_COMMON_FLAGS]
    if on_cpu:
        argv += _CPU_FLAGS
    elif role == "teacher":
        argv += _GPU_TEACHER_FLAGS
    chosen_dtype = dtype or ("float32" if on_cpu else None)
    if chosen_dtype is not None:
        argv += ["--dtype", chosen_dtype]
    return [*argv, *extra_args], _environment(env, model_path, role, gpus, threads)


def sglang_check_command(
    words: Sequence[str], *, gpus: Sequence[int] | None, env: Mapping[str, str]
) -> tuple[list[str], dict[str, str]]:
    """Return the command and the environment that ask the SGLang of such a server what it thinks of `words`.

    The parser wants a model's name and does not look at it.
    """
    argv = [*_serve(env, on_cpu=gpus is None), CHECK_FLAG, "--model-path", "any", *words]
    return argv, _environment(env, "any", "student", gpus, 1)


def _serve(env: Mapping[str, str], on_cpu: bool) -> list[str]:
    # -P: the folder of the file holds modules whose names must not hide those of the standard library
    return [sglang_python(env, on_cpu=on_cpu), "-P", str(_SERVE)]


def _check(
    gpus: Sequence[int] | None, tp: int, host: str, extra_args: Sequence[str], env: Mapping[str, str]
) -> None:
    if gpus is None and tp != 1:
        raise ValueError(f"--tp {tp} splits the model over GPUs, and none are given; use --tp 1 or --gpus.")
    if gpus is not None and len(gpus) < tp:
        raise ValueError(f"--tp {tp} needs {tp} GPUs, but --gpus gives {list(gpus)}; lower --tp or add GPUs.")
    for flag in _KEY_FLAGS:
        if any(argument == flag or argument.startswith(f"{flag}=") for argument in extra_args):
            raise ValueError(
                f"{flag} would show the key in every process list; set {ADMIN_KEY_VARIABLE} or "
                f"{API_KEY_VARIABLE} in the environment instead."
            )
    if host not in LOOPBACK_HOSTS and not env.get(API_KEY_VARIABLE):
        raise ValueError(
            f"--host {host} can be reached from other machines, and no key protects it; set "
            f"{API_KEY_VARIABLE} in the environment of the server and of the run, or use --host 127.0.0.1."
        )


def _environment(
    base: Mapping[str, str], model_path: str, role: Role, gpus: Sequence[int] | None, threads: int
) -> dict[str, str]:
    env = dict(base)
    env.setdefault(ADMIN_KEY_VARIABLE, secrets.token_hex(16))
    env["TOKENIZERS_PARALLELISM"] = "false"
    # By default an idle connection is closed after 5 s, just when a client that trained meanwhile sends
    # again.
    env.setdefault("SGLANG_TIMEOUT_KEEP_ALIVE", "120")
    # SGLang keeps the vision embeddings of pictures it has seen, over weight updates and flushes, so a
    # student's engine must keep none. A teacher's weights never change; it sees a prompt's picture once for
    # each of its samples.
    if role == "student":
        env["SGLANG_VLM_CACHE_SIZE_MB"] = "0"
    else:
        env.setdefault("SGLANG_VLM_CACHE_SIZE_MB", "256" if gpus is None else "2048")
    if Path(model_path).is_dir():
        env |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    if gpus is not None:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
        return env
    # SGLang's CPU environment is not ours: what points Python at our packages must not reach it.
    env.pop("PYTHONHOME", None)
    env["PYTHONPATH"] = str(_STAND_INS)
    env |= {CPU_VARIABLE: "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(threads)}
    # Compiling for a CPU needs a C++ compiler and takes longer than a small model's whole job.
    env.setdefault("TORCHDYNAMO_DISABLE", "1")
    return env


def sglang_python(env: Mapping[str, str], *, on_cpu: bool) -> str:
    """Return the Python that has SGLang: the one named, else ours on GPUs, else the CPU environment's."""
    if named := env.get(PYTHON_VARIABLE):
        return named
    if not on_cpu:
        return sys.executable
    home = Path(env.get(ENVIRONMENT_VARIABLE) or _REPOSITORY / ".venv-sglang")
    return str(home / "bin" / "python")


def require_sglang(env: Mapping[str, str], *, on_cpu: bool) -> None:
    """Raise RuntimeError, saying how to install it, unless the Python that is to run SGLang has it."""
    python = sglang_python(env, on_cpu=on_cpu)
    find = "import importlib.util, sys; sys.exit(importlib.util.find_spec('sglang') is None)"
    try:
        found = subprocess.run([python, "-I", "-c", find], check=False).returncode == 0
    except OSError:
        found = False
    if not found:
        remedy = "run `bash scripts/setup.sh --sglang-cpu`" if on_cpu else "install the extra `gpu`"
        raise RuntimeError(
            f"SGLang is not installed for {python}; {remedy}, name a Python that has it by "
            f"{PYTHON_VARIABLE}, or use the transformers engine (SLIME_SCRIPT_ENGINE=transformers)."
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Start one server in the foreground, its output ours, and end it on SIGTERM, Ctrl-C or our own death."""
    parser = _parser()
    options, extra_args = parser.parse_known_args(argv)
    try:
        gpus = _device_numbers(options.gpus)
        command, env = sglang_command(
            options.model_path,
            options.port,
            role=options.role,
            gpus=gpus,
            tp=options.tp,
            dtype=options.dtype,
            host=options.host,
            threads=options.threads,
            extra_args=extra_args,
            env=os.environ,
        )
        where = "the CPU" if gpus is None else f"GPUs {','.join(map(str, gpus))}"
        sys.stdout.write(f"SGLang ({options.role}) on {where}: {shlex.join(command)}\n")
        sys.stdout.flush()
        if options.dry_run:
            return 0
        require_sglang(env, on_cpu=gpus is None)
    except (ValueError, RuntimeError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    owner = os.getppid() if options.end_with_parent else None
    supervisor = Supervisor(grace=CPU_GRACE_SECONDS if gpus is None else GPU_GRACE_SECONDS, owner_pid=owner)
    supervisor.start(command, env)
    return supervisor.run()


def _device_numbers(option: str | None) -> list[int] | None:
    """Return the GPUs of `--gpus`, or of CUDA_VISIBLE_DEVICES where it is not given; None for the CPU."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "") if option is None else option
    names = [name.strip() for name in visible.split(",") if name.strip()]
    if not all(name.isdecimal() for name in names):
        raise ValueError(f"GPUs are given as {visible!r}; name them by number, as --gpus 0,1.")
    return [int(name) for name in names] or None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m slime.engines.sglang_engine",
        description="Run one SGLang server in the foreground. Arguments that are not listed go to SGLang.",
        allow_abbrev=False,
    )
    parser.add_argument("--model-path", required=True, help="checkpoint folder or hub name")
    parser.add_argument("--port", type=int, required=True, help="port to listen on")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to bind; beyond loopback it needs an API key"
    )
    parser.add_argument("--tp", "--tp-size", type=int, default=1, help="GPUs that share one copy")
    parser.add_argument("--gpus", help="device numbers, 0,1 (default: CUDA_VISIBLE_DEVICES; none: the CPU)")
    parser.add_argument("--role", choices=("student", "teacher"), default="student", help="default: student")
    parser.add_argument("--dtype", help="default: the checkpoint's on GPUs, float32 on a CPU")
    parser.add_argument("--threads", type=int, default=1, help="compute threads on a CPU")
    parser.add_argument("--end-with-parent", action="store_true", help="end when our starter dies")
    parser.add_argument("--dry-run", action="store_true", help="print the command and stop")
    return parser


if __name__ == "__main__":
    sys.exit(main())
