"""How a field of an argument group becomes a command-line flag.

The field's name, annotation and `flag(...)` metadata are all there is: argparse's options, the printed
configuration and the checks are made from them. Nothing here knows which flags exist.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

METADATA_KEY = "slime"


class ArgumentsError(ValueError):
    """Flags that contradict each other, are out of range, or ask for what has not landed: every problem."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__(
            "\n".join(f"- {problem}" for problem in problems) if len(problems) > 1 else problems[0]
        )
        self.problems = problems


@dataclass(frozen=True, kw_only=True)
class FlagSpec:
    """What a field says about its flag."""

    help: str
    name: str | None = None
    """The flag's spelling where it is not the field's name with dashes."""
    aliases: tuple[str, ...] = ()
    parse: Callable[[str], Any] | None = None
    """Turns the text into the value, where the annotation alone does not say how. Raises ValueError."""
    derive: Callable[[Any], Any] | None = None
    """Gives the value, from the finished arguments, where the flag is not set (default None)."""
    derived_from: str = ""
    """What `derive` does, for the help text."""
    required_unless: str | None = None
    """The flag in whose presence this one may be left out."""
    repeat: bool = False
    """The flag may be given several times; the values are collected."""
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None


def flag(default: Any = dataclasses.MISSING, *, help: str, **spec: Any) -> Any:
    """Declare a field of an argument group. Without a default (and without `derive`) the flag is required."""
    if spec.get("derive") is not None:
        default = None
    return field(default=default, metadata={METADATA_KEY: FlagSpec(help=help, **spec)})


@dataclass(frozen=True)
class Flag:
    """One flag: a field, its specification and its resolved type."""

    attribute: str
    spec: FlagSpec
    kind: Literal["bool", "one", "many"]
    value_type: Callable[[str], Any]
    choices: tuple[str, ...] | None
    default: Any

    @property
    def cli(self) -> str:
        """The main spelling, as users type it."""
        return self.spec.name or "--" + self.attribute.replace("_", "-")

    @property
    def spellings(self) -> tuple[str, ...]:
        return (self.cli, *self.spec.aliases)

    @property
    def required(self) -> bool:
        return self.default is dataclasses.MISSING


@cache
def flags_of(group: type) -> tuple[Flag, ...]:
    """Return the flags that `group` itself declares, in order.

    Raises:
        TypeError: a field without `flag(...)`, or of a type that no flag can have.
    """
    hints = typing.get_type_hints(group)
    own = inspect.get_annotations(group)
    flags: list[Flag] = []
    for declared in dataclasses.fields(group):
        if declared.name not in own:
            continue
        spec = declared.metadata.get(METADATA_KEY)
        if not isinstance(spec, FlagSpec):
            raise TypeError(f"{group.__name__}.{declared.name} is declared without flag(...).")
        kind, value_type, choices = _resolve(hints[declared.name], f"{group.__name__}.{declared.name}")
        flags.append(Flag(declared.name, spec, kind, spec.parse or value_type, choices, declared.default))
    return tuple(flags)


def _resolve(
    hint: Any, where: str
) -> tuple[Literal["bool", "one", "many"], Callable[[str], Any], tuple[str, ...] | None]:
    """Return (kind, type of one value, choices) of an annotation."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        inner = [option for option in typing.get_args(hint) if option is not type(None)]
        if len(inner) == 1:
            return _resolve(inner[0], where)
    if origin is Literal:
        return "one", str, typing.get_args(hint)
    if origin is tuple:
        return "many", typing.get_args(hint)[0], None
    if hint is bool:
        return "bool", bool, None
    if hint in (int, float, str) or origin in (dict, Mapping):
        return "one", hint if origin is None else str, None
    raise TypeError(f"{where}: no flag can have the type {hint}.")


def range_problems(flags: Iterable[Flag], args: object) -> Iterator[str]:
    """Yield a sentence for each value outside the bounds that its flag declares."""
    for declared in flags:
        value = getattr(args, declared.attribute)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        spec = declared.spec
        if not math.isfinite(value):
            yield f"{declared.cli} is {value}; it must be a finite number."
        elif spec.at_least is not None and value < spec.at_least:
            yield f"{declared.cli} is {value}; it must be at least {spec.at_least:g}."
        elif spec.above is not None and value <= spec.above:
            yield f"{declared.cli} is {value}; it must be greater than {spec.above:g}."
        elif spec.at_most is not None and value > spec.at_most:
            yield f"{declared.cli} is {value}; it must be at most {spec.at_most:g}."
