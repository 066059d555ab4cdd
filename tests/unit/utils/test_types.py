"""The record that everything passes on."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from slime.utils.types import Sample


@dataclass
class Keyed:
    """The one argument that is read."""

    reward_key: str | None


def test_public_fields_of_upstream_are_there_with_their_defaults() -> None:
    sample = Sample()
    assert (sample.prompt, sample.tokens, sample.response, sample.response_length) == ("", [], "", 0)
    for name in (
        "label",
        "reward",
        "loss_mask",
        "rollout_log_probs",
        "teacher_log_probs",
        "index",
        "group_index",
    ):
        assert getattr(sample, name) is None
    assert (sample.multimodal_inputs, sample.multimodal_train_inputs) == (None, None)
    assert (sample.metadata, sample.weight_versions) == ({}, [])
    assert sample.status is Sample.Status.PENDING


def test_samples_share_no_mutable_default() -> None:
    Sample().tokens.append(1)
    Sample().metadata["a"] = 1
    assert (Sample().tokens, Sample().metadata) == ([], {})


def test_prompt_and_response_are_parts_of_the_tokens() -> None:
    sample = Sample(tokens=[1, 2, 3, 4], response_length=3)
    assert (sample.prompt_tokens, sample.response_tokens) == ([1], [2, 3, 4])
    empty = Sample(tokens=[1, 2])
    assert (empty.prompt_tokens, empty.response_tokens) == ([1, 2], [])


def test_reward_value_is_the_reward_or_the_entry_that_the_key_names() -> None:
    sample = Sample(reward={"accuracy": 1.0, "length": 7}, index=3)
    assert sample.get_reward_value(Keyed(reward_key=None)) == {"accuracy": 1.0, "length": 7}
    assert sample.get_reward_value(Keyed(reward_key="accuracy")) == 1.0


@pytest.mark.parametrize("reward", [1.0, None, {"length": 7}])
def test_reward_key_that_finds_nothing_is_an_error(reward: object) -> None:
    sample = Sample(reward=reward, index=3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"--reward-key accuracy .* sample 3"):
        sample.get_reward_value(Keyed(reward_key="accuracy"))
