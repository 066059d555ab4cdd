"""Run SGLang's own HTTP server with its keys taken from the environment instead of the command line.

`sglang_engine.py` starts this file by path under SGLang's Python, which need not have the rest of the
project: it imports only the standard library and SGLang. SGLang itself is not modified, but for one answer:
its record of settings, which it logs and serves on an open endpoint, leaves the keys out.
"""

import os
import sys
from typing import Any

ADMIN_KEY_VARIABLE = "SLIME_ENGINE_ADMIN_KEY"
API_KEY_VARIABLE = "SLIME_ENGINE_API_KEY"
CPU_VARIABLE = "SGLANG_USE_CPU_ENGINE"
KEY_FIELDS = ("api_key", "admin_api_key")


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


_KEYS = dict(zip(KEY_FIELDS, (API_KEY_VARIABLE, ADMIN_KEY_VARIABLE), strict=True))

# SGLang starts its children by `spawn`, which runs this file again in each under the second name.
if __name__ in ("__main__", "__mp_main__"):
    prepare_process()
if __name__ == "__main__":
    main(sys.argv[1:])
