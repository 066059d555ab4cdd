"""Do student and teacher mean the same by an id, by their files?

The doctor asks the living teacher too, once its model is loaded. This finds the mistake before that, without
transformers, whose import takes longer than all checks together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import orjson

from slime.engines.doctor.outcome import Fault
from slime.engines.doctor.tokens import Tokens, compare_tokens
from slime.preflight.finding import Finding
from slime.preflight.launch import Launch

CHECK = "tokens"


def check_tokens(launch: Launch) -> Iterator[Finding]:
    """Compare vocabularies, image pads and chat templates, where both checkpoints lie here."""
    teacher = launch.args.opd_teacher_load if launch.teacher is None else launch.teacher.path
    student = launch.args.hf_checkpoint
    if teacher is None or any(
        launch.is_coming(path) or not Path(path).is_dir() for path in (student, teacher)
    ):
        return
    ours, theirs = read_tokens(Path(student)), read_tokens(Path(teacher))
    configs = _json(Path(student) / "config.json"), _json(Path(teacher) / "config.json")
    size = (configs[1].get("text_config") or configs[1]).get("vocab_size")
    both = f"student {student} and teacher {teacher}"
    if ours is not None and theirs is not None and isinstance(size, int):
        try:
            compare_tokens(ours, theirs, size)
        except Fault as fault:
            yield Finding(check=CHECK, what=f"{both}: {fault.message}", remedy=fault.remedy)
    if ours is not None:
        yield from _pad(student, ours, configs[0])
    pads = [config.get("image_token_id") for config in configs]
    if None not in pads and pads[0] != pads[1]:
        yield Finding(
            check=CHECK,
            what=f"{both}: a picture stands at id {pads[0]} for the one and {pads[1]} for the other",
            remedy="use checkpoints of one family",
        )
    templates = [read_template(Path(path)) for path in (student, teacher)]
    if templates[0] != templates[1] and None not in templates:
        yield Finding(
            check=CHECK,
            what=f"{both} have different chat templates: the teacher may read prompts in a form that is new "
            "to it",
            remedy="use checkpoints of one kind (Thinking with Thinking, Instruct with Instruct); the doctor "
            "tells whether they write a prompt alike",
            fatal=False,
        )


def _pad(student: str, tokens: Tokens, config: Mapping[str, Any]) -> Iterator[Finding]:
    pad = config.get("image_token_id")
    if pad is not None and pad not in tokens.special:
        yield Finding(
            check=CHECK,
            what=f"student {student}: its config has the picture's pad at id {pad}, which is "
            f"{tokens.ids.get(pad)!r} in its tokenizer, no special token",
            remedy="bring config.json and tokenizer.json of one checkpoint together",
        )


def read_tokens(folder: Path) -> Tokens | None:
    """Return the tokens of a checkpoint; None where its files have another form than Qwen's."""
    whole, config = _json(folder / "tokenizer.json"), _json(folder / "tokenizer_config.json")
    vocabulary = (whole.get("model") or {}).get("vocab")
    if not isinstance(vocabulary, dict):
        return None
    special = {entry["id"]: entry["content"] for entry in whole.get("added_tokens", [])}
    ids = {id_: token for token, id_ in vocabulary.items()} | special
    end = config.get("eos_token")
    text = end.get("content") if isinstance(end, dict) else end
    return Tokens(ids, special, next((id_ for id_, token in special.items() if token == text), None))


def read_template(folder: Path) -> str | None:
    """Return the chat template of a checkpoint, wherever it keeps it; None without one."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        template = _json(folder / name).get("chat_template")
        if isinstance(template, str):
            return template
    return None


def _json(path: Path) -> dict[str, Any]:
    """Return an object that a file holds; an empty one where there is none."""
    try:
        value = orjson.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
