"""Rows that nobody vetted: whatever a line holds, it is a sample or a `BadRow` with its number."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slime.arguments import Args
from slime.data.errors import BadRow
from slime.data.picture_store import PictureStore
from slime.data.rows import PreparedPrompt, RowPreparer

TEXTS = st.text(max_size=20) | st.sampled_from(
    [
        "<image>",
        "<image><image>",
        "<|image_pad|>",
        "<|vision_start|>",
        "a <image> b",
        "<|im_end|>",
        "{{ 7 }}",
        "\0",
    ]
)
PICTURES = st.sampled_from(
    ["data:image/png;base64,AAAA", "../../etc/passwd", "a.png", "file:///etc/passwd", ""]
)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXTS
    | PICTURES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "image", "bytes", "path", "url"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "system", "assistant", ""]), "content": TEXTS | JSON}
    ),
    max_size=3,
)
ROWS = st.fixed_dictionaries(
    {},
    optional={
        "problem": TEXTS | MESSAGES | JSON,
        "answer": TEXTS | JSON,
        "images": st.lists(PICTURES, max_size=2) | JSON,
    },
)


@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(rows=st.lists(ROWS, min_size=1, max_size=4))
def test_any_row_is_a_prompt_or_a_bad_row(
    rows: list[dict[str, Any]], processor: Any, make_args: Callable[..., Args], tmp_path: Path
) -> None:
    good = {"problem": "1+1", "answer": "2", "images": []}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [good, *rows]))
    args = make_args(str(path), "--bad-rows", "skip")
    preparer = RowPreparer(args, str(path), processor, PictureStore())
    outcomes = [preparer.try_prepare(index) for index in range(len(preparer))]
    assert isinstance(outcomes[0], PreparedPrompt)
    for number, outcome in enumerate(outcomes, 1):
        if isinstance(outcome, BadRow):
            assert (outcome.file, outcome.row) == (str(path), number)
        else:
            assert outcome.tokens.count(processor.image_token_id) == len(outcome.pictures)


@settings(max_examples=150, deadline=None)
@given(
    data=st.binary(max_size=200),
    head=st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a", b"BM", b"RIFF"]),
)
def test_any_bytes_are_a_picture_or_a_bad_image(data: bytes, head: bytes) -> None:
    from slime.data.images import load_image
    from slime.utils.pictures import BadImageError

    try:
        load_image(head + data)
    except BadImageError:
        return


@pytest.mark.parametrize("depth", [10, 5000])
def test_deep_nesting_is_a_bad_row(
    processor: Any, make_args: Callable[..., Args], tmp_path: Path, depth: int
) -> None:
    good = {"problem": "1+1", "answer": "2", "images": []}
    path = tmp_path / "rows.jsonl"
    nested = "[" * depth + "]" * depth
    path.write_text(json.dumps(good) + "\n" + '{"problem": ' + nested + ', "answer": "1", "images": []}\n')
    preparer = RowPreparer(make_args(str(path), "--bad-rows", "skip"), str(path), processor, PictureStore())
    assert isinstance(preparer.try_prepare(1), BadRow)
