from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from slime.rollout import rm_hub
from slime.rollout.rm_hub import async_rm, math_rm, rule_named
from slime.rollout.rm_hub import grader as grader_module
from slime.rollout.rm_hub.grader import Grader, shared_grader
from slime.rollout.rm_hub.math_rm import compute_math_reward
from slime.utils.types import Sample

HARD = "9^{9^{9^{9}}}"
"""Takes for ever to evaluate."""
PATIENT = 60.0
"""Wall limit where a right answer is asked for: a busy machine must not fail the test."""


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_grader(), "_wall_seconds", PATIENT)


def boxed(answer: str, label: str | None = "2\\sqrt{3}") -> Sample:
    return Sample(response=f"<think>hm</think>It is \\boxed{{{answer}}}.", label=label)


@pytest.mark.parametrize(
    ("answer", "label", "grade"),
    [
        ("\\sqrt{12}", "2\\sqrt{3}", 1.0),
        ("2\\sqrt{5}", "2\\sqrt{3}", 0.0),
        ("x=5", "5", 1.0),
        ("5\\text{ cm}", "5", 1.0),
        ("\\frac{9\\sqrt{2}}{2}", "\\frac{9}{\\sqrt{2}}", 1.0),
        ("15.5", "\\boxed{15.5}", 1.0),
        ("import os; os.abort()", "2", 0.0),
        ("__import__('os')._exit(1)", "2", 0.0),
        ("((((", "2", 0.0),
    ],
)
def test_answers_are_compared_as_mathematics(answer: str, label: str, grade: float) -> None:
    assert compute_math_reward(boxed(answer, label)) == grade
    assert compute_math_reward(f"\\boxed{{{answer}}}", label) == grade


def test_without_a_box_there_is_no_answer() -> None:
    assert compute_math_reward("It is 5.", "5") == 0.0


def test_a_label_is_needed() -> None:
    with pytest.raises(ValueError, match="--label-key"):
        compute_math_reward("\\boxed{5}")


async def test_the_rule_has_the_plugin_form() -> None:
    assert await math_rm(Namespace(), boxed("\\sqrt{12}"), evaluation=True) == 1.0
    assert await async_rm(Namespace(rm_type="math"), boxed("18", "18")) == 1.0
    assert rule_named("slime.rollout.rm_hub.math_rm") is math_rm
    assert rm_hub.math_rm is math_rm
    with pytest.raises(ValueError, match="'maths' is not known; use one of math"):
        rule_named("maths")


@pytest.fixture
def grader() -> Iterator[Grader]:
    grader = Grader(size=2, wall_seconds=PATIENT)
    yield grader
    grader.close()


def test_a_comparison_over_the_limit_is_wrong_and_counted(
    grader: Grader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grader, "_wall_seconds", 0.5)
    futures = [grader.submit(HARD, "5") for _ in range(2)]
    assert [future.result(60) for future in futures] == [False, False]
    assert grader.timeouts == 2
    monkeypatch.setattr(grader, "_wall_seconds", PATIENT)
    assert grader.submit("\\sqrt{12}", "2\\sqrt{3}").result(60) is True


def test_a_worker_that_dies_is_replaced(grader: Grader) -> None:
    assert grader.submit("\\sqrt{12}", "2\\sqrt{3}").result(60) is True
    for worker in grader._workers:
        os.kill(worker._process.pid, signal.SIGKILL)
    verdicts = [grader.submit("\\sqrt{12}", "2\\sqrt{3}").result(60) for _ in range(4)]
    assert verdicts[-1] is True
    assert grader.timeouts == verdicts.count(False) <= 2


def test_a_worker_near_its_memory_limit_is_replaced_and_counted(
    grader: Grader, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its library takes a failed allocation for a wrong answer; here a right one is not trusted either."""
    text = grader_module._WORKER_FILE.read_text()
    small = text.replace("ADDRESS_SPACE_BYTES = 2**30", "ADDRESS_SPACE_BYTES = 110 * 2**20")
    assert small != text
    (tmp_path / "worker.py").write_text(small)
    with monkeypatch.context() as patched:
        patched.setattr(grader_module, "_WORKER_FILE", tmp_path / "worker.py")
        assert grader.submit("\\sqrt{12}", "2\\sqrt{3}").result(60) is False
    assert grader.timeouts == 1
    assert not grader._workers
    assert grader.submit("\\sqrt{12}", "2\\sqrt{3}").result(60) is True


@pytest.mark.parametrize("said", ["import this", "1", "[true]", "", "truetrue"])
def test_what_is_no_verdict_is_none(
    grader: Grader, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, said: str
) -> None:
    (tmp_path / "worker.py").write_text(
        f"print('true', flush=True)\nfor line in open(0): print({said!r}, flush=True)"
    )
    monkeypatch.setattr(grader_module, "_WORKER_FILE", tmp_path / "worker.py")
    assert grader.submit("\\sqrt{12}", "2\\sqrt{3}").result(60) is False
    assert grader.timeouts == 1


def test_a_worker_has_no_secrets_and_does_nothing_but_compare(
    grader: Grader, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "planted")
    monkeypatch.setenv("HF_TOKEN", "planted")
    assert grader.submit("\\sqrt{12}", "2\\sqrt{3}").result(60) is True
    (worker,) = grader._workers
    environment = psutil.Process(worker._process.pid).environ()
    assert environment["PATH"] == os.environ["PATH"]
    assert "planted" not in environment.values()
    assert not {"WANDB_API_KEY", "HF_TOKEN"} & environment.keys()
    code = (
        "import os, sys, socket, subprocess; sys.addaudithook(__import__('grader_worker')._refuse)\n"
        "attempts = [lambda: os.system('true'), lambda: subprocess.run(['true']), os.fork,\n"
        "            lambda: os.remove('x'), lambda: socket.create_connection(('127.0.0.1', 9)),\n"
        "            lambda: open('x')]\n"
        "for attempt in attempts:\n"
        "    try: attempt()\n"
        "    except OSError as error: print(type(error).__name__)\n"
    )
    folder = grader_module._WORKER_FILE.parent
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(folder)}, cwd=tmp_path,
    )  # fmt: skip
    assert done.stdout.split() == [*["PermissionError"] * 5, "FileNotFoundError"]


def test_a_closed_grader_leaves_no_process() -> None:
    grader = Grader(size=1)
    assert grader.submit("\\sqrt{12}", "2\\sqrt{3}").result(60) is True
    (process,) = [worker._process for worker in grader._workers]
    grader.close()
    assert process.poll() is not None


async def test_the_event_loop_goes_on_while_a_worker_thinks(
    grader: Grader, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert grader.submit("\\sqrt{12}", "2\\sqrt{3}").result(60) is True
    monkeypatch.setattr(sys.modules[compute_math_reward.__module__], "shared_grader", lambda: grader)
    grading = asyncio.create_task(math_rm(Namespace(), boxed(HARD, "5")))
    for _ in range(10):
        await asyncio.sleep(0.01)
    assert not grading.done()
    for worker in grader._workers:
        os.kill(worker._process.pid, signal.SIGKILL)
    assert await grading == 0.0


def test_the_hub_is_light() -> None:
    code = "import sys, slime.rollout.rm_hub; print({'torch', 'sympy', 'aiohttp'} & sys.modules.keys())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "set()"
