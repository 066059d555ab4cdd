"""The keys of the servers: by environment alone, never on a command line."""

from __future__ import annotations

import os

from slime.engines.sglang_serve import ADMIN_KEY_VARIABLE, API_KEY_VARIABLE


def api_key() -> str | None:
    """Return the key that a server beyond loopback asks of everybody (SLIME_ENGINE_API_KEY)."""
    return os.environ.get(API_KEY_VARIABLE)


def admin_key() -> str | None:
    """Return the key of the control verbs: SLIME_ENGINE_ADMIN_KEY, or the API key where there is none."""
    return os.environ.get(ADMIN_KEY_VARIABLE) or api_key()
