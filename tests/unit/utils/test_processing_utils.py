"""The processor without torchvision against transformers' pieces, and its own processor where that loads."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

from slime.tiny.paths import checkpoint_path
from slime.utils import processing_utils
from slime.utils.pictures import BadImageError
from slime.utils.processing_utils import (
    Processor,
    encode_image_for_rollout_engine,
    load_processor,
    torchvision_works,
)

PATH = checkpoint_path("student")
TEXT = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What is the area?<|im_end|>\n"


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def ours() -> Processor:
    """Our processor, whatever is installed."""
    tokenizer = AutoTokenizer.from_pretrained(PATH)
    return Processor(tokenizer, AutoImageProcessor.from_pretrained(PATH, backend="pil"))


def test_outputs_are_those_of_transformers_pieces(ours: Processor) -> None:
    pictures = [noise(96, 64), noise(130, 70)]
    made = ours(text=TEXT * 2, images=pictures, return_tensors="pt")
    pixels = AutoImageProcessor.from_pretrained(PATH, backend="pil")(images=pictures, return_tensors="pt")
    assert torch.equal(made["pixel_values"], pixels["pixel_values"])
    assert torch.equal(made["image_grid_thw"], pixels["image_grid_thw"])
    counts = [int(grid.prod()) // 4 for grid in pixels["image_grid_thw"]]
    expanded = "".join(TEXT.replace("<|image_pad|>", "<|image_pad|>" * count) for count in counts)
    ids = AutoTokenizer.from_pretrained(PATH)(expanded)["input_ids"]
    assert made["input_ids"].tolist() == [ids]
    assert made["attention_mask"].tolist() == [[1] * len(ids)]
    assert made["mm_token_type_ids"].tolist() == [[int(token == ours.image_token_id) for token in ids]]


def test_text_alone_and_single_pictures_are_taken(ours: Processor) -> None:
    made = ours(text="the area")
    assert set(made) == {"input_ids", "attention_mask", "mm_token_type_ids"}
    assert made["mm_token_type_ids"] == [[0] * len(made["input_ids"][0])]
    assert ours(text=TEXT, images=noise(64, 64), return_tensors="pt")["image_grid_thw"].tolist() == [
        [1, 4, 4]
    ]


@pytest.mark.parametrize(("text", "pictures"), [(TEXT, []), (TEXT * 2, [0]), ("none", [0])])
def test_another_number_of_pads_than_pictures_is_an_error(
    ours: Processor, text: str, pictures: list[int]
) -> None:
    images = [noise(64, 64, seed) for seed in pictures] or None
    with pytest.raises(ValueError, match="one each is needed"):
        ours(text=text, images=images)


def test_public_attributes(ours: Processor) -> None:
    assert ours.image_token_id == ours.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert ours.merge_size == 2
    assert ours.chat_template == ours.tokenizer.chat_template
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is the area?"}]}
    ]
    assert ours.apply_chat_template(messages, tokenize=False) == TEXT


def test_loaded_processor_has_what_the_rest_relies_on() -> None:
    processor = load_processor(PATH)
    assert processor.merge_size == 2
    assert processor.image_token_id == processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert processor.image_processor.size["shortest_edge"] > 0
    assert processor.chat_template


def test_text_checkpoint_has_a_processor_without_eyes(tmp_path: Path) -> None:
    AutoTokenizer.from_pretrained(PATH).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}')
    processor = load_processor(tmp_path)
    assert processor.image_processor is None
    assert processor(text="the area")["input_ids"]
    with pytest.raises(ValueError, match="text alone"):
        processor(text=TEXT, images=noise(64, 64))


def test_missing_checkpoint_is_an_oserror(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="absent"):
        load_processor(tmp_path / "absent")


def test_saved_processor_loads_again(ours: Processor, tmp_path: Path) -> None:
    ours.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    again = Processor(tokenizer, AutoImageProcessor.from_pretrained(tmp_path, backend="pil"))
    first = ours(text=TEXT, images=noise(96, 64), return_tensors="pt")
    second = again(text=TEXT, images=noise(96, 64), return_tensors="pt")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.skipif(not torchvision_works(), reason="torchvision does not load here")
def test_ours_is_the_same_as_transformers_own(ours: Processor) -> None:
    theirs = AutoProcessor.from_pretrained(PATH)
    assert type(load_processor(PATH)) is type(theirs)
    pictures = [noise(96, 64), noise(128, 96)]  # sizes that no processor changes
    first = ours(text=[TEXT * 2], images=pictures, return_tensors="pt")
    second = theirs(text=[TEXT * 2], images=pictures, return_tensors="pt")
    assert first.keys() == second.keys()
    for name in first.keys() - {"pixel_values"}:
        assert torch.equal(first[name], second[name])
        assert first[name].dtype == second[name].dtype
    assert torch.allclose(first["pixel_values"], second["pixel_values"], atol=1e-6)


def test_torchvision_that_does_not_load_counts_as_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise RuntimeError("operator torchvision::nms does not exist")

    torchvision_works.cache_clear()
    monkeypatch.setattr(processing_utils.importlib, "import_module", broken)
    assert not torchvision_works()
    torchvision_works.cache_clear()


def png_bytes(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_every_form_is_encoded_as_the_png_of_its_pixels(tmp_path: Path) -> None:
    image = noise(40, 30)
    data = png_bytes(image)
    (tmp_path / "a.png").write_bytes(data)
    bitmap = io.BytesIO()
    image.save(bitmap, "BMP")
    forms: list[Any] = [
        image,
        data,
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        {"bytes": data, "path": None},
        {"bytes": None, "path": str(tmp_path / "a.png")},
        "data:image/bmp;base64," + base64.b64encode(bitmap.getvalue()).decode(),
    ]
    uris = {encode_image_for_rollout_engine(form) for form in forms}
    assert len(uris) == 1
    uri = uris.pop()
    assert uri.startswith("data:image/png;base64,")
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))
    assert np.array_equal(pixels, np.asarray(image))
    assert encode_image_for_rollout_engine(uri) == uri


def test_what_cannot_be_encoded_is_one_clear_error() -> None:
    for bad in ("https://host/a.png", "absent.png", b"x", {"bytes": None, "path": None}, 3):
        with pytest.raises(BadImageError):
            encode_image_for_rollout_engine(bad)  # pyright: ignore[reportArgumentType]
