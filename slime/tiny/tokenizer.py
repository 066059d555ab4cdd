"""Builds the tiny tokenizer: Qwen's special tokens, a few whole words, and every printable ASCII character.

Any text of printable ASCII characters and newlines encodes and decodes to itself; any other character becomes
`<|unknown|>`. The chat template follows Qwen3-VL's.
"""

from pathlib import Path
from typing import Final

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, END = "<|endoftext|>", "<|im_end|>"
UNKNOWN: Final = "<|unknown|>"
SPECIAL_TOKENS: Final = (
    PAD,
    "<|im_start|>",
    END,
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    UNKNOWN,
)
THINK_TOKENS: Final = ("<think>", "</think>")
WORDS: Final = (
    *("system", "user", "assistant", "Find", "What", "the", "area", "perimeter", "rectangle"),
    *("parallelogram", "figure", "triangle", "rhombus", "right", "width", "height", "base", "side"),
    *("legs", "diagonals", "Answer", "boxed"),
)
VOCAB_SIZE: Final = 130
"""Rows of the embedding: more than tokens, since SGLang reports the last id of a vocabulary as 0."""
MAX_LENGTH: Final = 4096

CHAT_TEMPLATE: Final = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content %}
            {%- if part.type == 'image' or 'image' in part or 'image_url' in part %}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' }}
            {%- elif part.type == 'video' or 'video' in part %}
                {{- '<|vision_start|><|video_pad|><|vision_end|>' }}
            {%- elif 'text' in part %}
                {{- part.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer in memory."""
    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    tokens = [*SPECIAL_TOKENS, *THINK_TOKENS, *characters, *WORDS]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("|".join([*WORDS, r"[\s\S]"])), "isolated")
    core.decoder = decoders.Fuse()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    core.add_tokens([AddedToken(token, special=False, normalized=False) for token in THINK_TOKENS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=END,
        pad_token=PAD,
        unk_token=UNKNOWN,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def save_tokenizer(directory: Path) -> None:
    """Save tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    build_tokenizer().save_pretrained(directory)
