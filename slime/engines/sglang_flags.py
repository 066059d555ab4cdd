"""The `--sglang-*` flags of a run, held against the SGLang that will run, before a server is started.

A server finds a typo only after it has been imported, and says so in its own words, in its log. Here its own
parser is asked by a small process (`sglang_serve.py --check`), which loads no model.
"""

from __future__ import annotations

import difflib
import json
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from slime.arguments.engine import SGLANG_PREFIX
from slime.engines.sglang_engine import require_sglang, sglang_check_command

CHECK_SECONDS = 300.0
"""The check takes as long as the import of SGLang: some seconds, more from a cold network disk."""


def check_sglang_flags(words: Sequence[str], *, gpus: Sequence[int] | None, env: Mapping[str, str]) -> None:
    """Return if SGLang's own parser takes `words`, its arguments as `sglang_command_line` gives them.

    Args:
        words: none: nothing is asked.
        gpus: of the server; None: the CPU.
        env: of the process that starts the server; it says which Python has SGLang.

    Raises:
        ValueError: a flag or a value is none of SGLang's; the message says which, and what is near.
        RuntimeError: SGLang is not installed, or its parser cannot be asked.
    """
    if not words:
        return
    require_sglang(env, on_cpu=gpus is None)
    command, full_env = sglang_check_command(words, gpus=gpus, env=env)
    report = _ask(command, full_env)
    problems = list(flag_problems(report, words))
    if problems:
        problems.append(
            f"SGLang {report['version']} of {command[0]} was asked; its documentation lists its server "
            f"arguments, and {SGLANG_PREFIX}NAME passes --NAME."
        )
        raise ValueError("\n".join(problems))


def flag_problems(report: Mapping[str, Any], words: Sequence[str]) -> Iterator[str]:
    """Yield a sentence for each mistake that the parser's report (`sglang_serve.check`) tells of."""
    for name in report["unknown"]:
        near = difflib.get_close_matches(name, report["known"], n=1, cutoff=0.5)
        hint = f"did you mean {_ours(near[0])}?" if near else "nothing is near it."
        yield f"unknown flag {_ours(name)}: SGLang has no {name}; {hint}"
    if report["unexpected"]:
        unexpected = " ".join(report["unexpected"])
        yield (
            f"unexpected words among the {SGLANG_PREFIX}* flags: {unexpected}. A flag was given more values "
            f"than SGLang's takes: {_ours(' '.join(words))}"
        )
    if report["refused"] is not None:
        yield _refusal(report["refused"], words)


def _refusal(message: str, words: Sequence[str]) -> str:
    """Put argparse's message (`argument --a/--b: why`) in terms of the flag that the user gave."""
    match = re.fullmatch(r"argument (\S+): (.*)", message, flags=re.DOTALL)
    if match is None:
        ours = re.sub(r"(?<![\w-])--(?=\w)", SGLANG_PREFIX, message)
        return f"SGLang refuses the {SGLANG_PREFIX}* flags: {ours}"
    spellings = match[1].split("/")
    given = next((word for word in words if word in spellings), spellings[0])
    return f"SGLang refuses {_ours(given)}: {match[2]}"


def _ours(name: str) -> str:
    return SGLANG_PREFIX + name.removeprefix("--")


def _ask(command: Sequence[str], env: Mapping[str, str]) -> Mapping[str, Any]:
    """Run the check; return its report, the last line that it prints.

    Raises:
        RuntimeError: it ended without a report, or took too long.
    """
    try:
        done = subprocess.run(
            command, env=env, capture_output=True, text=True, check=False, timeout=CHECK_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(
            f"{command[0]} did not import SGLang within {CHECK_SECONDS:g} s, so the {SGLANG_PREFIX}* flags "
            "cannot be checked; its server would not start either. Look at that environment and its disk."
        ) from error
    lines = done.stdout.splitlines()
    if done.returncode != 0 or not lines:
        raise RuntimeError(
            f"{command[0]} could not tell SGLang's flags and ended with status {done.returncode}; its server "
            f"would not start either. The end of its output:\n{done.stderr[-2000:]}"
        )
    return json.loads(lines[-1])
