"""From a command line to arguments: argparse from the groups; unknown flags refused, the nearest named."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from slime.arguments.engine import SGLANG_PREFIX, collect_sglang
from slime.arguments.flags import ArgumentsError, Flag, flags_of

A = TypeVar("A")


def parse(argv: list[str] | None, groups: Sequence[type], make: Callable[..., A]) -> A:
    """Parse `argv` with the flags of `groups` and return `make(**values)`; exit with 2 on an error."""
    parser = build_parser(groups)
    try:
        sglang, rest = collect_sglang(sys.argv[1:] if argv is None else list(argv))
    except ValueError as error:
        parser.error(str(error))
    namespace, unknown = parser.parse_known_args(rest)
    declared = [flag for group in groups for flag in flags_of(group)]
    if unknown:
        parser.error(unknown_message(unknown, [word for flag in declared for word in flag.spellings]))
    values = vars(namespace)
    missing = _missing(declared, values)
    if missing:
        parser.error("missing flags:\n" + "\n".join(f"- {flag.cli}: {flag.spec.help}" for flag in missing))
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    try:
        return make(**values, sglang=sglang)
    except ArgumentsError as error:
        parser.error(str(error) if len(error.problems) == 1 else f"{len(error.problems)} problems:\n{error}")


def _missing(declared: Sequence[Flag], values: Mapping[str, Any]) -> list[Flag]:
    """Return the flags that must be given and are not."""
    given = [flag.cli for flag in declared if flag.attribute in values]
    return [
        flag
        for flag in declared
        if flag.cli not in given and (flag.required or flag.spec.required_unless not in (None, *given))
    ]


def build_parser(groups: Sequence[type]) -> argparse.ArgumentParser:
    """Return the parser; a flag that is not given leaves no trace, so the groups' defaults alone rule."""
    parser = argparse.ArgumentParser(
        prog="slime.train",
        usage="python -m slime.train --hf-checkpoint MODEL --prompt-data DATA --num-rollout N [flags]",
        description="On-policy distillation of (vision-) language models.",
        epilog=f"{SGLANG_PREFIX}NAME [VALUE] passes --NAME to the student's SGLang engines.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    for group in groups:
        section = parser.add_argument_group(group.__doc__)
        for flag in flags_of(group):
            section.add_argument(*flag.spellings, dest=flag.attribute, help=_help(flag), **_options(flag))
    return parser


def _options(flag: Flag) -> dict[str, Any]:
    """Return argparse's options for one flag."""
    if flag.kind == "bool" and flag.spec.derive is not None:  # it may be on by itself, and is not wanted
        return {"action": argparse.BooleanOptionalAction}
    if flag.kind == "bool":
        return {"action": "store_false" if flag.default is True else "store_true"}
    options: dict[str, Any] = {"type": _reporting(flag.value_type)}
    if flag.choices:
        options["choices"] = flag.choices
    else:
        options["metavar"] = flag.attribute.upper()
    if flag.kind == "many" and flag.spec.repeat:
        options["action"] = "append"
    elif flag.kind == "many":
        options["nargs"] = "+"
    return options


def _reporting(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    """Let argparse show why a value was refused, not only that it was."""
    if isinstance(convert, type):
        return convert

    def converted(text: str) -> Any:
        try:
            return convert(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r}: {error}") from error

    return converted


def _help(flag: Flag) -> str:
    """Return the help text with the default behind it."""
    if flag.required:
        note = " (required)"
    elif flag.spec.required_unless is not None:
        note = f" (required without {flag.spec.required_unless})"
    elif flag.spec.derived_from:
        note = f" (default: {flag.spec.derived_from})"
    elif flag.kind == "bool" or flag.default in (None, ()):
        note = ""
    else:
        note = f" (default: {flag.default})"
    return (flag.spec.help + note).replace("%", "%%")


def unknown_message(unknown: Sequence[str], known: Sequence[str]) -> str:
    """Say which words are not understood, and which flag is nearest to each."""
    sentences: list[str] = []
    for word in unknown:
        name = word.partition("=")[0]
        if not name.startswith("-"):
            continue
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        sentences.append(f"unknown flag {name}" + (f"; did you mean {near[0]}?" if near else "; see --help."))
    if not sentences:
        sentences.append(
            f"unexpected words: {' '.join(unknown)}; a flag with one value was given more, or quotes are "
            "missing."
        )
    return "\n".join(sentences)
