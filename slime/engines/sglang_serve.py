"""Run SGLang's own HTTP server with its keys taken from the environment instead of the command line.

`sglang_engine.py` starts this file by path under SGLang's Python, which need not have the rest of the
project: it imports only the standard library and SGLang. SGLang itself is not modified, but for one answer:
its record of settings, which it logs and serves on an open endpoint, leaves the keys out. With `--check`
first it serves nothing and says what SGLang's own parser thinks of the other arguments (`sglang_flags.py`).
"""

import argparse
import json
import os
import sys
from typing import Any, NoReturn

ADMIN_KEY_VARIABLE = "SLIME_ENGINE_ADMIN_KEY"
API_KEY_VARIABLE = "SLIME_ENGINE_API_KEY"
CPU_VARIABLE = "SGLANG_USE_CPU_ENGINE"
KEY_FIELDS = ("api_key", "admin_api_key")
CHECK_FLAG = "--check"


def prepare_process() -> None:
    """Make SGLang importable on a CPU and keep keys out of its settings, in the server and its children."""
    if os.environ.get(CPU_VARIABLE) == "1":
        import torchvision_operators  # pyright: ignore[reportMissingImports]

        torchvision_operators.declare_where_missing()
    from sglang.srt.server_args import ServerArgs  # pyright: ignore[reportMissingImports]

    resolved_dict = ServerArgs.resolved_dict

    def without_keys(self: Any) -> dict[str, Any]:
        settings = resolved_dict(self)
        return settings | {name: "(set)" for name in KEY_FIELDS if settings[name] is not None}

    ServerArgs.resolved_dict = without_keys


def main(argv: list[str]) -> None:
    """Serve until stopped; `argv` holds SGLang's own arguments."""
    # Taken out of the environment at once: the processes that SGLang starts need no key.
    keys = {field: os.environ.pop(name, None) for field, name in _KEYS.items()}
    from sglang.launch_server import run_server  # pyright: ignore[reportMissingImports]
    from sglang.srt.plugins import load_plugins  # pyright: ignore[reportMissingImports]
    from sglang.srt.server_args import prepare_server_args  # pyright: ignore[reportMissingImports]
    from sglang.srt.utils import kill_process_tree  # pyright: ignore[reportMissingImports]

    load_plugins()
    server_args = prepare_server_args(argv)
    for field, key in keys.items():
        if key:
            setattr(server_args, field, key)
    try:
        run_server(server_args)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


def check(argv: list[str]) -> dict[str, Any]:
    """Return what SGLang's own parser says of `argv`, SGLang's arguments; nothing is loaded or started.

    `unknown` holds the flags that it does not have, `refused` its message about another mistake, None where
    there is none, `unexpected` the words that belong to no flag, `known` all flags that it has.
    """
    import sglang  # pyright: ignore[reportMissingImports]
    from sglang.srt.plugins import load_plugins  # pyright: ignore[reportMissingImports]
    from sglang.srt.server_args import ServerArgs  # pyright: ignore[reportMissingImports]

    load_plugins()
    parser = _Parser(prog="sglang")
    ServerArgs.add_cli_args(parser)
    known = sorted(option for action in parser._actions for option in action.option_strings)
    names = [word.partition("=")[0] for word in argv if word.startswith("--")]
    # as argparse has it, the beginning of a flag stands for the flag
    unknown = [name for name in names if not any(option.startswith(name) for option in known)]
    unexpected: list[str] = []
    refused = None
    if not unknown:
        try:
            unexpected = parser.parse_known_args(argv)[1]
        except _RefusedError as error:
            refused = str(error)
    return {
        "version": sglang.__version__,
        "known": known,
        "unknown": unknown,
        "unexpected": unexpected,
        "refused": refused,
    }


class _RefusedError(Exception):
    """SGLang's parser does not take an argument."""


class _Parser(argparse.ArgumentParser):
    """Raises where it would end the process."""

    def error(self, message: str) -> NoReturn:
        raise _RefusedError(message)

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        raise _RefusedError(message or "it prints something and ends, and there is no server")


_KEYS = dict(zip(KEY_FIELDS, (API_KEY_VARIABLE, ADMIN_KEY_VARIABLE), strict=True))

# SGLang starts its children by `spawn`, which runs this file again in each under the second name.
if __name__ in ("__main__", "__mp_main__"):
    prepare_process()
if __name__ == "__main__":
    if sys.argv[1:2] == [CHECK_FLAG]:
        sys.stdout.write("\n" + json.dumps(check(sys.argv[2:])) + "\n")
    else:
        main(sys.argv[1:])
