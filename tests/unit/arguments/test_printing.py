"""The printed configuration: every argument, grouped, plain, and no secret."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from slime.arguments import GROUPS, Args, format_args, parse_args
from slime.arguments.flags import flags_of
from slime.arguments.printing import without_credentials

Parse = Callable[..., Args]


def test_as_dict_is_plain_data_and_complete(parsed: Parse) -> None:
    args = parsed("--engine", "sglang", "--sglang-log-level", "info")
    values = json.loads(json.dumps(args.as_dict()))
    assert {flag.attribute for group in GROUPS for flag in flags_of(group)} <= values.keys()
    assert values["rm_url"] == "http://127.0.0.1:13141/generate"
    assert values["sglang"] == {"log_level": "info"}


def test_format_has_a_title_for_each_group_and_a_line_for_each_flag(parsed: Parse) -> None:
    lines = format_args(
        parsed("--opd-kl-coef", "0.5", "--engine", "sglang", "--sglang-log-level", "info")
    ).splitlines()
    assert "Distillation:" in lines
    assert "  opd_kl_coef = 0.5" in lines
    assert "  log_level = 'info'" in lines
    assert len([line for line in lines if not line.startswith(" ")]) == len(GROUPS) + 1


def test_secrets_in_urls_are_masked_in_every_output(parsed: Parse) -> None:
    args = parsed("--ray-address", "https://user:hunter2@head:6379/x?token=hunter2")
    assert "hunter2" not in format_args(args)
    assert "hunter2" not in json.dumps(args.as_dict())
    assert "head:6379" in format_args(args)


def test_secrets_of_named_teachers_and_in_lists_are_masked() -> None:
    args = parse_args(
        [
            *("--hf-checkpoint", "m", "--prompt-data", "d", "--num-rollout", "1", "--use-opd"),
            *("--opd-type", "sglang", "--opd-teachers", "a=http://user:hunter2@host:1/generate"),
            *("--engine", "sglang", "--sglang-foo-token", "hunter2", "hunter2"),
        ]
    )
    assert "hunter2" not in json.dumps(args.as_dict())
    assert args.as_dict()["opd_teachers"] == ["a=http://***@host:1/generate"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("the teacher at http://u:p@h:1/generate died", "the teacher at http://***@h:1/generate died"),
        ("http://u:p@ss@h/x?key=1 and s3://a:b@c/d", "http://***@h/x?*** and s3://***@c/d"),
        ("http://u:p?s@h/x", "http://***@h/x"),
        ("a@b.org, 3:4, C://x", "a@b.org, 3:4, C://x"),
    ],
)
def test_credentials_are_masked_wherever_a_url_stands(text: str, shown: str) -> None:
    assert without_credentials(text) == shown
