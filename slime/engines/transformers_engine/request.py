"""The body of `/generate`, checked in the real server's three gates: shape, contract, values.

Its result is plain data, one `Item` per prompt; nothing is tokenised and no picture is opened here.
"""

from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from slime.engines.errors import excerpt
from slime.engines.transformers_engine.errors import InvalidValue, MalformedBody
from slime.engines.transformers_engine.job import LogprobOptions
from slime.engines.transformers_engine.sampling_params import (
    SamplingParams,
    build_sampling_params,
    check_types,
)
from slime.engines.transformers_engine.schema import (
    expect_bool,
    expect_int,
    expect_str,
    invalid_type,
    is_int,
    one_or_list,
    unknown_field,
)

MEDIA_FIELDS = (
    "url", "detail", "max_dynamic_patch", "content_hash", "min_pixels", "max_pixels", "total_max_pixels",
    "fps", "num_frames", "min_frames", "max_frames", "max_tokens_per_frame", "max_image_tokens", "use_audio",
    "image_grid_thw",
)  # fmt: skip
MEDIA_DEPTH = 2
"""A batch holds a list for each prompt."""
MAX_ITEMS = 65_536
"""Responses of one request. The real server has no limit, and dies of a large `n`."""
UNSUPPORTED = (
    "input_embeds", "video_data", "audio_data", "lora_path", "custom_logit_processor", "session_params",
    "return_hidden_states",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Item:
    """One prompt of a request and what is wanted for it."""

    rid: str
    prompt_index: int
    """Which prompt of the request; the n samples of one prompt share it."""
    copy: int
    """Which of the n samples."""
    text: str | None
    ids: list[int] | None
    images: tuple[str, ...]
    params: SamplingParams
    logprobs: LogprobOptions


@dataclass(frozen=True, kw_only=True)
class GenerateBody:
    """A whole request: its items, and whether the answer is a list."""

    items: list[Item]
    is_list: bool
    stream: bool
    prompt_token_ids: bool


def parse_generate(body: Any, vocab_size: int) -> GenerateBody:
    """Check a decoded body and spread it over its prompts; raise a RequestError that says what is wrong."""
    _check_shape(body)
    params = _check_contract(body)
    return _spread(body, params, vocab_size)


def _check_shape(body: Any) -> None:
    if not isinstance(body, dict):
        raise MalformedBody(
            f"1 validation error:\n  body: Input should be a dictionary, got {excerpt(body, 80)!r}"
        )
    ids = body.get("input_ids")
    if ids is None:
        return
    if not isinstance(ids, list):
        raise MalformedBody(
            f"1 validation error:\n  body.input_ids: must be a list, got {type(ids).__name__}"
        )
    for row in ids if ids and isinstance(ids[0], list) else [ids]:
        if not isinstance(row, list):
            raise MalformedBody("1 validation error:\n  body.input_ids: lists and integers are mixed")
        wrong = [item for item in row if not is_int(item)]  # null is wrong, too
        if wrong:
            raise MalformedBody(
                "1 validation error:\n  body.input_ids: elements must be int or list; "
                f"got {type(wrong[0]).__name__}"
            )


def _check_contract(body: dict[str, Any]) -> list[dict[str, Any]] | dict[str, Any]:
    """Check the types of known keys, ignoring others; return the checked sampling parameters."""
    checks = {
        "rid": expect_str,
        "text": expect_str,
        "return_logprob": expect_bool,
        "logprob_start_len": expect_int,
        "top_logprobs_num": expect_int,
        "return_hidden_states": expect_bool,
    }
    for key, check in checks.items():
        if body.get(key) is not None:
            one_or_list(check, body[key])
    flat = (
        "return_flat_raw_top_logprobs",
        "return_flat_raw_output_top_logprobs",
        "return_flat_raw_top_logprobs_b64",
    )
    for key in ("stream", "return_text_in_logprobs", *flat):
        if body.get(key) is not None:
            expect_bool(body[key])
    if "return_prompt_token_ids" in body:
        expect_bool(body["return_prompt_token_ids"])
    _check_media(body.get("image_data"))
    raw = body.get("sampling_params")
    return one_or_list(check_types, {} if raw is None else raw)


def _check_media(value: Any, depth: int = 0) -> None:
    if isinstance(value, list):
        if depth == MEDIA_DEPTH:
            raise invalid_type(value, "a string, a map or a sequence of them")
        for item in value:
            _check_media(item, depth + 1)
    elif isinstance(value, dict):
        for key in value:
            if key not in MEDIA_FIELDS:
                raise unknown_field(key, MEDIA_FIELDS)
        if not isinstance(value.get("url"), str):
            raise invalid_type(value.get("url"), "a string as url")
    elif value is not None and not isinstance(value, str):
        raise invalid_type(value, "a string, a map or a sequence")


def _spread(
    body: dict[str, Any], params: list[dict[str, Any]] | dict[str, Any], vocab_size: int
) -> GenerateBody:
    for key in UNSUPPORTED:
        if body.get(key):
            raise InvalidValue(
                f"{key} is not supported by the transformers engine; drop it or use an SGLang server."
            )
    text, ids = body.get("text"), body.get("input_ids")
    if text is None and ids is None:
        raise InvalidValue("Either text, input_ids or input_embeds should be provided.")
    prompts: Any = text if text is not None else ids
    is_list = _is_batch(prompts) or text == []
    if text is not None and ids is not None and _is_batch(text) != _is_batch(ids):
        raise InvalidValue("one of text and input_ids is a single prompt and the other a list of prompts.")
    count = len(prompts) if is_list else 1
    if count == 0:
        raise InvalidValue("text is an empty list: send at least one prompt.")
    per_prompt = _per_prompt(params, count, "sampling_params")
    samples = {given.get("n", 1) for given in per_prompt}
    if len(samples) > 1:
        raise InvalidValue(f"all items of a request must have the same n, got {sorted(samples)}.")
    n = samples.pop()
    if n > 0 and count * n > MAX_ITEMS:
        raise InvalidValue(f"{count} prompts by n = {n} samples are too many: at most {MAX_ITEMS}.")
    texts: list[str | None] = [None] * count if text is None else _per_prompt(text, count, "text")
    id_lists: list[list[int] | None] = [None] * count if ids is None else ids if is_list else [ids]
    if len(id_lists) != count:
        raise InvalidValue(f"input_ids has {len(id_lists)} items for {count} prompts.")
    images = _images(body.get("image_data"), count, single=not is_list and n == 1)
    options = _logprob_options(body, count, n, vocab_size)
    built = [build_sampling_params(given, vocab_size) for given in per_prompt]
    rids = _rids(body.get("rid"), count, n, is_list)
    items = []
    for index in range(count):
        if id_lists[index] == []:
            raise InvalidValue("input_ids cannot be empty.")
        for copy in range(n):
            items.append(
                Item(
                    rid=rids[index * n + copy],
                    prompt_index=index,
                    copy=copy,
                    text=texts[index],
                    ids=id_lists[index],
                    images=images[index],
                    params=built[index],
                    logprobs=options[index],
                )
            )
    return GenerateBody(
        items=items,
        is_list=is_list or n > 1,
        stream=bool(body.get("stream")),
        prompt_token_ids=body.get("return_prompt_token_ids", False),
    )


def _is_batch(prompts: Any) -> bool:
    """Tell whether a `text` or `input_ids` is a list of prompts; no ids at all are one empty prompt."""
    return isinstance(prompts, list) and bool(prompts) and isinstance(prompts[0], list | str)


def _per_prompt(value: Any, count: int, name: str) -> list[Any]:
    """Repeat a single value for every prompt, or check the length of a list of them."""
    if not isinstance(value, list):
        return [value] * count
    if len(value) != count:
        raise InvalidValue(f"The length of {name} ({len(value)}) must equal the batch size ({count}).")
    return value


def _images(data: Any, count: int, *, single: bool) -> list[tuple[str, ...]]:
    """Return each prompt's pictures: a single request has a flat list, a batch one entry per prompt."""
    if single:
        flat = data if isinstance(data, list) else [data]
        if any(isinstance(item, list) for item in flat):
            raise InvalidValue(
                "image_data of a single request must be a flat list of pictures, got a nested one."
            )
        return [_sources(flat)]
    if data is None:
        return [()] * count
    per_prompt = data if isinstance(data, list) else [data] * count
    if len(per_prompt) != count:
        raise InvalidValue(
            f"The length of image_data ({len(per_prompt)}) must equal the batch size ({count})."
        )
    return [_sources(item if isinstance(item, list) else [item]) for item in per_prompt]


def _sources(items: list[Any]) -> tuple[str, ...]:
    return tuple(item["url"] if isinstance(item, dict) else item for item in items if item is not None)


def _logprob_options(body: dict[str, Any], count: int, n: int, vocab_size: int) -> list[LogprobOptions]:
    def column(key: str, default: Any) -> list[Any]:
        value = body.get(key)
        if n > 1 and isinstance(value, list):
            raise InvalidValue(f"{key} must not be a list when n > 1.")
        return _per_prompt(default if value is None else value, count, key)

    wanted, start = column("return_logprob", False), column("logprob_start_len", -1)
    top = column("top_logprobs_num", 0)
    token_ids = _token_ids(body.get("token_ids_logprob"), count, vocab_size)
    flat_input, flat_output, b64 = (
        bool(body.get(f"return_flat_raw_{key}"))
        for key in ("top_logprobs", "output_top_logprobs", "top_logprobs_b64")
    )
    if flat_output and body.get("stream"):
        raise InvalidValue("return_flat_raw_output_top_logprobs cannot be used with stream.")
    if b64 and not (flat_input or flat_output):
        raise InvalidValue(
            "return_flat_raw_top_logprobs_b64 needs return_flat_raw_top_logprobs or "
            "return_flat_raw_output_top_logprobs."
        )
    for index in range(count):
        if wanted[index] and start[index] < -1:
            raise InvalidValue(
                f"logprob_start_len must be -1 (no prompt log-probs) or at least 0, got {start[index]}; "
                "an SGLang server dies of it."
            )
        if top[index] < 0:
            raise InvalidValue(f"top_logprobs_num must be at least 0, got {top[index]}.")
    return [
        LogprobOptions(
            wanted=wanted[index],
            start=start[index],
            top=min(top[index], vocab_size),
            token_ids=token_ids[index],
            text=bool(body.get("return_text_in_logprobs")),
            flat_input=flat_input,
            flat_output=flat_output,
            base64=b64,
        )
        for index in range(count)
    ]


def _token_ids(value: Any, count: int, vocab_size: int) -> list[tuple[int, ...]]:
    if value is None:
        return [()] * count
    if not isinstance(value, list):
        raise InvalidValue("token_ids_logprob must be a flat list of integers.")
    nested = bool(value) and isinstance(value[0], list)
    rows = _per_prompt(value, count, "token_ids_logprob") if nested else [value] * count
    for row in rows:
        if not isinstance(row, list) or not all(is_int(item) for item in row):
            raise InvalidValue("token_ids_logprob must be a flat list of integers.")
        outside = [item for item in row if not 0 <= item < vocab_size]
        if outside:
            raise InvalidValue(
                f"token_ids_logprob holds {outside[0]}, outside the vocabulary [0, {vocab_size})."
            )
    return [tuple(row) for row in rows]


def _rids(rid: Any, count: int, n: int, is_list: bool) -> list[str]:
    total = count * n
    if rid is None or n > 1:
        return [uuid4().hex for _ in range(total)]
    if isinstance(rid, list):
        rids = _per_prompt(rid, count, "rid")
        if len(set(rids)) < count:
            raise InvalidValue("Duplicate request ID detected: rid holds an id twice.")
        return rids
    return [f"{rid}_{index}" for index in range(count)] if is_list else [rid]
