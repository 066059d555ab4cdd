"""Who grades a response: the teacher's server, a rule, a plugin."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

from slime.arguments.flags import flag

RULES = ("math",)
"""The rules of `slime.rollout.rm_hub`."""


def rule_name(text: str) -> str:
    """Read the name of a rule of the package, or a dotted path."""
    if text not in RULES and ("." not in text or "/" in text or text.endswith(".py")):
        raise ValueError(f"is neither {', '.join(RULES)} nor a dotted path (package.module.function)")
    return text


@dataclass(frozen=True, kw_only=True)
class RewardArgs:
    """Reward and teacher"""

    rm_type: str | None = flag(
        None,
        help="Rule that grades responses against --label-key: math, or the dotted path of your own "
        "`async grade(args, sample, **kwargs) -> float`.",
        parse=rule_name,
    )
    rm_urls: tuple[str, ...] = flag(
        (),
        name="--rm-url",
        repeat=True,
        help="URL that scores responses (the teacher), path included: http://127.0.0.1:13141/generate.",
    )
    opd_teachers: tuple[str, ...] = flag(
        (),
        help=(
            "Several teachers, NAME=URL …; each sample is scored by the one that its metadata names "
            "(--opd-teacher-key). A name given again is another server of that teacher."
        ),
    )
    opd_teacher_key: str = flag(
        "data_source", help="Entry of a sample's metadata that names its teacher, with --opd-teachers."
    )
    reward_key: str | None = flag(None, help="Entry of the reward function's dict that is the reward.")
    eval_reward_key: str | None = flag(None, help="The same in evaluation.")
    custom_rm_path: str | None = flag(
        None,
        aliases=("--custom-reward-function",),
        help="Dotted path of `async reward_func(args, sample, **kwargs)`.",
    )
    custom_reward_post_process_path: str | None = flag(
        None,
        aliases=("--custom-post-process-rewards",),
        help="Dotted path of `post_process_rewards(args, samples, **kwargs) -> (raw_rewards, rewards)`.",
    )
    task_reward_weight: float = flag(
        0.0, help="Weight of the task's grade (--rm-type) as its own stream beside distillation.", at_least=0
    )
    teacher_concurrency: int = flag(
        256, help="Scoring requests in flight to one server of the teacher.", at_least=1
    )
    teacher_timeout: float = flag(120.0, help="Seconds that one attempt at a score may take.", above=0)
    teacher_patience: float = flag(
        60.0,
        help="Seconds in which a score that failed is tried again; covers a teacher's restart.",
        at_least=0,
    )

    @property
    def rm_url(self) -> str | None:
        """The teacher's first address, as plugins read it."""
        return next(iter(self.teacher_urls), None)

    @property
    def teacher_urls(self) -> tuple[str, ...]:
        """Every address that scores are asked from."""
        return self.rm_urls or tuple(url for urls in self.named_teachers.values() for url in urls)

    @property
    def named_teachers(self) -> dict[str, tuple[str, ...]]:
        """The addresses of each teacher of `--opd-teachers`, by name."""
        teachers: dict[str, tuple[str, ...]] = {}
        for text in self.opd_teachers:
            name, _, url = text.partition("=")
            teachers[name] = (*teachers.get(name, ()), url)
        return teachers

    def validate(self) -> Iterator[str]:
        """Yield what is wrong inside this group."""
        if self.rm_urls and self.opd_teachers:
            yield (
                "--rm-url and --opd-teachers both name teachers. Give --rm-url for one teacher (several "
                "times for several servers of it), or --opd-teachers for several."
            )
        for text in self.opd_teachers:
            name, equals, _ = text.partition("=")
            if not (name and equals):
                yield f"--opd-teachers {text!r} is not NAME=URL, as geo3k=http://127.0.0.1:13141/generate."
        flag_name = "--rm-url" if self.rm_urls else "--opd-teachers"
        for url in filter(None, self.teacher_urls):
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.path in ("", "/"):
                yield (
                    f"{flag_name} {url!r} is no URL with a path; it is posted to as it stands, so give the "
                    "whole of it, as http://127.0.0.1:13141/generate."
                )
        for name, path in (
            ("--custom-rm-path", self.custom_rm_path),
            ("--custom-reward-post-process-path", self.custom_reward_post_process_path),
        ):
            if path is not None and ("." not in path or "/" in path or path.endswith(".py")):
                yield f"{name} {path!r} is no dotted path; write package.module.function."
        if self.task_reward_weight > 0 and self.rm_type is None:
            yield (
                f"--task-reward-weight is {self.task_reward_weight:g} and nothing grades the responses. "
                "Add --rm-type math, or drop --task-reward-weight."
            )
