"""Loading of user code by dotted path."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Iterable
from typing import Any


def load_function(path: str, flag: str | None = None) -> Callable[..., Any]:
    """Return the callable that a dotted path `package.module.name` means; `flag` is named in errors.

    An error inside the module itself comes up as it is, with its own traceback.

    Raises:
        ValueError: no dotted path, no such module, no such name in it, or no callable.
    """
    where = f"{flag} {path!r}" if flag else f"{path!r}"
    module_path, _, name = path.rpartition(".")
    if not module_path or not all(part.isidentifier() for part in path.split(".")):
        raise ValueError(f"{where} is no dotted path; write package.module.function.")
    module = _import(module_path, where)
    if not hasattr(module, name):
        raise ValueError(f"{where}: the module {module_path} has no {name!r}.{_nearest(name, dir(module))}")
    found = getattr(module, name)
    if not callable(found):
        raise ValueError(f"{where} is a {type(found).__name__}, which cannot be called; name a function.")
    return found


def _import(module_path: str, where: str) -> Any:
    try:
        return importlib.import_module(module_path)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if module_path != missing and not module_path.startswith(missing + "."):
            raise  # the module is there, and something that it imports is not
        parent, _, name = missing.rpartition(".")
        raise ValueError(
            f"{where}: there is no module {missing}.{_nearest(name, _siblings(parent))} "
            "It is looked up from the working directory and PYTHONPATH."
        ) from error


def _siblings(package: str) -> list[str]:
    """Return the names of the modules in a package; of the top-level modules for an empty name."""
    if not package:
        return [module.name for module in pkgutil.iter_modules()]
    spec = importlib.util.find_spec(package)
    locations = spec.submodule_search_locations if spec is not None else None
    return [module.name for module in pkgutil.iter_modules(locations)] if locations else []


def _nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint at the nearest public names, or nothing."""
    near = difflib.get_close_matches(name, [entry for entry in known if not entry.startswith("_")], n=3)
    return f" Did you mean {', '.join(near)}?" if near else ""
