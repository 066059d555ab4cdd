"""Strings of `image_data`: what each form means, and which errors it ends in."""

import base64
import io

import pytest
import torch
from PIL import Image

from slime.engines.transformers_engine.errors import InternalFault, InvalidValue
from slime.engines.transformers_engine.images import ImageLoader, read_image_bytes
from tests.contracts.engine_api.support import drawn_picture
from tests.unit.engines.transformers_engine.support import load_parts


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def test_all_forms_of_one_picture_are_equal(tmp_path, monkeypatch):
    data = encoded(drawn_picture(1))
    (tmp_path / "p.png").write_bytes(data)
    monkeypatch.chdir(tmp_path)
    text = base64.b64encode(data).decode()
    forms = (
        text,
        f"data:image/png;base64,{text}",
        str(tmp_path / "p.png"),
        f"file://{tmp_path}/p.png",
        "p.png",
    )
    assert {read_image_bytes(form) for form in forms} == {data}


def test_raw_base64_of_a_jpeg_is_taken_for_a_path():
    text = base64.b64encode(encoded(drawn_picture(1), "JPEG")).decode()
    assert text.startswith("/9j/")
    with pytest.raises(InternalFault):
        read_image_bytes(text)


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("!!not base64!!", InvalidValue),
        ("aGVsbG8=", InvalidValue),
        ("", InvalidValue),
        ("/nowhere/none.png", InternalFault),
        ("http://127.0.0.1:9/x.png", InvalidValue),
    ],
)
def test_what_is_no_picture_is_refused(source, error):
    with pytest.raises(error):
        load_parts()[1].load(source)


def test_modes_are_made_rgb_and_a_thin_picture_is_refused():
    loader = load_parts()[1]
    gray = loader.load(base64.b64encode(encoded(drawn_picture(1).convert("L"))).decode())
    assert gray.grid == (1, 4, 6)
    with pytest.raises(InvalidValue, match="aspect ratio"):
        loader.load(base64.b64encode(encoded(Image.new("RGB", (1000, 4)))).decode())


def test_recent_pictures_are_kept_within_the_budget(tmp_path):
    class Processor:
        calls = 0

        def __call__(self, images, return_tensors):
            self.calls += 1
            return {"pixel_values": torch.zeros(4, 4), "image_grid_thw": torch.tensor([[1, 2, 2]])}

    processor = Processor()
    loader = ImageLoader(processor, cache_bytes=2 * 64)
    sources = [base64.b64encode(encoded(drawn_picture(seed))).decode() for seed in range(3)]
    for source in sources:
        loader.load(source)
    assert [loader.recent(source) is not None for source in sources] == [False, True, True]
    path = tmp_path / "p.png"
    path.write_bytes(encoded(drawn_picture(5)))
    loader.load(str(path))
    assert loader.recent(str(path)) is None  # a file may change
    assert processor.calls == 4
