"""Probes: ids that no tokenizer would write so, pictures of sizes that are left alone."""

import pytest

from slime.engines.doctor.material import Material
from slime.tiny.paths import checkpoint_path
from tests.contracts.reference import MODEL

STUDENT = str(checkpoint_path("student"))


@pytest.fixture(scope="module", params=[STUDENT, str(MODEL)], ids=["tiny", "bpe"])
def material(request: pytest.FixtureRequest) -> Material:
    return Material(request.param)


def test_the_response_stays_below_what_is_known(material: Material) -> None:
    whole = material.response(len(material.tokenizer))
    ordinary = set(range(len(material.tokenizer))) - set(material.tokenizer.added_tokens_decoder)
    assert max(ordinary) in whole
    assert set(whole) <= ordinary | {material.tokenizer.eos_token_id}
    assert max(material.response(50)) < 50


def test_a_server_that_retokenises_writes_the_response_otherwise() -> None:
    material = Material(str(MODEL))
    ids = list(material.response(len(material.tokenizer)))
    assert material.tokenizer.encode(material.tokenizer.decode(ids)) != ids


def test_the_vocabulary_text_needs_every_special_token(material: Material) -> None:
    ids = set(material.encode(material.vocabulary_text()))
    assert set(material.tokenizer.added_tokens_decoder) <= ids


def test_pictures_are_of_sizes_that_the_processor_leaves_alone(material: Material) -> None:
    processor = material.processor.image_processor
    side = processor.patch_size * processor.merge_size
    sizes = material.sizes(None)
    assert len(sizes) == 3
    for variant, (pixels, ratio) in enumerate(sizes):
        picture = material.picture(pixels, ratio, variant)
        width, height = picture.image.size
        assert width % side == 0
        assert height % side == 0
        assert material.low <= width * height <= material.high
        assert picture.tokens == width * height // side**2


def test_a_small_context_shrinks_the_large_picture(material: Material) -> None:
    assert material.sizes(64)[-1][0] == 64 * 32**2


def test_pictures_differ_from_run_to_run_and_by_variant(material: Material) -> None:
    again = Material(material.checkpoint)
    uris = {material.picture().uri, material.picture(variant=1).uri, again.picture().uri}
    assert len(uris) == 3
    assert material.picture().uri == material.picture().uri


def test_limits_that_leave_no_size_are_an_error() -> None:
    with pytest.raises(ValueError, match="--image-min-pixels"):
        Material(STUDENT, min_pixels=2**20)
