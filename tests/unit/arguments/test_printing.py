"""The printed configuration: every argument, grouped, plain, and no secret."""

from __future__ import annotations

import json
from collections.abc import Callable

from slime.arguments import GROUPS, Args, format_args
from slime.arguments.flags import flags_of

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
