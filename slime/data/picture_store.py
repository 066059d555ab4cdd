"""The prepared pictures of a run: each is decoded, resized and encoded once, whoever asks, and however often.

One store serves the prompts and every evaluation set. It forgets what was not used for longest; what somebody
still holds stays to be found, and what was forgotten is prepared again when its turn comes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future
from threading import Lock
from weakref import WeakValueDictionary

from slime.data.images import Picture

STORE_BYTES = 2**30


class PictureStore:
    """Source and limits -> prepared picture, the least recently used forgotten. Safe for threads.

    `prepared` counts pictures that were made, `hits` those that were there already.
    """

    def __init__(self, max_bytes: int = STORE_BYTES) -> None:
        self._recent: OrderedDict[Hashable, Picture] = OrderedDict()
        self._alive: WeakValueDictionary[str, Picture] = WeakValueDictionary()
        """By content hash: the recent ones, and forgotten ones that a prompt, an opened picture or a rollout
        holds."""
        self._pending: dict[Hashable, Future[Picture]] = {}
        self._max_bytes = max_bytes
        self._bytes = 0
        self._lock = Lock()
        self.prepared = 0
        self.hits = 0

    def __len__(self) -> int:
        return len(self._recent)

    def get(self, key: Hashable, prepare: Callable[[], Picture]) -> Picture:
        """Return the picture of `key`, which says all that its bytes depend on; `prepare` makes it.

        Threads that ask for one key at a time wait for the first of them, and share its error.
        """
        with self._lock:
            if key in self._recent:
                self._recent.move_to_end(key)
                self.hits += 1
                return self._recent[key]
            pending = self._pending.get(key)
            mine = pending is None
            if pending is None:
                pending = self._pending[key] = Future()
            else:
                self.hits += 1
        if mine:
            self._prepare(key, prepare, pending)
        return pending.result()

    def png(self, hashes: Iterable[str]) -> dict[str, bytes]:
        """Return the PNG of each content hash.

        Raises:
            KeyError: a picture was never prepared here, or is forgotten and held by nobody.
        """
        with self._lock:
            return {sha256: self._alive[sha256].png for sha256 in hashes}

    def _prepare(self, key: Hashable, prepare: Callable[[], Picture], pending: Future[Picture]) -> None:
        try:
            picture = prepare()
        except BaseException as error:
            with self._lock:
                del self._pending[key]
            pending.set_exception(error)
            raise
        _ = picture.data_uri  # made here, in a thread, and not when an event loop asks for it
        with self._lock:
            picture = self._alive.setdefault(picture.sha256, picture)
            self._keep(key, picture)
            self.prepared += 1
            del self._pending[key]
        pending.set_result(picture)

    def _keep(self, key: Hashable, picture: Picture) -> None:
        self._recent[key] = picture
        self._bytes += _size(picture)
        while self._bytes > self._max_bytes and len(self._recent) > 1:
            _, forgotten = self._recent.popitem(last=False)
            self._bytes -= _size(forgotten)


def _size(picture: Picture) -> int:
    return len(picture.png) + len(picture.data_uri)
