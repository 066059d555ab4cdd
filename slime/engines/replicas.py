"""Which of several servers of one model a request goes to.

Groups stay together, new ones go to the least loaded server. One that failed is left out, and its groups
move, until its probe answers again. Decides only: `client.py` sends requests and probes.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit, urlunsplit

REMEMBERED_GROUPS = 65_536
"""How many groups' servers are remembered; far more than are ever in flight."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One server: where it generates, and where its other paths hang."""

    generate_url: str
    base_url: str

    @classmethod
    def parse(cls, url: str) -> Endpoint:
        """Read a URL as users give it: bare, or with its path, which is then posted to as it is."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ValueError(f"{url!r} is no server address; give it as http://HOST:PORT/generate.")
        path = parts.path.rstrip("/")
        if not path:
            base = urlunsplit((parts.scheme, parts.netloc, "", "", ""))
            return cls(generate_url=f"{base}/generate", base_url=base)
        base = urlunsplit((parts.scheme, parts.netloc, path.rsplit("/", 1)[0], "", ""))
        return cls(generate_url=url, base_url=base)


@dataclass(slots=True)
class Replica:
    """One server and how busy it is."""

    endpoint: Endpoint
    places: asyncio.Semaphore
    """Free places: requests beyond them wait here."""
    load: int = 0
    """Requests that are in flight or wait for a place."""
    given: int = 0
    """Groups and lone requests it ever got; decides between equally loaded ones."""
    up: bool = True


@dataclass(slots=True)
class Home:
    """Where a group's prefix is cached."""

    replica: Replica
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    open: bool = False
    """Whether requests may go side by side: the prefix is cached, or nobody is there to cache it."""


class Replicas:
    """The servers of one model."""

    def __init__(self, endpoints: Sequence[Endpoint], concurrency: int) -> None:
        self.all = [Replica(endpoint, asyncio.Semaphore(concurrency)) for endpoint in endpoints]
        self._homes: OrderedDict[Hashable, Home] = OrderedDict()

    def home(self, group: Hashable | None) -> Home:
        """Return where a request of `group` goes now: the group's server while it is up, else a new choice.

        With all of them down the choice is among all: somebody has to be tried.
        """
        known = self._homes.get(group) if group is not None else None
        if known is not None and (known.replica.up or not self._up()):
            return known
        home = Home(self._least_loaded())
        home.replica.given += 1
        if group is not None:
            self._homes[group] = home
            self._homes.move_to_end(group)
            if len(self._homes) > REMEMBERED_GROUPS:
                self._homes.popitem(last=False)
        return home

    def elsewhere(self, replica: Replica) -> bool:
        """Tell whether another server than this one is up."""
        return any(other is not replica for other in self._up())

    def _up(self) -> list[Replica]:
        return [replica for replica in self.all if replica.up]

    def _least_loaded(self) -> Replica:
        return min(self._up() or self.all, key=lambda replica: (replica.load, replica.given))
