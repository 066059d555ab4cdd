"""What the whole tree keeps, beyond linters and import contracts: rules that can be checked by reading."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
HEAVY = ("ray", "sglang", "megatron")
LIGHT = (
    "slime.arguments",
    "slime.ray.placement",
    "slime.losses",
    "slime.engines.client",
    "slime.engines.process",
    "slime.rollout.on_policy_distillation",
    "slime.rollout.manager",
    "slime.trainer",
    "slime.backends",
    "slime.metrics.tracker",
    "examples.opd_vlm.opd_vlm_reward",
)


def tracked(*patterns: str) -> list[Path]:
    """Return the files of the checkout that match, ignored ones left out."""
    command = ["git", "ls-files", "-co", "--exclude-standard", "--", *patterns]
    listing = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    return [REPOSITORY / line for line in listing.splitlines() if (REPOSITORY / line).is_file()]


SOURCES = tracked("slime/*.py", "examples/*.py")
SCRIPTS = tracked("*.sh", ".ci/run")
TEXTS = [*tracked("*.py", "*.md", "*.toml", "*.yaml", "requirements/*.txt"), *SCRIPTS]


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


def relative(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def lines_matching(paths: list[Path], pattern: str) -> list[str]:
    """Return `file:line: text` for every match outside this file."""
    return [
        f"{relative(path)}:{number}: {line.strip()}"
        for path in paths
        if path != Path(__file__)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(pattern, line)
    ]


def test_nothing_ends_processes_by_name() -> None:
    assert not lines_matching([*SOURCES, *SCRIPTS], r"\b(pkill|killall|ray stop|fuser)\b")


def test_the_loop_is_never_run_by_path() -> None:
    # slime/ray would shadow Ray
    assert not lines_matching(SCRIPTS, r"python\S*\s+(\S*/)?slime/train\.py")


def test_no_argument_is_read_with_a_default() -> None:
    found = [
        f"{relative(path)}:{node.lineno}"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "getattr"
        and len(node.args) == 3
        and isinstance(node.args[0], ast.Name)
        and node.args[0].id == "args"
    ]
    assert not found


def test_torch_load_reads_weights_only() -> None:
    found = lines_matching(SOURCES, r"torch\.load\(")
    assert [line for line in found if "weights_only=True" not in line] == []


def test_nothing_foreign_is_run_as_code() -> None:
    """The engine's reader of weights, which takes a list of names and no other, is the one user of pickle."""
    sources = [*SOURCES, *tracked("scripts/*.py")]
    assert not lines_matching(sources, r"(?<![\w.])(eval|exec)\(|trust_remote_code|shell=True|yaml\.load\(")
    assert not lines_matching(sources, r"allow_pickle|weights_only=False|\b(marshal|shelve|dill)\b")
    users = {
        line.split(":")[0] for line in lines_matching(sources, r"^\s*(import|from) (pickle|cloudpickle)\b")
    }
    assert users == {"slime/engines/transformers_engine/weight_payload.py"}


def test_every_module_says_what_it_is() -> None:
    silent = [path for path in SOURCES if ast.get_docstring(ast.parse(path.read_text())) is None]
    assert not [relative(path) for path in silent]


def test_the_tree_stands_alone() -> None:
    """No path of a developer's machine, nothing read from outside the checkout."""
    assert not lines_matching(TEXTS, r"(?<![\w}])/(root|work|home/[a-z]+)/|\.\./shared")


def test_heavy_packages_stay_behind_their_doors() -> None:
    """Nothing that a unit test needs imports them, not even by way of another package."""
    program = f"""
import importlib, sys
for module in {LIGHT}:
    importlib.import_module(module)
    loaded = [name for name in {HEAVY} if name in sys.modules]
    assert not loaded, f"{{module}} imports {{loaded}}"
"""
    done = python("-c", program)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", ["slime.arguments", "slime.ray.placement"])
def test_the_launcher_needs_only_the_standard_library_before_the_set_up(module: str) -> None:
    program = f"import sys; sys.path.insert(0, {str(REPOSITORY)!r}); import {module}"
    # -S: no site-packages; -I: nothing from the environment
    done = python("-I", "-S", "-c", program)
    assert done.returncode == 0, done.stderr


def test_shell_scripts_are_strict_or_a_library() -> None:
    for path in SCRIPTS:
        text = path.read_text()
        assert "set -euo pipefail" in text or text.startswith("# shellcheck shell=bash"), relative(path)


def test_locks_pin_public_versions() -> None:
    for path in tracked("requirements/*.txt"):
        for line in path.read_text().splitlines():
            pinned = re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!]+", line)
            assert pinned or not line or line.startswith("#"), f"{relative(path)}: {line}"


def test_the_readme_shows_a_command_within_twenty_lines() -> None:
    head = (REPOSITORY / "README.md").read_text().splitlines()[:20]
    assert "bash examples/opd_vlm/run_opd_vlm_geo3k.sh" in head
