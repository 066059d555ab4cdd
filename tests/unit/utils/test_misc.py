"""Loading of user code by dotted path."""

from __future__ import annotations

from pathlib import Path

import pytest

from slime.utils.misc import load_function


def test_function_is_found() -> None:
    assert load_function("slime.utils.misc.load_function") is load_function


def test_user_module_is_found_from_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_reward_plugin.py").write_text("def reward(args, sample):\n    return 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert load_function("my_reward_plugin.reward")(None, None) == 1.0


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("reward", "no dotted path"),
        ("plugins/reward.py", "no dotted path"),
        ("slime.utils.misc.load_functon", "has no 'load_functon'. Did you mean load_function"),
        ("slime.utils.mics.load_function", "no module slime.utils.mics. Did you mean misc"),
        ("slyme.utils.misc.load_function", "no module slyme. Did you mean slime"),
        ("slime.utils.misc.load_function.inner", "no module slime.utils.misc.load_function"),
        ("slime.utils.misc.__doc__", "cannot be called"),
    ],
)
def test_what_is_wrong_and_what_is_near_is_said(path: str, words: str) -> None:
    with pytest.raises(ValueError, match="--custom-rm-path") as refused:
        load_function(path, "--custom-rm-path")
    assert words in str(refused.value)


def test_fault_inside_the_module_comes_up_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plugin_of_a_missing_library.py").write_text("import a_library_that_is_not_there\n")
    (tmp_path / "plugin_that_fails.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_library_that_is_not_there"):
        load_function("plugin_of_a_missing_library.reward")
    with pytest.raises(ZeroDivisionError):
        load_function("plugin_that_fails.reward")
