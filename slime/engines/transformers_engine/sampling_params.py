"""`sampling_params` of one request: strict keys, types and ranges, as the real server has them."""

import math
from dataclasses import dataclass, field
from typing import Any

from slime.engines.transformers_engine.errors import InvalidValue
from slime.engines.transformers_engine.schema import (
    expect_bool,
    expect_float,
    expect_int,
    expect_list,
    expect_map,
    expect_str,
    one_or_list,
    unknown_field,
)

KNOWN_FIELDS = (
    "max_new_tokens", "stop", "stop_token_ids", "stop_regex", "temperature", "top_p", "top_k", "min_p",
    "frequency_penalty", "presence_penalty", "repetition_penalty", "min_new_tokens", "n", "json_schema",
    "regex", "ebnf", "structural_tag", "ignore_eos", "skip_special_tokens", "spaces_between_special_tokens",
    "no_stop_trim", "stream_interval", "logit_bias", "sampling_seed", "custom_params", "beam_width",
    "watermark", "choice",
)  # fmt: skip
UNSUPPORTED = (
    "stop_regex",
    "json_schema",
    "regex",
    "ebnf",
    "structural_tag",
    "beam_width",
    "watermark",
    "choice",
)
GREEDY_BELOW = 1e-6
MAX_STOP_STRINGS = 32
SEED_RANGE = 2**63
LONGEST = 2**31
"""More tokens than any response has: a larger number means no other."""
LONGEST_ID = 20
"""Digits of an id."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one response is sampled. `max_new_tokens` None is up to the context length; `top_k` 0 is all."""

    max_new_tokens: int | None = 128
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    no_stop_trim: bool = False
    stream_interval: int = 1
    logit_bias: dict[int, float] = field(default_factory=dict)
    sampling_seed: int | None = None
    wave: "Wave | None" = None

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.top_k == 1

    @property
    def penalised(self) -> bool:
        """Whether what was sampled so far changes the logits."""
        return self.frequency_penalty != 0 or self.presence_penalty != 0 or self.repetition_penalty != 1


@dataclass(frozen=True)
class Wave:
    """A request's place in a deterministic rollout: its wave, how many that has, and its rank."""

    name: str
    size: int
    order: int


def check_types(raw: Any) -> dict[str, Any]:
    """Return the keys of `sampling_params` that are set; raise ContractViolation on a key or type."""
    params = expect_map(raw)
    checks = {
        **dict.fromkeys(("max_new_tokens", "top_k", "min_new_tokens", "n", "stream_interval"), expect_int),
        **dict.fromkeys(("sampling_seed", "beam_width"), expect_int),
        **dict.fromkeys(("temperature", "top_p", "min_p"), expect_float),
        **dict.fromkeys(("frequency_penalty", "presence_penalty", "repetition_penalty"), expect_float),
        **dict.fromkeys(("ignore_eos", "skip_special_tokens", "spaces_between_special_tokens"), expect_bool),
        "no_stop_trim": expect_bool,
        **dict.fromkeys(("json_schema", "regex", "ebnf", "structural_tag"), expect_str),
        "stop": lambda value: one_or_list(expect_str, value),
        "stop_regex": lambda value: one_or_list(expect_str, value),
        "stop_token_ids": lambda value: [expect_int(item) for item in expect_list(value)],
        "logit_bias": lambda value: {key: expect_float(item) for key, item in expect_map(value).items()},
        "custom_params": expect_map,
    }
    checked: dict[str, Any] = {}
    for key, value in params.items():
        if key not in KNOWN_FIELDS:
            raise unknown_field(key, KNOWN_FIELDS)
        if key == "max_new_tokens":
            checked[key] = None if value is None else expect_int(value)
        elif value is not None:
            checked[key] = checks[key](value) if key in checks else value
    return checked


def build_sampling_params(checked: dict[str, Any], vocab_size: int) -> SamplingParams:
    """Make the parameters out of type-checked keys; raise InvalidValue on a range or an unsupported key."""
    for key in UNSUPPORTED:
        if checked.get(key):
            raise InvalidValue(
                f"sampling_params.{key} is not supported by the transformers engine; drop it or use an "
                "SGLang server."
            )
    known = {
        key: value for key, value in checked.items() if key not in UNSUPPORTED and key != "custom_params"
    }
    stop = known.get("stop", ())
    known["stop"] = tuple(s for s in ([stop] if isinstance(stop, str) else stop) if s)
    # an id that the model does not have is never sampled, and stops nothing
    stop_ids = (id_ for id_ in known.get("stop_token_ids", ()) if 0 <= id_ < vocab_size)
    known["stop_token_ids"] = tuple(dict.fromkeys(stop_ids))
    known["logit_bias"] = _bias(known.get("logit_bias", {}), vocab_size)
    known["wave"] = _wave(checked.get("custom_params", {}))
    temperature = known.get("temperature", 1.0)
    if 0 <= temperature < GREEDY_BELOW:
        known |= {"temperature": 1.0, "top_k": 1}
    _check_ranges(known)
    known["top_k"] = min(max(known.get("top_k", 0), 0), vocab_size)
    known["min_new_tokens"] = min(known.get("min_new_tokens", 0), LONGEST)
    known["stream_interval"] = max(known.get("stream_interval", 1), 1)
    return SamplingParams(**known)


def _check_ranges(known: dict[str, Any]) -> None:
    top_k, temperature = known.get("top_k", -1), known.get("temperature", 1.0)
    if not math.isfinite(temperature) or temperature < 0:
        raise InvalidValue(f"temperature must be a non-negative finite number, got {temperature}.")
    if top_k < 1 and top_k != -1:
        raise InvalidValue(f"top_k must be -1 (disable) or at least 1, got {top_k}.")
    ranges = (
        ("top_p", 0, 1, "(0, 1]"),
        ("min_p", 0, 1, "[0, 1]"),
        ("frequency_penalty", -2, 2, "[-2, 2]"),
        ("presence_penalty", -2, 2, "[-2, 2]"),
        ("repetition_penalty", 0, 2, "(0, 2]"),
    )
    for key, low, high, shown in ranges:
        value = known.get(key, high)
        if not low <= value <= high or (shown.startswith("(") and value == low):
            raise InvalidValue(f"{key} must be in {shown}, got {value}.")
    limit, least = known.get("max_new_tokens", 128), known.get("min_new_tokens", 0)
    if limit is not None and limit < 0:
        raise InvalidValue(f"max_new_tokens must be at least 0, got {limit}.")
    if least < 0 or (limit is not None and least > limit):
        raise InvalidValue(f"min_new_tokens must be in [0, max_new_tokens({limit})], got {least}.")
    if known.get("n", 1) < 1:
        raise InvalidValue(f"n must be at least 1, got {known['n']}.")
    if len(known["stop"]) > MAX_STOP_STRINGS:
        raise InvalidValue(f"stop has {len(known['stop'])} strings; at most {MAX_STOP_STRINGS} are allowed.")
    seed = known.get("sampling_seed", 0)
    if not -SEED_RANGE <= seed < SEED_RANGE:
        raise InvalidValue(f"sampling_seed must be in [-2**63, 2**63 - 1], got {seed}.")


def _bias(raw: dict[str, float], vocab_size: int) -> dict[int, float]:
    bias: dict[int, float] = {}
    for key, value in raw.items():
        if not key.isdecimal() or len(key) > LONGEST_ID or int(key) >= vocab_size:
            raise InvalidValue(f"logit_bias must has keys in [0, {vocab_size - 1}], got {key[:80]}.")
        bias[int(key)] = value
    return bias


def _wave(custom: dict[str, Any]) -> Wave | None:
    if "wave" not in custom:
        return None
    name, size, order = custom["wave"], custom.get("wave_size"), custom.get("order")
    truth = isinstance(size, bool) or isinstance(order, bool)
    if (
        not isinstance(name, str)
        or not isinstance(size, int)
        or not isinstance(order, int)
        or truth
        or size < 1
    ):
        raise InvalidValue(
            "custom_params.wave (a string) needs wave_size (an integer >= 1) and order (an integer) beside "
            f"it, got wave={name!r}, wave_size={size!r}, order={order!r}."
        )
    return Wave(name, size, order)
