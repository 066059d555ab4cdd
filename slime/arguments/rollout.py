"""How the student answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from slime.arguments.flags import flag


@dataclass(frozen=True, kw_only=True)
class RolloutArgs:
    """Rollout"""

    num_rollout: int = flag(help="Turns of the loop. 0 only evaluates.", at_least=0)
    rollout_batch_size: int = flag(32, help="Prompts in one rollout.", at_least=1)
    n_samples_per_prompt: int = flag(4, help="Responses to each prompt.", at_least=1)
    sample_from: Literal["student", "teacher"] = flag(
        "student", help="Who writes the responses that are trained on; teacher: the server at --rm-url."
    )
    async_rollout: bool = flag(
        False,
        help="Generate the next rollout while this one trains. Its weights are one rollout older, which is "
        "corrected for (--use-tis).",
    )
    rollout_max_response_len: int = flag(1024, help="Longest response in tokens.", at_least=1)
    rollout_temperature: float = flag(
        1.0,
        help="Sampling temperature of whoever writes the responses. The student's, other than 1, is "
        "corrected for (--use-tis): the teacher's scores are at temperature 1.",
        above=0,
    )
    rollout_top_p: float = flag(1.0, help="Nucleus of the student's sampling.", above=0, at_most=1)
    rollout_top_k: int = flag(-1, help="Sample among so many likeliest tokens; -1: all.", at_least=-1)
    rollout_stop: tuple[str, ...] = flag((), help="Strings that end a response.")
    rollout_stop_token_ids: tuple[int, ...] = flag(
        (), help="Token ids that end a response, beside end-of-sequence."
    )
    rollout_concurrency: int = flag(256, help="Requests in flight to one student engine.", at_least=1)
    request_timeout: float = flag(600.0, help="Seconds that one generation request may take.", above=0)
    rollout_deadline: float | None = flag(
        None,
        help="Seconds after which a rollout's unfinished responses are aborted at the engine, counted and "
        "left out of the loss. Default: none. Evaluations have none.",
        above=0,
    )
    deterministic_rollout: bool = flag(
        False,
        help="Repeat bit for bit on one machine (transformers engine; slower: waves instead of a stream).",
    )
    rollout_seed: int = flag(
        help="Seed of the student's sampling.",
        derive=lambda args: args.seed,
        derived_from="--seed",
        at_least=0,
    )
    custom_generate_function_path: str | None = flag(
        None,
        help="Dotted path of `async fn(args, sample, sampling_params) -> Sample`, instead of our generation.",
    )

    @property
    def samples_per_rollout(self) -> int:
        """Number of samples that one rollout yields."""
        return self.rollout_batch_size * self.n_samples_per_prompt

    def validate(self) -> Iterator[str]:
        """Yield what is wrong inside this group."""
        if self.rollout_top_k == 0:
            yield (
                "--rollout-top-k is 0: nothing could be sampled. Use -1 for all tokens, or a positive number."
            )
