"""`Sample`: the one record that grows on its way from prompt to gradient.

Shape letters: R response tokens, K teacher top-k.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

import torch


class RewardArgs(Protocol):
    """What `Sample.get_reward_value` reads of the arguments."""

    @property
    def reward_key(self) -> str | None: ...


class SampleStatus(StrEnum):
    """Where a sample stands. Only COMPLETED and TRUNCATED samples carry a response that is trained on."""

    PENDING = "pending"
    COMPLETED = "completed"
    TRUNCATED = "truncated"
    """The response ran into the token limit; it has no end-of-sequence token."""
    ABORTED = "aborted"
    """Generation was cut off (pause, shutdown, straggler); the response is partial."""
    FAILED = "failed"
    """Generation or scoring failed for good; `metadata["error"]` says why. Its loss mask is all zero."""


TRAINED = (SampleStatus.COMPLETED, SampleStatus.TRUNCATED)
"""The states of a sample whose response is judged and trained on."""


@dataclass(kw_only=True)
class Sample:
    """One response to one prompt, with all that later stages learn about it."""

    Status = SampleStatus

    group_index: int | None = None
    """Number of the prompt in the run; the samples of one prompt share it."""
    index: int | None = None
    """Number of the sample in the run, unique."""
    prompt: str | list[dict[str, Any]] = ""
    """The prompt as text after the chat template, or as messages before it."""
    tokens: list[int] = field(default_factory=list)
    """Wire form: prompt ids with one image pad per image, then the sampled response ids, verbatim."""
    multimodal_inputs: dict[str, Any] | None = None
    """`{"images": [PIL.Image, …]}`, resized, shared by a group's samples; stays in the rollout process."""
    multimodal_train_inputs: dict[str, Any] | None = None
    """`{"image_hashes": [str, …], "image_grid_thw": [(t, h, w), …]}`: what the trainer needs, bytes apart."""
    response: str = ""
    response_length: int = 0
    """R, the number of sampled ids at the end of `tokens`, end-of-sequence included."""
    label: str | None = None
    """The reference answer."""
    reward: float | dict[str, Any] | None = None
    """What the reward plugin returned: a number, or a dict of which `--reward-key` picks one entry."""
    loss_mask: list[int] | None = None
    """[R], 1 where the token is trained on. None stands for all ones."""
    rollout_log_probs: list[float] | None = None
    """[R], under the student in the engine that sampled the tokens, at the rollout temperature."""
    teacher_log_probs: torch.Tensor | None = None
    """float32 CPU tensor [R], under the teacher; written by `post_process_rewards` alone."""
    teacher_top_ids: torch.Tensor | None = None
    """int32 [R, K]."""
    teacher_top_log_probs: torch.Tensor | None = None
    """float32 [R, K]."""
    teacher_tail_mass: torch.Tensor | None = None
    """float32 [R], probability outside the top-k."""
    status: SampleStatus = SampleStatus.PENDING
    metadata: dict[str, Any] = field(default_factory=dict)
    weight_versions: list[str] = field(default_factory=list)
    """Versions of the student's weights that sampled the response, in order; several: a mixed sample."""

    def get_reward_value(self, args: RewardArgs) -> Any:
        """Return the reward, or its entry `args.reward_key` where that flag is set.

        Raises:
            ValueError: a key is asked for and the reward is no dict that has it.
        """
        if not args.reward_key:
            return self.reward
        if not isinstance(self.reward, dict) or args.reward_key not in self.reward:
            raise ValueError(
                f"--reward-key {args.reward_key} is set and sample {self.index} has the reward "
                f"{self.reward!r:.200}; the reward function must return a dict with that key, or the flag go."
            )
        return self.reward[args.reward_key]

    @property
    def response_tokens(self) -> list[int]:
        """The sampled ids, [R]."""
        return self.tokens[len(self.tokens) - self.response_length :]

    @property
    def prompt_tokens(self) -> list[int]:
        """The prompt's ids in wire form."""
        return self.tokens[: len(self.tokens) - self.response_length]
