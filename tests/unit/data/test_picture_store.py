"""Pictures are decoded, resized and encoded once per run: by content, over epochs, sets and threads."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from slime.arguments import Args
from slime.data import images, rows
from slime.data.errors import BadRow
from slime.data.images import Picture, PictureAccess, picture_key
from slime.data.picture_store import PictureStore
from slime.data.source import EvalSet, PromptSource
from slime.utils.pictures import picture_uri
from slime.utils.types import Sample

Write = Callable[..., str]
MakeArgs = Callable[..., Args]
MakeRow = Callable[..., dict[str, Any]]


class Spy:
    """Counts what is decoded and what is encoded while data are prepared."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counts = {"load_image": 0, "prepare_picture": 0}
        self._lock = threading.Lock()
        for name in self.counts:
            monkeypatch.setattr(rows, name, self._counting(name, getattr(rows, name)))

    def _counting(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **options: Any) -> Any:
            with self._lock:
                self.counts[name] += 1
            return real(*given, **options)

        return call


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    return Spy(monkeypatch)


def hashes_of(samples: list[Sample]) -> list[str]:
    return [name for s in samples for name in (s.multimodal_train_inputs or {})["image_hashes"]]


def picture(name: str, size: int = 30) -> Picture:
    return Picture(name, name.encode() * size, (1, 2, 2))


def test_two_epochs_and_two_sets_prepare_each_picture_once(
    processor: Any, make_args: MakeArgs, make_row: MakeRow, parquet: Write, spy: Spy
) -> None:
    shared = make_row(0)["images"]
    train = parquet([make_row(0), make_row(1), make_row(2, images=shared)])
    test = parquet([make_row(1), make_row(7)], "test.parquet")
    store, args = PictureStore(), make_args(train)
    source = PromptSource(args, processor, store)
    first, second = source.next_groups(3), source.next_groups(3)
    assert [s.tokens for group in first for s in group] == [s.tokens for group in second for s in group]
    assert hashes_of(first[0]) == hashes_of(second[2]) == hashes_of(first[2])
    assert spy.counts == {"load_image": 2, "prepare_picture": 2}
    held_out = EvalSet("held_out", test, args, processor, store)
    held_out.samples()
    held_out.samples()
    assert spy.counts == {"load_image": 3, "prepare_picture": 3}
    assert (store.prepared, store.hits) == (3, 5)


def test_pictures_are_known_by_content_whatever_holds_it(
    processor: Any, make_args: MakeArgs, make_row: MakeRow, jsonl: Write, parquet: Write, spy: Spy
) -> None:
    from base64 import b64encode

    row = make_row(0)
    uri = "data:image/png;base64," + b64encode(row["images"][0]["bytes"]).decode()
    store = PictureStore()
    for path in (parquet([row]), jsonl([{**row, "images": [uri]}])):
        PromptSource(make_args(path), processor, store).next_groups(1)
    assert spy.counts["prepare_picture"] == 1


def test_other_limits_and_blanks_are_other_pictures(
    processor: Any, make_args: MakeArgs, make_row: MakeRow, parquet: Write
) -> None:
    path, store = parquet([make_row(0)]), PictureStore()
    seen = [
        hashes_of(EvalSet("a", path, make_args(path, *flags), processor, store).samples())[0]
        for flags in ((), ("--eval-blank-images",), ("--image-min-pixels", "40000"))
    ]
    assert len(set(seen)) == store.prepared == 3


def test_a_changed_file_is_read_again(
    processor: Any, make_args: MakeArgs, make_row: MakeRow, jsonl: Write, tmp_path: Path, spy: Spy
) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(make_row(0)["images"][0]["bytes"])
    path = jsonl([{"problem": "q", "answer": "1", "images": ["a.png"]}])
    source = PromptSource(make_args(path), processor, PictureStore())
    first, again = hashes_of(source.next_groups(1)[0]), hashes_of(source.next_groups(1)[0])
    assert first == again
    assert spy.counts["load_image"] == 1
    file.write_bytes(make_row(5)["images"][0]["bytes"])
    os.utime(file, ns=(1, 1))
    assert hashes_of(source.next_groups(1)[0]) != first
    assert spy.counts["load_image"] == 2


class _Pictures(BaseHTTPRequestHandler):
    calls: ClassVar[list[str]] = []
    picture: ClassVar[bytes] = b""

    def do_GET(self) -> None:
        self.calls.append(self.path)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.picture)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def url(make_row: MakeRow) -> Iterator[str]:
    _Pictures.calls, _Pictures.picture = [], make_row(0)["images"][0]["bytes"]
    with ThreadingHTTPServer(("127.0.0.1", 0), _Pictures) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/a.png"
        server.shutdown()
        thread.join()


def test_a_url_is_fetched_once(processor: Any, make_args: MakeArgs, jsonl: Write, url: str) -> None:
    path = jsonl([{"problem": "q", "answer": str(n), "images": [url]} for n in range(4)])
    source = PromptSource(make_args(path, "--allow-remote-images"), processor, PictureStore())
    source.next_groups(8)
    assert _Pictures.calls == ["/a.png"]


def test_a_forgotten_picture_is_prepared_again_and_those_in_flight_stay(
    processor: Any, make_args: MakeArgs, make_row: MakeRow, parquet: Write, spy: Spy
) -> None:
    store = PictureStore(max_bytes=1)
    source = PromptSource(make_args(parquet([make_row(n) for n in range(4)])), processor, store)
    groups = source.next_groups(3)
    names = [name for group in groups for name in hashes_of(group)]
    for group in groups:
        for sample in group:
            sample.multimodal_inputs = None
    gc.collect()
    assert len(store) == 1
    assert set(store.png(names)) == set(names)
    source.next_groups(5)
    assert spy.counts["prepare_picture"] > 4
    gc.collect()
    source.next_groups(1)
    gc.collect()
    with pytest.raises(KeyError):
        store.png(names)


def test_a_sample_holds_its_picture_while_later_prompts_are_taken(
    processor: Any, make_args: MakeArgs, make_row: MakeRow, parquet: Write
) -> None:
    store = PictureStore(max_bytes=1)
    source = PromptSource(make_args(parquet([make_row(n) for n in range(4)])), processor, store)
    early = source.next_groups(1)[0]
    for _ in range(3):
        source.next_groups(1)
    gc.collect()
    assert len(store.png(hashes_of(early))) == 1


def test_the_least_recently_used_is_forgotten() -> None:
    store = PictureStore(max_bytes=2 * (30 + len(picture("a").data_uri)))
    made: list[str] = []

    def make(name: str) -> Callable[[], Picture]:
        def prepare() -> Picture:
            made.append(name)
            return picture(name)

        return prepare

    for name in "abacab":
        store.get(name, make(name))
    assert made == ["a", "b", "c", "b"]
    assert len(store) == 2
    assert (store.prepared, store.hits) == (4, 2)


def test_one_content_is_kept_once() -> None:
    store = PictureStore()
    assert store.get("one", lambda: picture("a")) is store.get("other", lambda: picture("a"))


def test_threads_that_want_one_picture_prepare_it_once() -> None:
    store, started, release = PictureStore(), threading.Event(), threading.Event()
    calls: list[int] = []

    def prepare() -> Picture:
        calls.append(1)
        started.set()
        assert release.wait(60)
        return picture("a")

    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(store.get, "key", prepare)
        assert started.wait(60)
        others = [pool.submit(store.get, "key", prepare) for _ in range(3)]
        assert store.get("other key", lambda: picture("b")).sha256 == "b", "another key does not wait"
        release.set()
        assert len({id(outcome.result(60)) for outcome in [first, *others]}) == 1
    assert len(calls) == 1


def test_waiting_threads_share_the_error_and_the_next_turn_tries_again() -> None:
    store, started, release = PictureStore(), threading.Event(), threading.Event()

    def fail() -> Picture:
        started.set()
        assert release.wait(60)
        raise images.BadImageError("broken")

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(store.get, "key", fail)
        assert started.wait(60)
        second = pool.submit(store.get, "key", fail)
        release.set()
        for outcome in (first, second):
            with pytest.raises(images.BadImageError, match="broken"):
                outcome.result(60)
    assert store.get("key", lambda: picture("a")).sha256 == "a"


def test_a_bad_picture_names_file_and_row_each_time(
    processor: Any, make_args: MakeArgs, make_row: MakeRow, parquet: Write
) -> None:
    path = parquet([make_row(0, images=[{"bytes": b"no picture", "path": None}])])
    source = PromptSource(make_args(path), processor, PictureStore())
    for _ in range(2):
        with pytest.raises(BadRow, match=r"row 1: picture 1: "):
            source.next_groups(1)


def test_keys_of_unusable_sources_are_errors(tmp_path: Path) -> None:
    for bad in ("absent.png", {"bytes": None, "path": None}, "data:image/png;base64,%", 3, "a\0b"):
        with pytest.raises(images.BadImageError):
            picture_key(bad, PictureAccess(root=tmp_path))


def test_what_is_drawn_on_a_samples_picture_is_gone_at_its_next_turn(
    processor: Any, make_args: MakeArgs, make_row: MakeRow, parquet: Write
) -> None:
    path, store = parquet([make_row(0)]), PictureStore()
    source = PromptSource(make_args(path), processor, store)
    held_out = EvalSet("held_out", path, make_args(path), processor, store)
    turns = [lambda: source.next_groups(1)[0][0], lambda: held_out.samples()[0]]
    for turn in turns:
        (image,) = (turn().multimodal_inputs or {})["images"]
        sent = picture_uri(image)
        image.paste((0, 0, 0), (0, 0, 20, 20))
        assert picture_uri(image) != sent
        (fresh,) = (turn().multimodal_inputs or {})["images"]
        assert picture_uri(fresh) == sent
