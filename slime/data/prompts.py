"""A row's prompt as text and ids: placeholders, messages, chat template. Pure but for the tokenizer.

The ids are the wire form: one image pad a picture. Pictures are only counted here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slime.utils.processing_utils import IMAGE_PAD

PLACEHOLDER = "<image>"
PICTURE_TEXT = f"<|vision_start|>{IMAGE_PAD}<|vision_end|>"
VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", IMAGE_PAD, "<|video_pad|>")
IMAGE_PART_KEYS = ("image", "image_url")
ROLES = ("system", "user", "assistant", "tool")
"""The template writes a role as it is: free text there could open a turn."""


class PromptError(ValueError):
    """A row's prompt cannot be used. The message says why, not where."""


@dataclass(frozen=True)
class PromptDraft:
    """A checked prompt before its pictures are opened."""

    messages: list[dict[str, Any]]
    """Content of each message as a list of parts: {"type": "text", "text"} or {"type": "image"}."""
    pictures: list[Any]
    """Where each picture comes from, in the order of the text."""


class PromptBuilder:
    """Turns what a row says into messages, text and ids, the same way for every row."""

    def __init__(self, processor: Any, *, apply_chat_template: bool, system_prompt: str | None) -> None:
        self._tokenizer = processor.tokenizer
        self._image_token_id = processor.image_token_id
        self._templated = apply_chat_template
        self._system_prompt = system_prompt
        special = [str(token) for token in self._tokenizer.added_tokens_decoder.values() if token.special]
        forbidden = set(VISION_TOKENS) | (set(special) if apply_chat_template else set())
        self._forbidden = re.compile("|".join(re.escape(token) for token in sorted(forbidden)))
        if apply_chat_template and not processor.chat_template:
            raise PromptError("--apply-chat-template is set and the checkpoint has no chat template.")

    def draft(self, prompt: Any, pictures: Sequence[Any]) -> PromptDraft:
        """Match placeholders with pictures, in order; without any placeholder the pictures go first.

        Raises:
            PromptError: what is wrong with the row.
        """
        messages = self._messages(prompt)
        pending = list(pictures)
        written = sum(_placeholders(message) for message in messages)
        if written == 0 and pending:
            _first_user(messages)["content"][:0] = [{"type": "image"} for _ in pending]
        elif written != len(pending):
            raise PromptError(
                f"the prompt has {written} picture placeholder{'s' * (written != 1)} and the row "
                f"{len(pending)} picture{'s' * (len(pending) != 1)}; one each is needed (or no placeholder "
                "at all)."
            )
        ordered: list[Any] = []
        for message in messages:
            message["content"] = [self._settle(part, pending, ordered) for part in message["content"]]
        return PromptDraft(messages, ordered)

    def render(self, draft: PromptDraft) -> tuple[str, list[int]]:
        """Return the prompt's text and its ids, one image pad a picture.

        Raises:
            PromptError: the template fails, drops a picture, or gives nothing.
        """
        text = self._template(draft.messages) if self._templated else _plain(draft.messages)
        ids = list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        if not ids:
            raise PromptError("the prompt is empty.")
        pads = ids.count(self._image_token_id) if self._image_token_id is not None else 0
        if pads != len(draft.pictures):
            raise PromptError(
                f"the rendered prompt has {pads} image pads for {len(draft.pictures)} pictures; "
                "the checkpoint's chat template or tokenizer does not take pictures."
            )
        return text, ids

    def _template(self, messages: Sequence[Mapping[str, Any]]) -> str:
        import jinja2  # what the tokenizer renders with

        flat = [_flatten(message) for message in messages]
        try:
            return self._tokenizer.apply_chat_template(flat, tokenize=False, add_generation_prompt=True)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            raise PromptError(f"the chat template refuses the messages: {error}") from error

    def _messages(self, prompt: Any) -> list[dict[str, Any]]:
        """Return the row's messages with their content as parts, the system prompt first."""
        if isinstance(prompt, str):
            if not prompt.strip():
                raise PromptError("the prompt is empty.")
            prompt = [{"role": "user", "content": prompt}]
        elif not self._templated:
            raise PromptError("the prompt is a list of messages; they need --apply-chat-template.")
        if not isinstance(prompt, list) or not prompt:
            raise PromptError(
                f"the prompt is a {type(prompt).__name__}; text or a list of messages is needed."
            )
        messages = [self._message(message) for message in prompt]
        if self._system_prompt is not None:
            if any(message["role"] == "system" for message in messages):
                raise PromptError(
                    "the row has a system message of its own and --system-prompt is set; drop one of them."
                )
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": self._system_prompt}]})
        return messages

    def _message(self, message: Any) -> dict[str, Any]:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise PromptError("a message must be an object with role and content.")
        if message["role"] not in ROLES:
            raise PromptError(
                f"a message has the role {message['role'][:40]!r}; {', '.join(ROLES)} are taken."
            )
        content = message.get("content")
        if isinstance(content, str):
            return {"role": message["role"], "content": self._split(content)}
        if not isinstance(content, list):
            raise PromptError(
                f"a message's content is a {type(content).__name__}; text or a list of parts is needed."
            )
        parts = [part for entry in _joined(content) for part in self._part(entry)]
        return {"role": message["role"], "content": parts}

    def _part(self, entry: Any) -> list[dict[str, Any]]:
        """Return one part of a message as our parts; a picture may bring its own source."""
        if not isinstance(entry, Mapping):
            raise PromptError(
                f"a part of a message is a {type(entry).__name__}; an object with a type is needed."
            )
        if _is_text(entry):
            return self._split(entry["text"])
        if entry.get("type") in IMAGE_PART_KEYS:
            source = next((entry[key] for key in IMAGE_PART_KEYS if entry.get(key) is not None), None)
            source = source.get("url") if isinstance(source, Mapping) and "url" in source else source
            return [{"type": "image"} if source is None else {"type": "image", "source": source}]
        raise PromptError(
            f"a message has a part of the type {entry.get('type')!r}; text and image are taken."
        )

    def _split(self, text: str) -> list[dict[str, Any]]:
        """Split text at its placeholders.

        Raises:
            PromptError: the text holds a token that only the template may write.
        """
        found = self._forbidden.search(text)
        if found is not None:
            raise PromptError(
                f"the text holds the special token {found[0]}; write {PLACEHOLDER} for a picture."
            )
        parts: list[dict[str, Any]] = []
        for number, piece in enumerate(text.split(PLACEHOLDER)):
            if number:
                parts.append({"type": "image"})
            if piece:
                parts.append({"type": "text", "text": piece})
        return parts

    @staticmethod
    def _settle(part: dict[str, Any], pending: list[Any], ordered: list[Any]) -> dict[str, Any]:
        """Give a picture part its source, in order, and keep only its place in the message."""
        if part["type"] == "image":
            ordered.append(part["source"] if "source" in part else pending.pop(0))
            return {"type": "image"}
        return part


def _joined(content: Sequence[Any]) -> list[Any]:
    """Return the parts with neighbouring texts as one: a token must not be hidden by cutting it in two."""
    joined: list[Any] = []
    for entry in content:
        if _is_text(entry) and joined and _is_text(joined[-1]):
            joined[-1] = {"type": "text", "text": joined[-1]["text"] + entry["text"]}
        else:
            joined.append(entry)
    return joined


def _is_text(entry: Any) -> bool:
    return isinstance(entry, Mapping) and entry.get("type") == "text" and isinstance(entry.get("text"), str)


def _placeholders(message: Mapping[str, Any]) -> int:
    """Count the pictures of a message that have no source of their own."""
    return sum(part["type"] == "image" and "source" not in part for part in message["content"])


def _first_user(messages: Sequence[dict[str, Any]]) -> dict[str, Any]:
    for message in messages:
        if message["role"] == "user":
            return message
    raise PromptError("the row has pictures and no user message to put them in.")


def _flatten(message: Mapping[str, Any]) -> dict[str, Any]:
    """Give text-only messages plain text: templates of text models know nothing else."""
    if all(part["type"] == "text" for part in message["content"]):
        return {"role": message["role"], "content": "".join(part["text"] for part in message["content"])}
    return dict(message)


def _plain(messages: Sequence[Mapping[str, Any]]) -> str:
    """Return the text of an untemplated prompt, pictures in Qwen's form."""
    parts = [part for message in messages for part in message["content"]]
    return "".join(part["text"] if part["type"] == "text" else PICTURE_TEXT for part in parts)
