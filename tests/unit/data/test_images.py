"""Pictures: one resize, one encoding, limits, sources; and the pixel contract with the processor."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from slime.data import images
from slime.data.images import PictureAccess, load_image, picture_key, prepare_picture, target_size
from slime.utils.pictures import BadImageError, open_encoded
from slime.utils.processing_utils import encode_image_for_rollout_engine

MakeNoise = Callable[..., Image.Image]
RELAXED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
Encode = Callable[..., bytes]


@settings(max_examples=60, deadline=None, suppress_health_check=RELAXED)
@given(width=st.integers(1, 700), height=st.integers(1, 700))
def test_processor_leaves_a_prepared_picture_alone(processor: Any, width: int, height: int) -> None:
    if max(width, height) > 200 * min(width, height):
        return
    picture = prepare_picture(Image.new("RGB", (width, height), "teal"), processor.image_processor)
    opened = open_encoded(picture)
    features = processor.image_processor(images=[opened], return_tensors="np")
    assert tuple(features["image_grid_thw"][0]) == picture.grid_thw
    assert opened.size == (16 * picture.grid_thw[2], 16 * picture.grid_thw[1])
    assert prepare_picture(opened, processor.image_processor) == picture


def test_prepared_pixels_are_those_that_the_processor_would_have_made(
    processor: Any, make_noise: MakeNoise
) -> None:
    image = make_noise(203, 117)
    opened = open_encoded(prepare_picture(image, processor.image_processor))
    ours = processor.image_processor(images=[opened], return_tensors="np")["pixel_values"]
    direct = processor.image_processor(images=[image], return_tensors="np")["pixel_values"]
    assert (
        np.abs(ours - direct).max() <= 1 / 127.5 + 1e-6
    )  # one step of 8 bits: the processor resizes before rounding


def test_a_fitting_picture_keeps_its_pixels(processor: Any, make_noise: MakeNoise) -> None:
    image = make_noise(96, 64)
    picture = prepare_picture(image, processor.image_processor)
    opened = open_encoded(picture)
    assert np.array_equal(np.asarray(opened), np.asarray(image))
    assert picture.grid_thw == (1, 4, 6)
    assert picture.sha256 == hashlib.sha256(picture.png).hexdigest()


def test_same_pixels_give_the_same_bytes_whatever_they_came_from(
    processor: Any, make_noise: MakeNoise, encode: Encode
) -> None:
    image = make_noise(96, 96)
    annotated = image.copy()
    annotated.info = {"icc_profile": b"x" * 30, "dpi": (72, 72), "exif": b"Exif\0\0"}
    sources = [image, annotated, load_image(encode(image)), load_image(encode(image, "BMP"))]
    assert len({prepare_picture(source, processor.image_processor).sha256 for source in sources}) == 1


def test_encoding_for_an_engine_does_not_encode_again(
    processor: Any, make_noise: MakeNoise, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = prepare_picture(make_noise(96, 64), processor.image_processor)
    opened = open_encoded(picture)
    monkeypatch.setattr("slime.utils.pictures.encode_png", lambda image: pytest.fail("encoded again"))
    uri = encode_image_for_rollout_engine(opened)
    assert base64.b64decode(uri.removeprefix("data:image/png;base64,")) == picture.png


def test_flags_narrow_the_processors_limits(processor: Any, make_noise: MakeNoise) -> None:
    small, large = make_noise(70, 70), make_noise(300, 300)
    enlarged = prepare_picture(small, processor.image_processor, min_pixels=200 * 200)
    shrunk = prepare_picture(large, processor.image_processor, max_pixels=100 * 100)
    assert enlarged.grid_thw[1] * enlarged.grid_thw[2] * 256 >= 200 * 200
    assert shrunk.grid_thw[1] * shrunk.grid_thw[2] * 256 <= 100 * 100
    with pytest.raises(BadImageError, match="--image-min-pixels"):
        prepare_picture(small, processor.image_processor, min_pixels=10**9)


def test_limits_that_no_size_meets_are_an_error_and_not_a_second_resize() -> None:
    with pytest.raises(BadImageError, match="no size in multiples of 32"):
        target_size(40, 1600, 32, 1000, 2000)
    with pytest.raises(BadImageError, match="201x1"):
        target_size(1, 201, 32, 1000, 2000)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_lies_on_white(processor: Any, mode: str) -> None:
    drawing = Image.new("RGBA", (96, 96), (0, 0, 0, 0))
    drawing.paste((0, 0, 0, 255), (10, 10, 20, 20))
    opened = open_encoded(prepare_picture(drawing.convert(mode), processor.image_processor))
    assert opened.getpixel((50, 50)) == (255, 255, 255)
    assert opened.getpixel((15, 15)) == (0, 0, 0)


def test_sixteen_bit_grey_keeps_its_tones(processor: Any) -> None:
    ramp = Image.fromarray(np.full((96, 96), 0x8000, dtype=np.uint16))
    opened = open_encoded(prepare_picture(ramp, processor.image_processor))
    assert opened.getpixel((5, 5)) == (128, 128, 128)


def test_rotation_by_exif_is_not_applied(processor: Any, make_noise: MakeNoise) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    make_noise(96, 64).save(buffer, "PNG", exif=exif)
    picture = prepare_picture(load_image(buffer.getvalue()), processor.image_processor)
    assert picture.grid_thw == (1, 4, 6)


def test_every_form_of_source_gives_the_same_picture(
    tmp_path: Path, make_noise: MakeNoise, encode: Encode
) -> None:
    image = make_noise(40, 30)
    data = encode(image)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.png").write_bytes(data)
    forms = [
        image,
        data,
        {"bytes": data, "path": "ignored.png"},
        {"bytes": None, "path": "sub/a.png"},
        "sub/a.png",
        str(tmp_path / "sub" / "a.png"),
        "data:image/png;base64," + base64.b64encode(data).decode(),
    ]
    assert all(
        np.array_equal(np.asarray(load_image(form, PictureAccess(root=tmp_path))), np.asarray(image))
        for form in forms
    )


@pytest.mark.parametrize(
    ("source", "why"),
    [
        (b"", "cannot be decoded"),
        (b"no picture at all", "cannot be decoded"),
        ({"bytes": None, "path": None}, "neither bytes nor a path"),
        (None, "cannot be a NoneType"),
        (3, "cannot be a int"),
        ("missing.png", "cannot be read"),
        ("../secret.png", "leads out of the picture folder"),
        ("a\0b.png", "no path|cannot be read"),
        ("/etc/passwd", "leads out of the picture folder"),
        ("file:///etc/passwd", "only with --image-root"),
        ("FILE:///etc/passwd", "only http and https"),
        ("http://127.0.0.1:9/a.png", "--allow-remote-images"),
        ({"bytes": {"path": "/etc/passwd"}}, "bytes or path are a dict"),
        ({"path": {"bytes": b"x"}}, "bytes or path are a dict"),
        ({"bytes": [137, 80]}, "bytes or path are a list"),
        ("ftp://host/a.png", "only http and https"),
        ("data:text/plain;base64,AAAA", "no data URI of a picture"),
        ("data:image/png;base64,!!!", "base64 is broken"),
        ("data:image/png;base64,AAAA", "cannot be decoded"),
    ],
)
def test_bad_source_is_one_clear_error(tmp_path: Path, source: Any, why: str) -> None:
    with pytest.raises(BadImageError, match=why):
        load_image(source, PictureAccess(root=tmp_path))


def test_truncated_file_is_an_error(make_noise: MakeNoise, encode: Encode) -> None:
    for form in ("PNG", "JPEG", "BMP"):
        data = encode(make_noise(64, 64), form)
        with pytest.raises(BadImageError, match="cannot be decoded"):
            load_image(data[: len(data) // 2])


def test_no_path_leaves_the_root(tmp_path: Path, make_noise: MakeNoise, encode: Encode) -> None:
    inside, outside = tmp_path / "root" / "a b.png", tmp_path / "b.png"
    inside.parent.mkdir()
    for path in (inside, outside):
        path.write_bytes(encode(make_noise(40, 40)))
    (inside.parent / "link.png").symlink_to(outside)
    (inside.parent / "folder").symlink_to(tmp_path)
    (inside.parent / "circle").symlink_to("circle")
    by_default = PictureAccess(root=inside.parent)
    by_flag = PictureAccess(root=inside.parent, named=True)
    for access in (by_default, by_flag):
        assert load_image(str(inside), access).size == (40, 40)
        assert load_image(f"../{inside.parent.name}/a b.png", access).size == (40, 40)
        for text in (str(outside), "../b.png", "link.png", "folder/b.png"):
            for read in (load_image, picture_key):
                with pytest.raises(BadImageError, match="leads out"):
                    read(text, access)
        with pytest.raises(BadImageError, match=r"no path|cannot be read"):
            load_image("circle", access)
    assert load_image(inside.as_uri(), by_flag).size == (40, 40)
    assert "%20" in inside.as_uri()
    with pytest.raises(BadImageError, match="leads out"):
        load_image(outside.as_uri(), by_flag)
    with pytest.raises(BadImageError, match="leads out"):
        load_image("file://localhost/../../etc/passwd", by_flag)
    with pytest.raises(BadImageError, match="only with --image-root"):
        load_image(inside.as_uri(), by_default)
    with pytest.raises(BadImageError, match="no folder that it could be in"):
        load_image(str(inside))


def test_a_pipe_and_a_device_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for name in ("pipe.png", "."):
        with pytest.raises(BadImageError, match="is no file"):
            load_image(name, PictureAccess(root=tmp_path))
    with pytest.raises(BadImageError, match="is no file"):
        load_image("zero", PictureAccess(root=Path("/dev")))


@pytest.mark.parametrize("form", ["PNG", "GIF", "BMP", "TIFF"])
def test_pictures_without_extent_or_too_thin_are_bad(processor: Any, encode: Encode, form: str) -> None:
    for size in ((1, 100_000), (100_000, 1)):
        if form == "GIF" and max(size) > 65_535:
            continue
        with pytest.raises(BadImageError, match="cannot be resized"):
            prepare_picture(load_image(encode(Image.new("L", size), form)), processor.image_processor)
    with pytest.raises(BadImageError, match=r"empty \(0x0\)"):
        target_size(0, 0, 32, 1024, 4096)


def test_a_picture_whose_head_says_nought_is_bad(encode: Encode) -> None:
    png = bytearray(encode(Image.new("L", (8, 8))))
    png[16:24] = bytes(8)
    png[29:33] = zlib.crc32(png[12:29]).to_bytes(4, "big")
    bmp = bytearray(encode(Image.new("L", (8, 8)), "BMP"))
    bmp[18:26] = bytes(8)
    for data in (png, bmp):
        with pytest.raises(BadImageError):
            prepare_picture(load_image(bytes(data)), None)


def test_decompression_bomb_is_refused_before_it_is_decoded(
    monkeypatch: pytest.MonkeyPatch, encode: Encode
) -> None:
    bomb = encode(Image.new("L", (5000, 5000)))
    assert len(bomb) < 100_000
    monkeypatch.setattr("slime.utils.pictures.MAX_IMAGE_PIXELS", 24_000_000)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(BadImageError, match="5000x5000 pixels"):
        load_image(bomb)


def test_formats_that_run_programs_are_not_opened() -> None:
    with pytest.raises(BadImageError):
        load_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")


class _Pictures(BaseHTTPRequestHandler):
    """Serves what the path asks for."""

    picture = b""
    calls: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        type(self).calls.append(self.path)
        if self.path == "/flaky.png" and self.calls.count(self.path) < 3:
            self.send_error(503)
            return
        if self.path == "/elsewhere.png":
            self.send_response(302)
            self.send_header("Location", "ftp://127.0.0.1/a.png")
            self.end_headers()
            return
        if self.path == "/missing.png":
            self.send_error(404)
            return
        self.send_response(200)
        self.end_headers()
        if self.path == "/slow.png":
            for _ in range(100):
                self.wfile.write(b"x")
                self.wfile.flush()
                time.sleep(0.02)
        elif self.path == "/large.png":
            self.wfile.write(b"x" * 200_000)
        else:
            self.wfile.write(self.picture)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


REMOTE = PictureAccess(remote=True)


@pytest.fixture
def server(make_noise: MakeNoise, encode: Encode) -> Iterator[str]:
    _Pictures.picture = encode(make_noise(40, 30))
    _Pictures.calls = []
    with ThreadingHTTPServer(("127.0.0.1", 0), _Pictures) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}"
        httpd.shutdown()
        thread.join()


def test_url_is_fetched_and_a_server_error_is_tried_again(server: str) -> None:
    assert load_image(f"{server}/good.png", REMOTE).size == (40, 30)
    assert load_image({"bytes": None, "path": f"{server}/flaky.png"}, REMOTE).size == (40, 30)
    assert _Pictures.calls.count("/flaky.png") == 3


def test_url_that_is_not_there_is_asked_once(server: str) -> None:
    with pytest.raises(BadImageError, match="HTTP 404"):
        load_image(f"{server}/missing.png", REMOTE)
    assert _Pictures.calls == ["/missing.png"]


def test_nothing_is_fetched_unless_it_is_allowed(server: str) -> None:
    for read in (load_image, picture_key):
        with pytest.raises(BadImageError, match="--allow-remote-images"):
            read({"url": f"{server}/good.png"})
    assert _Pictures.calls == []
    with pytest.raises(BadImageError, match=r"sends us on to 'ftp://127\.0\.0\.1/a\.png'"):
        load_image(f"{server}/elsewhere.png", REMOTE)


def test_url_has_a_time_limit_and_a_size_limit(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "FETCH_SECONDS", 0.3)
    with pytest.raises(BadImageError, match=r"not complete after 0\.3 s|timed out"):
        load_image(f"{server}/slow.png", REMOTE)
    monkeypatch.setattr(images, "FETCH_SECONDS", 60.0)
    monkeypatch.setattr(images, "MAX_IMAGE_BYTES", 100_000)
    with pytest.raises(BadImageError, match="larger than 100000 bytes"):
        load_image(f"{server}/large.png", REMOTE)


def test_unreachable_host_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images.time, "sleep", lambda seconds: None)
    with pytest.raises(BadImageError, match="cannot be fetched"):
        load_image("http://127.0.0.1:9/a.png", REMOTE)
