"""Small helpers that slime users import by this path."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any


def load_function(path: str) -> Callable[..., Any]:
    """Return the function at a dotted path, `package.module.function`.

    Raises:
        ValueError: there is no such module or no such function; the message says which part is missing.
    """
    module_name, _, name = path.rpartition(".")
    if not module_name:
        raise ValueError(f"{path!r} is no dotted path; write package.module.function.")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{path!r} cannot be loaded: {error}. Run from the folder that holds it, or add that folder to "
            f"PYTHONPATH."
        ) from error
    function = vars(module).get(name)
    if not callable(function):
        known = ", ".join(
            sorted(key for key, value in vars(module).items() if callable(value) and key[0] != "_")
        )
        raise ValueError(
            f"{path!r} cannot be loaded: module {module_name} has no function {name}; it has {known}."
        )
    return function
