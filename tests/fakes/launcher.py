"""Run a launcher as a user does, on a made-up machine: any number of GPUs, an environment of stand-ins.

The stand-in Python plays preflight, teacher, doctor and driver as `PREFLIGHT_PLAYS`, `TEACHER_PLAYS`,
`DOCTOR_PLAYS` and `DRIVER_PLAYS` say ("first; second": one part a start, the last for all that follow;
"real" for the real program), and passes everything else on to the real one; so placement and the argument
parser are the real ones.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.fakes.processes import PATIENCE_SECONDS, heed_interrupts

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "examples" / "opd_vlm" / "run_opd_vlm_geo3k.sh"

NVIDIA_SMI = """#!/bin/sh
i=0
while [ "$i" -lt {count} ]; do
  case "$*" in
    *--query-gpu*) echo "$i, GPU-$i, Stand-in, {total}, {used}, 580.65.06" ;;
    *) echo "GPU $i: Stand-in (UUID: GPU-$i)" ;;
  esac
  i=$((i + 1))
done
"""

PYTHON = """#!{python}
import http.server, os, shlex, signal, subprocess, sys, time

arguments = sys.argv[1:]
plays = {{"slime.engines.transformers_engine": "TEACHER_PLAYS",
         "slime.engines.sglang_engine": "TEACHER_PLAYS",
         "slime.engines.doctor": "DOCTOR_PLAYS",
         "slime.preflight": "PREFLIGHT_PLAYS",
         "slime.train": "DRIVER_PLAYS", "slime.tiny": "TINY_PLAYS"}}
module = arguments[1] if arguments[:1] == ["-m"] else ""
if module not in plays:
    os.execv({python!r}, [{python!r}, *arguments])
parts = os.environ.get(plays[module], "succeed").split("; ")
with open(os.environ["STAGE"] + "/" + module, "a+") as note:
    note.seek(0)
    part = parts[min(len(note.readlines()), len(parts) - 1)]
    key = os.environ.get("SLIME_ENGINE_ADMIN_KEY")
    note.write(f"{{os.getpid()}} {{key}} {{shlex.join(arguments)}}\\n")

class Ready(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

if part == "real":
    os.execv({python!r}, [{python!r}, *arguments])
if part.startswith("serve"):
    if part == "serve with a child":
        with open(os.environ["STAGE"] + "/child", "a") as note:
            note.write(f"{{subprocess.Popen(['sleep', '600']).pid}}\\n")
    port = int(arguments[arguments.index("--port") + 1])
    http.server.ThreadingHTTPServer(("127.0.0.1", port), Ready).serve_forever()
elif part == "sleep with a child that ignores SIGTERM":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen(["sleep", "600"])
    with open(os.environ["STAGE"] + "/child", "w") as note:
        note.write(f"{{child.pid}}\\n")
    time.sleep(600)
elif part == "sleep":
    time.sleep(600)
elif part in ("end on a signal of the test", "fail later"):
    while not os.path.exists(os.environ["STAGE"] + "/end"):
        time.sleep(0.05)
    sys.exit(3 if part == "fail later" else 0)
elif part == "fail":
    print("the stand-in fails on purpose", flush=True)
    sys.exit(3)
"""


@dataclass(frozen=True)
class Launched:
    """What a finished launcher left: status, output, and the commands that a dry run printed."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def commands(self) -> list[list[str]]:
        """The `+ …` lines as words."""
        return [shlex.split(line[2:]) for line in self.stdout.splitlines() if line.startswith("+ ")]

    def command(self, module: str) -> list[str]:
        """Return the one command that runs `python -m module`."""
        found = [words for words in self.commands if module in words]
        assert len(found) == 1, f"{len(found)} commands run {module}:\n{self.stdout}\n{self.stderr}"
        return found[0]

    def arguments(self, module: str) -> list[str]:
        """Return what follows `-m module`."""
        words = self.command(module)
        return words[words.index(module) + 1 :]

    def variables(self, module: str) -> dict[str, str]:
        """Return the variables that `env` sets for the command."""
        words = self.command(module)
        return dict(word.split("=", 1) for word in words[1 : words.index("-m")] if "=" in word)


class Machine:
    """A machine of `gpus` GPUs below `root`, with stand-in models and data, on which `script` is run."""

    def __init__(
        self,
        root: Path,
        gpus: int = 0,
        script: Path = SCRIPT,
        *,
        gpu_mebibytes: int = 81559,
        gpu_mebibytes_used: int = 4,
    ) -> None:
        self.root = root
        self.script = script
        self.stage = root / "stage"
        self.stage.mkdir()
        programs, environment = root / "programs", root / "environment" / "bin"
        _executable(
            programs / "nvidia-smi",
            NVIDIA_SMI.format(count=gpus, total=gpu_mebibytes, used=gpu_mebibytes_used),
        )
        _executable(environment / "python", PYTHON.format(python=sys.executable))
        self.student, self.teacher = self.model("student"), self.model("teacher")
        self.data = root / "data"
        self.data.mkdir()
        for split in ("train", "test"):
            (self.data / f"{split}.jsonl").touch()
        keep = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("SLIME_", "WANDB_"))
            and name not in ("CUDA_VISIBLE_DEVICES", "CONDA_PREFIX")
        }
        self.environment = keep | {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "HOME": str(root / "home"),
            "TMPDIR": str(root),
            "VIRTUAL_ENV": str(environment.parent),
            "STAGE": str(self.stage),
            "STOP_GRACE_SECONDS": "1",
        }

    def model(self, name: str) -> Path:
        """Make the folder of a checkpoint whose files are empty."""
        folder = self.root / name
        folder.mkdir()
        for file in ("config.json", "model.safetensors"):
            (folder / file).touch()
        return folder

    def local(self) -> dict[str, str]:
        """Return the variables that name this machine's own models and data."""
        return {
            "STUDENT_MODEL": str(self.student),
            "TEACHER_MODEL": str(self.teacher),
            "DATASET_NAME": str(self.data),
        }

    def dry_run(self, **knobs: str) -> Launched:
        """Let the launcher print what it would do, with `SLIME_SCRIPT_<knob>` set."""
        done = self.start(DRY_RUN="1", **knobs)
        stdout, stderr = done.communicate(timeout=PATIENCE_SECONDS)
        return Launched(done.returncode, stdout, stderr)

    def start(self, **knobs: str) -> subprocess.Popen[str]:
        """Start the launcher; its output is piped."""
        variables = {f"SLIME_SCRIPT_{name}": value for name, value in knobs.items()}
        return subprocess.Popen(
            ["bash", str(self.script)],
            env=self.environment | variables,
            cwd=self.root,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=heed_interrupts,
        )

    def pids(self, name: str) -> list[int]:
        """Return the processes that played `name` so far."""
        return [int(line.split()[0]) for line in self._notes(name)]

    def starts(self, name: str) -> list[str]:
        """Return the admin key and the arguments of each process that played `name` so far."""
        return [line.split(maxsplit=1)[1] for line in self._notes(name)]

    def let_end(self) -> None:
        """Let whoever plays "end on a signal of the test" succeed, and "fail later" fail."""
        (self.stage / "end").touch()

    def _notes(self, name: str) -> list[str]:
        note = self.stage / name
        return note.read_text().splitlines() if note.exists() else []


def _executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
