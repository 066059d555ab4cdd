"""The student's generating servers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import urlsplit

from slime.arguments.devices import visible_gpus
from slime.arguments.flags import flag

SGLANG_PREFIX = "--sglang-"
SglangValue = str | bool | tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class EngineArgs:
    """Engine"""

    engine: Literal["sglang", "transformers"] = flag(
        help=(
            "Server that generates for the student. sglang: SGLang; transformers: our small one on "
            "transformers."
        ),
        derive=lambda args: "sglang" if visible_gpus() else "transformers",
        derived_from="sglang where there are GPUs, transformers otherwise",
    )
    rollout_engine_urls: tuple[str, ...] = flag(
        (), help="Student engines that run elsewhere (http://host:port …); none are started here then."
    )
    engine_dtype: Literal["float32", "bfloat16"] | None = flag(
        None, help="Precision of the student's engines. Default: the precision of training (--train-dtype)."
    )
    engine_threads: int = flag(1, help="CPU threads of one engine, where it runs on a CPU.", at_least=1)
    engine_start_timeout: float = flag(600.0, help="Seconds an engine may take until it answers.", above=0)
    engine_restarts: int = flag(
        3,
        help="How often each engine of this run is started anew when it dies or hangs; 0: it ends the run.",
        at_least=0,
    )
    rollout_health_check_interval: float = flag(
        30.0, help="Seconds between two health checks of an engine that generates.", above=0
    )
    rollout_health_check_timeout: float = flag(
        30.0,
        help="Seconds that a health check may take. An engine that fails three in a row is started anew.",
        above=0,
    )

    def validate(self) -> Iterator[str]:
        """Yield what is wrong inside this group."""
        for url in self.rollout_engine_urls:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                yield f"--rollout-engine-urls has {url!r}; each must look like http://127.0.0.1:30000."


@dataclass(frozen=True, kw_only=True)
class SglangArgs:
    """SGLang pass-through"""

    sglang: dict[str, SglangValue] = field(default_factory=dict)
    """Every `--sglang-NAME [VALUE …]` as {"name": value}, with underscores; True where it has no value."""

    def sglang_command_line(self) -> list[str]:
        """Return the collected flags as SGLang's own command line has them."""
        words: list[str] = []
        for name, value in self.sglang.items():
            words.append("--" + name.replace("_", "-"))
            if isinstance(value, str):
                words.append(value)
            elif isinstance(value, tuple):
                words.extend(value)
        return words

    def validate(self) -> Iterator[str]:
        """Yield what is wrong inside this group."""
        for key, variable in (
            ("api_key", "SLIME_ENGINE_API_KEY"),
            ("admin_api_key", "SLIME_ENGINE_ADMIN_KEY"),
        ):
            if key in self.sglang:
                yield (
                    f"{SGLANG_PREFIX}{key.replace('_', '-')} would show the key in the process list; "
                    f"set the environment variable {variable} instead."
                )
        reserved = {"model_path", "host", "port", "tp", "tp_size", "tensor_parallel_size"}
        for key in sorted(reserved & self.sglang.keys()):
            yield (
                f"{SGLANG_PREFIX}{key.replace('_', '-')} is set by slime itself (--hf-checkpoint, "
                "--rollout-num-gpus-per-engine, a free port); drop it."
            )


def collect_sglang(argv: list[str]) -> tuple[dict[str, SglangValue], list[str]]:
    """Split `argv` into the `--sglang-*` flags and the rest.

    Raises:
        ValueError: a pass-through flag has no name, or is given twice.
    """
    collected: dict[str, SglangValue] = {}
    rest: list[str] = []
    position = 0
    while position < len(argv):
        word = argv[position]
        position += 1
        if not word.startswith(SGLANG_PREFIX):
            rest.append(word)
            continue
        head, equals, inline = word.partition("=")
        values = [inline] if equals else []
        while not equals and position < len(argv) and not argv[position].startswith("--"):
            values.append(argv[position])
            position += 1
        name = head.removeprefix(SGLANG_PREFIX).replace("-", "_")
        if not name:
            raise ValueError(
                f"{word!r} has no name after {SGLANG_PREFIX}; write for example --sglang-log-level info."
            )
        if name in collected:
            raise ValueError(f"{head} is given twice; give it once.")
        collected[name] = True if not values else values[0] if len(values) == 1 else tuple(values)
    return collected, rest
