"""Whatever the library reads of `args` is declared: a typo would else be found in the middle of a run."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from slime.arguments import Args

ROOT = Path(__file__).resolve().parents[3]
SOURCES = sorted([*(ROOT / "slime").rglob("*.py"), *(ROOT / "examples").rglob("*.py")])


def reads_of_args(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield (line, attribute) of each `args.x` and `self._args.x`."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        owner = node.value
        name = (
            owner.id
            if isinstance(owner, ast.Name)
            else owner.attr
            if isinstance(owner, ast.Attribute)
            else ""
        )
        if name in ("args", "_args"):
            yield node.lineno, node.attr


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_read_of_args_is_declared(source: Path) -> None:
    text = source.read_text()
    if "ArgumentParser(" in text:
        pytest.skip("has a command line of its own")
    known = {*dir(Args), *Args.__dataclass_fields__}
    assert [(line, name) for line, name in reads_of_args(ast.parse(text)) if name not in known] == []
