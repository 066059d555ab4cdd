"""The tiny tokenizer: printable ASCII comes back, special tokens are single, the template is Qwen's."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from slime.tiny.geometry import GEOMETRY
from slime.tiny.tokenizer import (
    SPECIAL_TOKENS,
    THINK_TOKENS,
    UNKNOWN,
    VOCAB_SIZE,
    build_tokenizer,
    save_tokenizer,
)

TOKENIZER = build_tokenizer()
PRINTABLE = st.text(st.sampled_from([chr(code) for code in range(32, 127)] + ["\n"]))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    directory = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(directory)
    return AutoTokenizer.from_pretrained(directory)


def test_the_vocabulary_is_small_and_leaves_the_last_id_unused(loaded: PreTrainedTokenizerBase) -> None:
    assert 90 <= len(loaded) < VOCAB_SIZE <= 130
    assert max(loaded.get_vocab().values()) < VOCAB_SIZE - 1


@given(PRINTABLE)
@settings(max_examples=200, deadline=None)
def test_printable_text_comes_back(text: str) -> None:
    assume(UNKNOWN not in text)
    ids = TOKENIZER(text, add_special_tokens=False).input_ids
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.unk_token_id not in ids


def test_problems_and_solutions_come_back_and_are_short(loaded: PreTrainedTokenizerBase) -> None:
    for row in GEOMETRY.make_splits()["validation"]:
        for text in (row.text.removeprefix("<image>"), row.solution):
            assert loaded.decode(loaded(text).input_ids) == text
        assert 25 <= len(loaded(row.solution).input_ids) <= 60


@pytest.mark.parametrize("token", [*SPECIAL_TOKENS, *THINK_TOKENS])
def test_special_tokens_are_one_token(token: str, loaded: PreTrainedTokenizerBase) -> None:
    assert loaded(f"a{token}b").input_ids == loaded.convert_tokens_to_ids(["a", token, "b"])


def test_decoding_drops_special_tokens_and_keeps_the_thought(loaded: PreTrainedTokenizerBase) -> None:
    ids = loaded("<think>2*3=6</think>6<|im_end|>").input_ids
    assert loaded.decode(ids, skip_special_tokens=True) == "<think>2*3=6</think>6"


def test_what_is_not_ascii_is_marked_as_unknown(loaded: PreTrainedTokenizerBase) -> None:
    assert loaded.decode(loaded("90°").input_ids) == f"90{UNKNOWN}"


def test_the_files_are_the_tokenizer(loaded: PreTrainedTokenizerBase) -> None:
    text = "Please reason step by step, and put your final answer within \\boxed{}."
    assert loaded(text).input_ids == TOKENIZER(text).input_ids
    assert (loaded.eos_token, loaded.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_the_chat_template_writes_qwens_turns(loaded: PreTrainedTokenizerBase) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Find the area."}]},
        {"role": "assistant", "content": [{"type": "text", "text": "6"}]},
        {
            "role": "user",
            "content": [{"type": "text", "text": "Look: "}, {"type": "image_url", "image_url": "x"}],
        },
    ]
    text = loaded.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Find the area.<|im_end|>\n"
        "<|im_start|>assistant\n6<|im_end|>\n"
        "<|im_start|>user\nLook: <|vision_start|><|image_pad|><|vision_end|><|im_end|>\n"
        "<|im_start|>assistant\n"
    )
