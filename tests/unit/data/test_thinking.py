"""Which tokens of a response are its thought."""

from __future__ import annotations

import pytest
import torch

from slime.data.thinking import ThinkTags

OPEN, CLOSE = 90, 91


@pytest.mark.parametrize(
    ("prompt", "response", "thought"),
    [
        ([1, 2], [OPEN, 3, CLOSE, 4, 5], [1, 1, 1, 0, 0]),
        ([1, OPEN, 2], [3, CLOSE, 4], [1, 1, 0]),
        ([1, OPEN, 2], [3, 4], [1, 1]),
        ([1, 2], [OPEN, 3], [1, 1]),
        ([1, 2], [3, 4], [0, 0]),
        ([OPEN, 7, CLOSE, 2], [3, 4], [0, 0]),
        ([1, 2], [3, CLOSE, 4, CLOSE, 5], [1, 1, 0, 0, 0]),
    ],
    ids=[
        *("both tags", "opened by the template", "cut off in the thought", "cut off, opened by itself"),
        *("no thought", "an earlier turn's thought", "the first end counts"),
    ],
)
def test_thought_reaches_to_its_end_tag(prompt: list[int], response: list[int], thought: list[int]) -> None:
    tokens = torch.tensor([*prompt, *response])
    assert ThinkTags(OPEN, CLOSE).thinking(tokens, len(response)).tolist() == [bool(flag) for flag in thought]


def test_a_tokenizer_without_tags_has_no_thoughts() -> None:
    class Plain:
        @staticmethod
        def get_vocab() -> dict[str, int]:
            return {"a": 0}

    tags = ThinkTags.of(Plain())
    assert tags == ThinkTags(None, None)
    assert tags.thinking(torch.tensor([0, 0, 0]), 2).tolist() == [False, False]
