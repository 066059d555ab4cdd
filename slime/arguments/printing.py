"""Arguments as plain data and as text. Secrets are masked here, the only way out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from slime.arguments.flags import flags_of

SECRET_WORDS = ("api_key", "token", "password", "secret")
MASK = "***"
_URL = re.compile(r"(?P<scheme>[A-Za-z][\w+.-]*://)(?P<user>[^\s/]*@)?(?P<place>[^\s?#]*)(?P<query>[?#]\S+)?")


def printable(value: Any, name: str = "") -> Any:
    """Return `value` as plain data, with credentials inside URLs and secret entries masked."""
    if isinstance(value, Mapping):
        return {key: printable(entry, key) for key, entry in value.items()}
    if isinstance(value, str):
        if any(name.endswith(word) for word in SECRET_WORDS):
            return MASK
        return without_credentials(value)
    if isinstance(value, list | tuple):
        return [printable(entry, name) for entry in value]
    return value


def without_credentials(text: str) -> str:
    """Mask user, password and query of every URL in a text; leave the rest alone."""
    return _URL.sub(_masked, text)


def _masked(url: re.Match[str]) -> str:
    user = f"{MASK}@" if url["user"] else ""
    query = f"?{MASK}" if url["query"] else ""
    return url["scheme"] + user + url["place"] + query


def format_groups(values: Mapping[str, Any], groups: Sequence[type]) -> str:
    """Return `values` under the titles of their groups, one a line."""
    lines: list[str] = []
    for group in groups:
        lines.append(f"{group.__doc__}:")
        lines.extend(f"  {flag.attribute} = {values[flag.attribute]!r}" for flag in flags_of(group))
    if values["sglang"]:
        lines.append("SGLang pass-through:")
        lines.extend(f"  {name} = {value!r}" for name, value in values["sglang"].items())
    return "\n".join(lines)
