"""Where prompts come from and how a row becomes one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from slime.arguments.flags import flag


def _columns(text: str) -> dict[str, str]:
    """Read `{"image": "images"}`."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON: {error}") from error
    if not isinstance(value, dict) or not all(isinstance(column, str) for column in value.values()):
        raise ValueError('must be a JSON object of column names, as {"image": "images"}')
    return value


@dataclass(frozen=True, kw_only=True)
class DataArgs:
    """Data"""

    prompt_data: str = flag(
        "",
        help="Training prompts: a .parquet or .jsonl file, a folder of them, or a hub dataset (owner/name). "
        "PATH@SPLIT picks a split (default train), PATH@[FROM:TO] a slice.",
        required_unless="--load-debug-rollout-data",
    )
    input_key: str = flag("problem", help="Column of the prompt: text, or a list of messages.")
    label_key: str | None = flag("answer", help="Column of the reference answer.")
    multimodal_keys: dict[str, str] = flag(  # noqa: RUF009  the field is made once, as all others
        help='Columns of the media, as JSON {"image": "images"}. {} for text alone.',
        parse=_columns,
        derive=lambda args: {"image": "images"},
        derived_from='{"image": "images"}',
    )
    metadata_key: str = flag(
        "metadata", help="Column of a dict that is kept on the sample, where the data has it."
    )
    apply_chat_template: bool = flag(False, help="Put the prompt into the model's chat template.")
    system_prompt: str | None = flag(
        None, help="System message before every prompt; needs --apply-chat-template."
    )
    rollout_shuffle: bool = flag(False, help="Shuffle the prompts, anew in each epoch, by --seed.")
    seed: int = flag(1234, help="Seed of everything that is random in a run.", at_least=0)
    bad_rows: Literal["refuse", "skip"] = flag(
        "refuse",
        help="A row that cannot be used: refuse ends the run and names it, skip counts it and goes on.",
    )
    max_prompt_length: int | None = flag(
        None,
        name="--rollout-max-prompt-len",
        help="Longest prompt in tokens, picture tokens included; a longer one is a bad row.",
        at_least=1,
    )
    image_root: str | None = flag(
        None,
        help="Folder that picture paths are relative to and may not leave. Default: the data file's folder.",
    )
    allow_remote_images: bool = flag(
        False, help="Fetch pictures that rows name by http or https URLs; without it such a row is bad."
    )
    image_min_pixels: int | None = flag(
        None,
        help="Smallest picture area; smaller ones are enlarged. Default: the model's processor decides.",
        at_least=1,
    )
    image_max_pixels: int | None = flag(
        None,
        help="Largest picture area; larger ones are shrunk. Default: the model's processor decides.",
        at_least=1,
    )

    def validate(self) -> Iterator[str]:
        """Yield what is wrong inside this group."""
        if self.system_prompt is not None and not self.apply_chat_template:
            yield (
                "--system-prompt is set without --apply-chat-template: there is no message list to put it "
                "in. Add --apply-chat-template or drop --system-prompt."
            )
        unknown = set(self.multimodal_keys) - {"image"}
        if unknown:
            yield f"--multimodal-keys has {sorted(unknown)}; only the kind image is understood."
        if (
            self.image_min_pixels is not None
            and self.image_max_pixels is not None
            and self.image_min_pixels > self.image_max_pixels
        ):
            yield (
                f"--image-min-pixels {self.image_min_pixels} is above --image-max-pixels "
                f"{self.image_max_pixels}; no picture can be both."
            )
