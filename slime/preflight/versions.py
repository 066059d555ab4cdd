"""The key packages: are they there, and are they those that fit together?"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from slime.engines.sglang_engine import require_sglang
from slime.preflight.finding import Finding
from slime.preflight.launch import Launch

CHECK = "versions"
REQUIREMENTS = Path(__file__).resolve().parents[2] / "requirements"
ALWAYS = ("torch", "transformers", "tokenizers", "safetensors", "ray", "pyarrow", "aiohttp", "math-verify")
SET_UP = "run `bash scripts/setup.sh`"


def check_versions(launch: Launch) -> Iterator[Finding]:
    """Hold what is installed against the versions that are pinned for this kind of machine."""
    args = launch.args
    on_gpus = bool(launch.student_gpus)
    lock = REQUIREMENTS / ("gpu.txt" if on_gpus else "cpu.txt")
    packages: list[str] = list(ALWAYS)
    if args.train_backend == "megatron":
        packages.append("megatron-core")
    if args.use_wandb:
        packages.append("wandb")
    engines = {args.engine} if not args.rollout_engine_urls and not args.replays else set()
    if launch.teacher is not None:
        engines.add(launch.teacher.engine)
    if "sglang" in engines:
        if on_gpus:
            packages.append("sglang")
        else:  # in an environment of its own
            try:
                require_sglang(os.environ, on_cpu=True)
            except RuntimeError as error:
                yield Finding(check=CHECK, what=str(error), remedy="see above")
    pinned = pins(lock.read_text()) if lock.is_file() else {}
    yield from compare({name: installed(name) for name in packages}, pinned, lock.name)


def installed(package: str) -> str | None:
    """Return the version of a package in this environment."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def pins(text: str) -> dict[str, str]:
    """Return the versions that a requirements file pins."""
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return dict(line.split("==") for line in lines if "==" in line)


def compare(there: Mapping[str, str | None], pinned: Mapping[str, str], lock: str) -> Iterator[Finding]:
    """Yield what is missing, and what is of another version than the pinned one.

    A build's mark (`+cpu`, `+cu130`) does not count.
    """
    missing = [name for name, found in there.items() if found is None]
    if missing:
        yield Finding(check=CHECK, what=f"not installed: {', '.join(missing)}", remedy=SET_UP)
    others = [
        f"{name} is {found}, tested is {pinned[name]}"
        for name, found in there.items()
        if found is not None and name in pinned and found.partition("+")[0] != pinned[name]
    ]
    if others:
        yield Finding(
            check=CHECK,
            what=f"other versions than requirements/{lock} pins: {'; '.join(others)}",
            remedy=f"{SET_UP}, or go on if you mean it",
            fatal=False,
        )
