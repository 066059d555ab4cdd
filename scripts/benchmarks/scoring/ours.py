"""Our way to ask a teacher: the plugin's own functions on samples as a rollout holds them.

What the data source does for a prompt once (resize, encode, hash), in threads and before anybody samples, is
done and counted here too, although student, trainer and evaluation share its result.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch

from scripts.benchmarks.scoring.workload import Group
from slime.data.images import Picture, prepare_picture
from slime.rollout.on_policy_distillation import (
    close_teacher_clients,
    post_process_rewards,
    score_response,
)
from slime.utils.pictures import open_encoded
from slime.utils.types import Sample

PREPARE_THREADS = 4
"""As the data source has."""


@dataclass(frozen=True, slots=True)
class PixelSettings:
    """What `prepare_picture` reads of an image processor: the values of Qwen3-VL's checkpoints."""

    patch_size: int = 16
    merge_size: int = 2
    resample: int = 3
    shortest_edge: int = 65_536
    longest_edge: int = 16_777_216

    @property
    def size(self) -> dict[str, int]:
        return {"shortest_edge": self.shortest_edge, "longest_edge": self.longest_edge}


@dataclass(frozen=True, slots=True)
class TeacherFlags:
    """The flags of a run that the teacher's part reads; the others have its own defaults."""

    rm_url: str
    hf_checkpoint: str
    reward_key: str | None = None


class OurClient:
    """Scores groups by `score_response` and `post_process_rewards`."""

    def __init__(self, url: str, checkpoint: Path) -> None:
        """`checkpoint` is a folder with the `config.json` that the student and the teacher share."""
        self._args = TeacherFlags(rm_url=url + "/generate", hf_checkpoint=str(checkpoint))
        self._settings = PixelSettings()
        self._turn = 0

    async def ask(self, groups: list[Group]) -> list[Sample]:
        """Ask about all samples at once; return them with their answers, in the order of the groups."""
        self._turn += 1
        pictures = await asyncio.to_thread(self._prepare, groups)
        pairs = zip(groups, pictures, strict=True)
        asked = await asyncio.gather(*(self._ask_group(group, picture) for group, picture in pairs))
        return list(chain.from_iterable(asked))

    def _prepare(self, groups: list[Group]) -> list[Picture]:
        with ThreadPoolExecutor(PREPARE_THREADS) as pool:
            return list(pool.map(lambda group: prepare_picture(group.picture, self._settings), groups))

    async def _ask_group(self, group: Group, picture: Picture) -> list[Sample]:
        image = open_encoded(picture)  # one object for the whole group, as the data source gives it
        samples = [
            Sample(
                # a group's number is unique in a run
                group_index=self._turn * 1_000_000 + group.number,
                index=self._turn * 1_000_000 + group.number * len(group.responses) + place,
                tokens=[*group.prompt, *response],
                response_length=len(response),
                multimodal_inputs={"images": [image]},
                multimodal_train_inputs={
                    "image_hashes": [picture.sha256],
                    "image_grid_thw": [picture.grid_thw],
                },
            )
            for place, response in enumerate(group.responses)
        ]
        answers = await asyncio.gather(*(score_response(self._args, sample) for sample in samples))
        for sample, answer in zip(samples, answers, strict=True):
            sample.reward = answer
        return samples

    def finish(self, asked: list[Sample]) -> list[torch.Tensor]:
        """Make the tensors, once all answers are there."""
        post_process_rewards(self._args, asked)
        tensors = [sample.teacher_log_probs for sample in asked if sample.teacher_log_probs is not None]
        assert len(tensors) == len(asked)
        return tensors

    def entries(self, asked: list[Sample]) -> list[int]:
        """Return how many entries each answer's list holds."""
        rewards = [sample.reward for sample in asked if isinstance(sample.reward, dict)]
        assert len(rewards) == len(asked)
        return [len(reward["meta_info"]["input_token_logprobs"]) for reward in rewards]

    async def close(self) -> None:
        """Close the connections."""
        await close_teacher_clients()
