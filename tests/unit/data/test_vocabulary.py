from __future__ import annotations

from slime.data.vocabulary import never_sampled
from slime.utils.processing_utils import load_processor
from tests.fakes.rollouts import CHECKPOINT, facts


def test_placeholders_and_the_last_id_are_never_sampled() -> None:
    tokenizer = load_processor(CHECKPOINT).tokenizer
    masked = never_sampled(tokenizer, facts().vocab_size)
    names = {tokenizer.convert_ids_to_tokens(token) for token in masked if token < len(tokenizer)}
    assert names == {"<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"}
    assert facts().vocab_size - 1 in masked
    assert tokenizer.eos_token_id not in masked
