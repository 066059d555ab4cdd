"""The other examples' launchers: GRPO without a teacher, and distillation of text.

What they share with the main one is tested there.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from slime.arguments import Args, parse_args
from slime.engines.process import free_port
from tests.fakes.launcher import REPOSITORY, SCRIPT, Launched, Machine
from tests.fakes.processes import PATIENCE_SECONDS, ended

TRAIN = "slime.train"
SGLANG = "slime.engines.sglang_engine"
TRANSFORMERS = "slime.engines.transformers_engine"
PREFLIGHT = "slime.preflight"
DOCTOR = "slime.engines.doctor"
GRPO = REPOSITORY / "examples" / "geo3k_vlm" / "run_geo3k_vlm.sh"
TEXT = REPOSITORY / "examples" / "on_policy_distillation" / "run_opd_text.sh"


def training(launched: Launched) -> Args:
    """Parse the training command as the driver will."""
    assert launched.returncode == 0, launched.stderr
    return parse_args(launched.arguments(TRAIN))


def modules(launched: Launched) -> list[str]:
    """Return what is run by `python -m`, in order."""
    return [words[words.index("-m") + 1] for words in launched.commands if "-m" in words]


def downloads(launched: Launched) -> list[str]:
    return [words[2] for words in launched.commands if words[0].endswith("/hf")]


# ---- GRPO ----


@pytest.mark.parametrize(
    ("gpus", "visible", "actors", "rollout", "engine"),
    [(8, "0,1,2,3,4,5,6,7", 8, 8, "sglang"), (2, "0,1", 2, 2, "sglang"), (1, "0", 1, 1, "sglang")],
)
def test_without_a_teacher_all_gpus_are_the_students(
    tmp_path: Path, gpus: int, visible: str, actors: int, rollout: int, engine: str
) -> None:
    launched = Machine(tmp_path, gpus, GRPO).dry_run()
    args = training(launched)
    assert launched.variables(TRAIN)["CUDA_VISIBLE_DEVICES"] == visible
    assert (args.actor_num_gpus_per_node, args.rollout_num_gpus, args.engine) == (actors, rollout, engine)
    assert modules(launched) == [PREFLIGHT, PREFLIGHT, TRAIN]  # before and after the downloads
    assert downloads(launched) == ["Qwen/Qwen3-VL-2B-Instruct", "chenhegu/geo3k_imgurl"]
    assert "learns from the task's reward." in launched.stdout


def test_grpo_learns_from_the_grade_alone(tmp_path: Path) -> None:
    args = training(Machine(tmp_path, 8, GRPO).dry_run())
    assert (args.use_opd, args.rm_url, args.eval_teacher, args.custom_rm_path) == (False, None, False, None)
    assert (args.rm_type, args.advantage_estimator, args.n_samples_per_prompt) == ("math", "grpo", 8)
    assert (args.eps_clip, args.eps_clip_high) == (0.2, 0.28)
    assert (args.kl_loss_coef, args.entropy_coef, args.lr) == (0.0, 0.0, 1e-6)
    assert args.multimodal_keys == {"image": "images"}


def test_grpo_without_a_gpu_is_the_tiny_preset(tmp_path: Path) -> None:
    machine = Machine(tmp_path, script=GRPO)
    launched = machine.dry_run()
    args = training(launched)
    assert "Without a GPU the tiny preset runs: a tiny Qwen3-VL model" in launched.stdout
    assert "teacher" not in launched.stdout.lower()
    assert launched.command("slime.tiny")[-2:] == ["--data", f"{tmp_path}/home/datasets/slime_tiny_geometry"]
    assert args.hf_checkpoint == str(REPOSITORY / "slime" / "tiny" / "checkpoints" / "student")
    assert (args.engine, args.precision) == ("transformers", "float32")


def test_grpo_knows_no_variable_of_a_teacher(tmp_path: Path) -> None:
    launched = Machine(tmp_path, script=GRPO).dry_run(TEACHER_MODEL="teacher")
    assert launched.returncode == 1
    assert "SLIME_SCRIPT_TEACHER_MODEL, which this script does not know" in launched.stderr


@pytest.mark.parametrize(("driver", "status"), [("succeed", 0), ("fail", 1)])
def test_grpo_starts_the_driver_and_nothing_else(tmp_path: Path, driver: str, status: int) -> None:
    machine = Machine(tmp_path, script=GRPO)
    machine.environment["DRIVER_PLAYS"] = driver
    knobs = {"STUDENT_MODEL": str(machine.student), "DATASET_NAME": str(machine.data)}
    launcher = machine.start(SKIP_SETUP="1", OUTPUT_DIR=str(tmp_path / "out"), **knobs)
    stdout, stderr = launcher.communicate(timeout=PATIENCE_SECONDS)
    assert launcher.returncode == status, stderr
    assert stdout.splitlines()[-1] == f"Output folder: {tmp_path}/out"
    assert sorted(path.name for path in machine.stage.iterdir()) == [PREFLIGHT, TRAIN]
    assert all(ended(pid) for pid in machine.pids(TRAIN))


def test_a_refused_training_command_starts_nothing(tmp_path: Path) -> None:
    launched = Machine(tmp_path, script=GRPO).dry_run(N_SAMPLES_PER_PROMPT="1")
    assert launched.returncode == 1
    assert "--n-samples-per-prompt is 1" in " ".join(launched.stderr.split())
    assert "the training command was refused; nothing has been started." in launched.stderr


# ---- text ----


@pytest.mark.parametrize(
    ("gpus", "student", "teacher", "server", "teacher_gpus", "student_gpus"),
    [
        (8, "Qwen3-8B", "Qwen3-32B", SGLANG, "0,1,2,3", "4,5,6,7"),
        (4, "Qwen3-4B", "Qwen3-32B", SGLANG, "0,1", "2,3"),
        (2, "Qwen3-1.7B", "Qwen3-32B", SGLANG, "0", "1"),
        (1, "Qwen3-1.7B", "Qwen3-4B", TRANSFORMERS, "0", "0"),
    ],
)
def test_text_models_fit_the_gpus(
    tmp_path: Path, gpus: int, student: str, teacher: str, server: str, teacher_gpus: str, student_gpus: str
) -> None:
    launched = Machine(tmp_path, gpus, TEXT).dry_run()
    args = training(launched)
    assert modules(launched) == [PREFLIGHT, PREFLIGHT, server, DOCTOR, TRAIN]
    assert launched.variables(server)["CUDA_VISIBLE_DEVICES"] == teacher_gpus
    assert launched.variables(TRAIN)["CUDA_VISIBLE_DEVICES"] == student_gpus
    assert downloads(launched) == [
        *(f"Qwen/{student}", f"Qwen/{teacher}", "zhuzilin/dapo-math-17k", "zhuzilin/aime-2024")
    ]
    data = tmp_path / "home" / "datasets"
    assert args.prompt_data == f"{data}/dapo-math-17k/dapo-math-17k.jsonl"
    assert args.eval_sets == (("test", f"{data}/aime-2024/aime-2024.jsonl"),)
    assert (args.n_samples_per_eval_prompt, args.eval_temperature) == (16, 1.0)


def test_text_without_a_gpu_is_the_tiny_preset(tmp_path: Path) -> None:
    launched = Machine(tmp_path, script=TEXT).dry_run()
    args = training(launched)
    assert modules(launched) == ["slime.tiny", PREFLIGHT, TRANSFORMERS, DOCTOR, TRAIN]
    data = f"{tmp_path}/home/datasets/slime_tiny_words"
    assert launched.arguments("slime.tiny") == ["--data", data, "--set", "words"]
    assert (args.prompt_data, args.eval_sets) == (
        f"{data}/train.parquet",
        (("test", f"{data}/test.parquet"),),
    )
    assert (args.input_key, args.label_key, args.multimodal_keys) == ("prompt", "label", {})
    assert args.custom_rm_path == "slime.rollout.on_policy_distillation.reward_func"
    assert (args.use_opd, args.opd_type, args.eval_teacher) == (True, "sglang", True)
    assert (args.n_samples_per_eval_prompt, args.eval_temperature) == (1, 0.0)
    assert args.hf_checkpoint.endswith("tiny/checkpoints/text_student")
    assert launched.arguments(TRANSFORMERS)[1].endswith("tiny/checkpoints/text_teacher")


@pytest.mark.parametrize(
    ("train", "evaluation", "expected"),
    [
        ("data", "", ("data/train.jsonl", "data/test.jsonl")),
        ("data", "data", ("data/train.jsonl", "data/test.jsonl")),
        ("own-math", "data", ("own-math/own-math.jsonl", "data/test.jsonl")),
        ("data", "own-math", ("data/train.jsonl", "own-math/own-math.jsonl")),
    ],
)
def test_training_and_evaluation_may_come_of_two_sets(
    tmp_path: Path, train: str, evaluation: str, expected: tuple[str, str]
) -> None:
    machine = Machine(tmp_path, 8, TEXT)
    whole = tmp_path / "own-math"
    whole.mkdir()
    (whole / "own-math.jsonl").touch()
    launched = machine.dry_run(**machine.local() | {"DATASET_NAME": train, "EVAL_DATASET_NAME": evaluation})
    args = training(launched)
    assert (args.prompt_data, args.eval_sets[0][1]) == tuple(str(tmp_path / name) for name in expected)
    assert downloads(launched) == []


def test_a_set_that_lacks_the_split_is_refused_by_the_name_of_its_variable(tmp_path: Path) -> None:
    machine = Machine(tmp_path, script=TEXT)
    (tmp_path / "empty").mkdir()
    launched = machine.dry_run(**machine.local() | {"EVAL_DATASET_NAME": "empty"})
    assert launched.returncode == 1
    assert (
        "SLIME_SCRIPT_EVAL_DATASET_NAME is empty; that folder must hold test.parquet (or" in launched.stderr
    )


def test_the_text_launcher_starts_teacher_pre_flight_and_driver(tmp_path: Path) -> None:
    machine = Machine(tmp_path, script=TEXT)
    machine.environment["TEACHER_PLAYS"] = "serve"
    knobs = {"SKIP_SETUP": "1", "OUTPUT_DIR": str(tmp_path / "out"), "TEACHER_PORT": str(free_port())}
    launcher = machine.start(**machine.local() | knobs)
    _, stderr = launcher.communicate(timeout=PATIENCE_SECONDS)
    assert launcher.returncode == 0, stderr
    assert sorted(path.name for path in machine.stage.iterdir()) == [DOCTOR, TRANSFORMERS, PREFLIGHT, TRAIN]
    assert all(ended(pid) for module in (TRANSFORMERS, TRAIN) for pid in machine.pids(module))


# ---- all of them ----


@pytest.mark.parametrize("script", [SCRIPT, GRPO, TEXT], ids=lambda path: path.stem)
def test_the_readme_has_a_line_for_each_variable_and_for_no_other(script: Path) -> None:
    knobs = re.search(r"^readonly KNOBS=\(([^)]*)\)", script.read_text(), re.MULTILINE)
    assert knobs is not None
    table = (
        script.with_name("README.md").read_text().partition("| `SLIME_SCRIPT_…` |")[2].partition("\n\n")[0]
    )
    cells = [line.split(" | ")[0] for line in table.splitlines()[2:]]
    assert sorted(re.findall(r"`([A-Z_]+)`", " ".join(cells))) == sorted(knobs[1].split())


@pytest.mark.parametrize("script", [SCRIPT, GRPO, TEXT], ids=lambda path: path.stem)
def test_the_readme_begins_with_the_command(script: Path) -> None:
    head = script.with_name("README.md").read_text().splitlines()[:10]
    assert f"bash {script.relative_to(REPOSITORY)}" in head
