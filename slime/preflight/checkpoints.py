"""Are the models whole that are loaded, and the checkpoint that the run goes on from?"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from slime.checkpoints import CheckpointError, resume_point
from slime.preflight.finding import Finding
from slime.preflight.launch import Launch
from slime.preflight.weights import WeightFileError, read_header

CHECK = "models"
ANEW = "remove the folder and start again (the launchers download what is missing), or name another"


def check_checkpoints(launch: Launch) -> Iterator[Finding]:
    """Hold every model folder against what its own files say of it."""
    for name, path in launch.checkpoints.items():
        if Path(path).is_dir() and not launch.is_coming(path):
            for problem in _problems(Path(path)):
                yield Finding(check=CHECK, what=f"{name} {path}: {problem}", remedy=ANEW)
    try:
        resume_point(launch.args.load)
    except CheckpointError as error:
        yield Finding(check=CHECK, what=str(error), remedy="see above; --load may be dropped to begin anew")


def _problems(folder: Path) -> Iterator[str]:
    try:
        config = json.loads((folder / "config.json").read_bytes())
        if not isinstance(config, dict) or "model_type" not in config:
            yield "its config.json has no model_type"
    except FileNotFoundError:
        yield "it has no config.json"
    except (OSError, ValueError) as error:
        yield f"its config.json cannot be read ({error})"
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        yield "it has no *.safetensors file"
    for path in files:
        try:
            read_header(path)
        except (OSError, WeightFileError) as error:
            yield f"{error}"
