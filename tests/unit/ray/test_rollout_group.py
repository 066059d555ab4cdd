"""What is asked again when no engine has the current weights any more; actor and cluster are stand-ins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest

from slime.ray.cluster import ActorError, EnginesLost
from slime.ray.rollout_group import RolloutGroup

Call = Callable[[], Any]


class _Actor:
    """Answers every method from `answers`, in their order; an exception is raised when it is waited for."""

    def __init__(self, calls: list[str], answers: list[Any]) -> None:
        self._calls = calls
        self._answers = answers

    def __getattr__(self, method: str) -> Any:
        return _Method(method, self._calls, self._answers)


class _Method:
    def __init__(self, name: str, calls: list[str], answers: list[Any]) -> None:
        self._name = name
        self._calls = calls
        self._answers = answers

    def remote(self, *arguments: Any) -> Call:
        if self._name == "setup":
            return lambda: None
        self._calls.append(" ".join([self._name, *map(str, arguments)]))
        answer = self._answers.pop(0)

        def result() -> Any:
            if isinstance(answer, Exception):
                raise answer
            return answer

        return result


class _Cluster:
    def __init__(self, actor: _Actor) -> None:
        self._actor = actor

    def start_actor(self, *arguments: Any) -> _Actor:
        return self._actor

    def watch(self, name: str) -> None:
        """Nobody dies."""

    def expect(self, ref: Call) -> None:
        """What fails is seen when it is waited for."""

    def wait(self, refs: list[Call]) -> list[Any]:
        return [ref() for ref in refs]


class _Engines:
    urls = ("http://first:1", "http://second:2")

    def __init__(self, calls: list[str]) -> None:
        self._calls = calls

    def set_generating(self, generating: bool) -> None:
        self._calls.append("on" if generating else "off")


def make(*answers: Any) -> tuple[RolloutGroup, list[str]]:
    calls: list[str] = []
    cluster, engines = _Cluster(_Actor(calls, list(answers))), _Engines(calls)
    return RolloutGroup(cast(Any, cluster), cast(Any, None), cast(Any, engines)), calls


LOST = EnginesLost("both are gone")


def test_a_rollout_whose_engines_were_lost_is_made_again_on_engines_with_new_weights() -> None:
    group, calls = make(LOST, "rollout")
    group.when_engines_are_lost(lambda: calls.append("revive"))
    assert cast(Any, group.generate(3)) == "rollout"
    assert calls == ["on", "generate 3", "off", "revive", "on", "generate 3", "off"]


def test_so_is_an_evaluation() -> None:
    group, calls = make(LOST, {"accuracy": 1.0})
    group.when_engines_are_lost(lambda: calls.append("revive"))
    assert group.evaluate(0, "student") == {"accuracy": 1.0}
    assert calls == ["on", "evaluate 0 student", "off", "revive", "on", "evaluate 0 student", "off"]


def test_lost_twice_in_a_row_the_run_ends() -> None:
    group, calls = make(LOST, LOST)
    group.when_engines_are_lost(lambda: calls.append("revive"))
    with pytest.raises(EnginesLost, match="both are gone"):
        group.generate(3)
    assert calls.count("revive") == 1
    assert calls[-1] == "off"


def test_what_is_asked_before_there_are_weights_is_not_asked_again() -> None:
    group, calls = make(LOST)
    with pytest.raises(EnginesLost):
        group.evaluate(0, "teacher")
    assert calls == ["on", "evaluate 0 teacher", "off"]


def test_another_error_is_no_loss() -> None:
    group, calls = make(ActorError("the data are not there"))
    group.when_engines_are_lost(lambda: calls.append("revive"))
    with pytest.raises(ActorError, match="the data are not there"):
        group.generate(0)
    assert "revive" not in calls


def test_an_ordered_rollout_that_is_lost_is_its_owners_to_order_again() -> None:
    group, calls = make(LOST)
    group.when_engines_are_lost(lambda: calls.append("revive"))
    ordered = group.generate_later(4)
    with pytest.raises(EnginesLost):
        group.result(ordered)
    assert calls == ["on", "generate 4", "off"]
