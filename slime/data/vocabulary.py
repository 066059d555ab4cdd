"""Which ids a student never samples. The rollout masks them, and the trainer normalises without them.

Both must: what is sampled from the rest of the vocabulary and trained as if all of it had been open has a
gradient that pushes probability to the masked ids, a little with every step, until engine and trainer are
nats apart.
"""

from __future__ import annotations

from typing import Any

PLACEHOLDERS = (
    "<|image_pad|>",
    "<|video_pad|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|audio_pad|>",
)
"""Tokens that stand for media. A student samples them now and then; servers and trainer would look for a
picture."""


def never_sampled(tokenizer: Any, vocab_size: int) -> tuple[int, ...]:
    """Return the masked ids, ascending: placeholders, and the last id where it is no token.

    Servers report ids from `vocab_size - 1` on as 0, so that a sample with it could not be checked.
    """
    vocabulary = tokenizer.get_vocab()
    masked = {vocabulary[token] for token in PLACEHOLDERS if token in vocabulary}
    if vocab_size - 1 not in vocabulary.values():
        masked.add(vocab_size - 1)
    return tuple(sorted(masked))
