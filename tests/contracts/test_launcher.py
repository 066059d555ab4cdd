"""The launcher's dry run: what would run on 16 to 0 GPUs, through the real placement and argument parser."""

from __future__ import annotations

from pathlib import Path

import pytest

from slime.arguments import Args, parse_args
from slime.arguments.reward import RewardArgs
from slime.engines.doctor.__main__ import parse_args as parse_doctor_args
from tests.fakes.launcher import REPOSITORY, Launched, Machine
from tests.fakes.processes import PATIENCE_SECONDS

TRAIN = "slime.train"
SGLANG = "slime.engines.sglang_engine"
TRANSFORMERS = "slime.engines.transformers_engine"
DOCTOR = "slime.engines.doctor"


def training(launched: Launched) -> Args:
    """Parse the training command as the driver will."""
    assert launched.returncode == 0, launched.stderr
    return parse_args(launched.arguments(TRAIN))


def listed(first: int, last: int) -> str:
    return ",".join(map(str, range(first, last + 1)))


@pytest.mark.parametrize(
    ("gpus", "teacher", "tp", "student", "actors", "rollout"),
    [(16, (0, 7), 8, (8, 15), 8, 8), (8, (0, 3), 4, (4, 7), 4, 4)],
)
def test_the_gpus_are_split_between_teacher_and_student(
    tmp_path: Path,
    gpus: int,
    teacher: tuple[int, int],
    tp: int,
    student: tuple[int, int],
    actors: int,
    rollout: int,
) -> None:
    launched = Machine(tmp_path, gpus).dry_run()
    args = training(launched)
    words = launched.arguments(SGLANG)
    assert launched.variables(SGLANG)["CUDA_VISIBLE_DEVICES"] == listed(*teacher)
    assert words[words.index("--tp") + 1] == str(tp)
    assert launched.variables(TRAIN)["CUDA_VISIBLE_DEVICES"] == listed(*student)
    assert (args.actor_num_gpus_per_node, args.rollout_num_gpus) == (actors, rollout)
    assert (args.engine, args.precision, args.train_backend) == ("sglang", "bfloat16", "megatron")
    assert (args.colocate, args.weight_sync) == (True, "tensor")


def test_gpus_can_be_kept_apart(tmp_path: Path) -> None:
    args = training(Machine(tmp_path, 8).dry_run(COLOCATE="0"))
    assert (args.actor_num_gpus_per_node, args.rollout_num_gpus) == (2, 2)
    assert (args.colocate, args.weight_sync) == (False, "distributed")


@pytest.mark.parametrize(
    ("gpus", "student", "sizes", "layers"),
    [
        (16, "Qwen/Qwen3-VL-8B-Thinking", (4, 1), 36),
        (8, "Qwen/Qwen3-VL-8B-Instruct", (2, 1), 36),
        (2, "Qwen/Qwen3-VL-2B-Instruct", (1, 1), 28),
        (16, "Qwen/Qwen3-VL-30B-A3B-Thinking", (1, 8), 48),
    ],
)
def test_megatron_splits_the_student_over_the_gpus_that_train(
    tmp_path: Path, gpus: int, student: str, sizes: tuple[int, int], layers: int
) -> None:
    launched = Machine(tmp_path, gpus).dry_run(TRAIN_BACKEND="megatron", STUDENT_MODEL=student)
    args = training(launched)
    assert (args.tensor_model_parallel_size, args.expert_model_parallel_size) == sizes
    assert args.sequence_parallel == (sizes[0] > 1)
    assert args.num_layers == layers
    assert args.use_distributed_optimizer


def test_the_published_models_and_data_are_downloaded_where_they_are_missing(tmp_path: Path) -> None:
    launched = Machine(tmp_path, 8).dry_run()
    downloads = [words[2:] for words in launched.commands if words[0].endswith("/hf")]
    home = tmp_path / "home"
    assert downloads == [
        [
            "Qwen/Qwen3-VL-4B-Thinking",
            "--repo-type",
            "model",
            "--local-dir",
            f"{home}/models/Qwen3-VL-4B-Thinking",
        ],
        [
            "Qwen/Qwen3-VL-30B-A3B-Thinking",
            *("--repo-type", "model", "--local-dir", f"{home}/models/Qwen3-VL-30B-A3B-Thinking"),
        ],
        ["chenhegu/geo3k_imgurl", "--repo-type", "dataset", "--local-dir", f"{home}/datasets/geo3k_imgurl"],
    ]
    args = training(launched)
    assert args.hf_checkpoint == f"{home}/models/Qwen3-VL-4B-Thinking"
    assert args.prompt_data == f"{home}/datasets/geo3k_imgurl/train.parquet"
    assert args.eval_sets == (("test", f"{home}/datasets/geo3k_imgurl/test.parquet"),)


def test_what_is_there_is_not_downloaded_and_a_model_lacking_a_shard_is(tmp_path: Path) -> None:
    machine = Machine(tmp_path, 8)
    models, data = tmp_path / "home" / "models", tmp_path / "home" / "datasets" / "geo3k_imgurl"
    data.mkdir(parents=True)
    for split in ("train", "test"):
        (data / f"{split}.parquet").touch()
    for name, shards in (("Qwen3-VL-4B-Thinking", (1, 2)), ("Qwen3-VL-30B-A3B-Thinking", (1,))):
        folder = models / name
        folder.mkdir(parents=True)
        (folder / "config.json").touch()
        (folder / "model.safetensors.index.json").write_text(
            '{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}'
        )
        for shard in shards:
            (folder / f"{shard}.safetensors").touch()
    launched = machine.dry_run()
    assert [words[2] for words in launched.commands if words[0].endswith("/hf")] == [
        "Qwen/Qwen3-VL-30B-A3B-Thinking"
    ]


def test_two_gpus_give_the_student_one_for_training_and_generation(tmp_path: Path) -> None:
    launched = Machine(tmp_path, 2).dry_run()
    args = training(launched)
    assert launched.variables(SGLANG)["CUDA_VISIBLE_DEVICES"] == "0"
    assert launched.variables(TRAIN)["CUDA_VISIBLE_DEVICES"] == "1"
    assert (args.engine, args.actor_num_gpus_per_node, args.rollout_num_gpus) == ("sglang", 1, 1)
    assert args.colocate


def test_one_gpu_is_shared_by_small_models_and_this_is_said(tmp_path: Path) -> None:
    launched = Machine(tmp_path, 1).dry_run()
    args = training(launched)
    assert launched.variables(TRANSFORMERS)["CUDA_VISIBLE_DEVICES"] == "0"
    assert launched.variables(TRAIN)["CUDA_VISIBLE_DEVICES"] == "0"
    assert args.hf_checkpoint.endswith("Qwen3-VL-2B-Thinking")
    assert "2B" in launched.stdout.split("Configuration:")[0]


def test_without_a_gpu_both_servers_are_small_ones_and_the_preset_is_announced(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    launched = machine.dry_run(STUDENT_MODEL=str(machine.student), TEACHER_MODEL=str(machine.teacher))
    args = training(launched)
    assert "Without a GPU the tiny preset runs" in launched.stdout
    assert launched.command("slime.tiny")[-2:] == ["--data", f"{tmp_path}/home/datasets/slime_tiny_geometry"]
    assert launched.variables(TRANSFORMERS)["CUDA_VISIBLE_DEVICES"] == ""
    assert launched.variables(TRAIN)["CUDA_VISIBLE_DEVICES"] == ""
    assert (args.engine, args.precision, args.n_samples_per_prompt) == ("transformers", "float32", 4)
    assert (args.use_opd, args.opd_type, args.opd_kl_coef, args.task_reward_weight) == (
        True,
        "sglang",
        1.0,
        0.0,
    )


def test_sglang_on_a_cpu_sets_up_its_environment_first(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    launched = machine.dry_run(ENGINE="sglang", **machine.local())
    assert (
        next(words for words in launched.commands if words[-2:-1] == [f"{REPOSITORY}/scripts/setup.sh"])[-1]
        == "--sglang-cpu"
    )
    assert training(launched).engine == "sglang"
    assert launched.variables(SGLANG)["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.parametrize(
    "knobs",
    [
        {
            "OPD_KL_COEF": ("0.5", "opd_kl_coef", 0.5),
            "TASK_REWARD_WEIGHT": ("0.25", "task_reward_weight", 0.25),
            "NUM_ROLLOUT": ("7", "num_rollout", 7),
            "ROLLOUT_BATCH_SIZE": ("8", "rollout_batch_size", 8),
            "N_SAMPLES_PER_PROMPT": ("2", "n_samples_per_prompt", 2),
            "MAX_RESPONSE_LEN": ("64", "rollout_max_response_len", 64),
            "LR": ("5e-5", "lr", 5e-5),
            "EVAL_INTERVAL": ("3", "eval_interval", 3),
            # a restart may take as long as a start, and the teacher's clients wait for it
            "TEACHER_TIMEOUT": ("900", "teacher_patience", 960.0),
            "TEACHER_PORT": ("15151", "rm_url", "http://127.0.0.1:15151/generate"),
            "OUTPUT_DIR": ("/somewhere/else", "output_dir", "/somewhere/else"),
            "EXTERNAL_RAY": ("1", "ray_address", "auto"),
            "EXTRA_ARGS": ("--system-prompt 'Look, then think.'", "system_prompt", "Look, then think."),
        },
        {
            "TEACHER_URL": ("http://teacher.example:8000", "rm_url", "http://teacher.example:8000/generate"),
            "TEACHER_TIMEOUT": ("900", "teacher_patience", RewardArgs.teacher_patience),
            "EXTRA_ARGS": ("--lr 2e-4 --seed 7", "lr", 2e-4),
        },
        {"TEACHER_RESTARTS": ("0", "teacher_patience", RewardArgs.teacher_patience)},
        {"TEACHER_URL": ("http://teacher.example/a/generate", "rm_url", "http://teacher.example/a/generate")},
    ],
    ids=["all that go together", "a teacher elsewhere", "no restarts", "a teacher elsewhere with its path"],
)
def test_each_variable_changes_what_runs_and_is_printed(
    tmp_path: Path, knobs: dict[str, tuple[str, str, object]]
) -> None:
    machine = Machine(tmp_path)
    launched = machine.dry_run(**machine.local() | {knob: value for knob, (value, _, _) in knobs.items()})
    args = training(launched)
    for knob, (value, attribute, expected) in knobs.items():
        assert getattr(args, attribute) == expected
        assert f"  SLIME_SCRIPT_{knob}={value}" in launched.stdout.splitlines()


def test_models_and_data_by_path_are_used_and_printed(tmp_path: Path) -> None:
    machine = Machine(tmp_path, 8)
    launched = machine.dry_run(
        STUDENT_MODEL="student", TEACHER_MODEL=str(machine.teacher), DATASET_NAME="data"
    )
    args = training(launched)
    assert args.hf_checkpoint == str(machine.student)
    assert args.prompt_data == str(machine.data / "train.jsonl")
    assert str(machine.teacher) in launched.arguments(SGLANG)
    assert not [words for words in launched.commands if words[0].endswith("/hf")]


def test_a_teacher_elsewhere_leaves_all_gpus_to_the_student(tmp_path: Path) -> None:
    launched = Machine(tmp_path, 8).dry_run(TEACHER_URL="http://10.1.2.3:13141")
    assert launched.variables(TRAIN)["CUDA_VISIBLE_DEVICES"] == listed(0, 7)
    assert not [
        words for words in launched.commands if SGLANG in words or "Qwen/Qwen3-VL-30B-A3B-Thinking" in words
    ]


def test_the_pre_flight_is_printed_between_teacher_and_training(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    replica = "http://10.1.2.3:13141/generate"
    flags = f"--rm-url {replica} --rollout-max-prompt-len 500 --image-max-pixels 262144"
    launched = machine.dry_run(**machine.local(), EXTRA_ARGS=flags, DOCTOR_ARGS="--allow 'chat-template'")
    assert launched.arguments(DOCTOR) == [
        *("--teacher-url", "http://127.0.0.1:13141/generate", "--teacher-url", replica),
        *("--student-path", str(machine.student), "--max-tokens", "596", "--samples", "128"),
        *("--image-max-pixels", "262144", "--timeout", "120.0", "--allow", "chat-template"),
    ]
    assert parse_doctor_args(launched.arguments(DOCTOR)).samples == 128
    assert launched.variables(DOCTOR)["CUDA_VISIBLE_DEVICES"] == ""
    order = [words[words.index("-m") + 1] for words in launched.commands if "-m" in words]
    assert order[-3:] == [TRANSFORMERS, DOCTOR, TRAIN]


def test_only_visible_gpus_are_used(tmp_path: Path) -> None:
    machine = Machine(tmp_path, 8)
    machine.environment["CUDA_VISIBLE_DEVICES"] = "2,3,6,7"
    launched = machine.dry_run()
    assert launched.variables(SGLANG)["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert launched.variables(TRAIN)["CUDA_VISIBLE_DEVICES"] == "6,7"


def test_a_wandb_key_turns_wandb_on_and_is_printed_nowhere(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    assert not training(machine.dry_run(**machine.local())).use_wandb
    machine.environment["WANDB_API_KEY"] = "planted-secret"
    launched = machine.dry_run(**machine.local())
    assert training(launched).use_wandb
    assert "planted-secret" not in launched.stdout + launched.stderr


def test_a_password_in_the_teachers_url_is_printed_nowhere(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    launched = machine.dry_run(**machine.local(), TEACHER_URL="http://user:planted-secret@host:13141")
    assert "http://***@host:13141" in launched.stdout
    assert "planted-secret" not in launched.stdout + launched.stderr


def test_the_output_folder_is_fresh_and_printed_first_and_last(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    lines = machine.dry_run(**machine.local()).stdout.splitlines()
    assert lines[0] == lines[-1]
    assert lines[0].startswith(f"Output folder: {REPOSITORY}/outputs/")
    assert not Path(lines[0].removeprefix("Output folder: ")).exists()


@pytest.mark.parametrize(
    ("knobs", "sentence"),
    [
        (
            {"EXTRA_ARGS": "--tensor-model-parallel-size 2"},
            "--train-backend fsdp shards over all",
        ),
        ({"OPD_KL_COEF": "0"}, "nothing would be distilled"),
        ({"EXTRA_ARGS": "--num-rolout 3"}, "did you mean --num-rollout"),
        ({"STUDENT_MODEL": "/no/such/folder"}, "SLIME_SCRIPT_STUDENT_MODEL is /no/such/folder"),
        ({"TEACHER_MODEL": "empty"}, "no complete checkpoint"),
        ({"DATASET_NAME": "empty"}, "must hold train.parquet and test.parquet"),
        ({"NUM_GPUS": "4"}, "SLIME_SCRIPT_NUM_GPUS is 4"),
        ({"NUM_GPUS": "many"}, "must be a whole number"),
        ({"ENGINE": "vllm"}, "SLIME_SCRIPT_ENGINE is vllm"),
        ({"TEACHER_URL": "teacher:13141"}, "must look like http://HOST:PORT"),
        ({"OPD_COEF": "0.5"}, "SLIME_SCRIPT_OPD_COEF, which this script does not know"),
        ({"DRY_RUN": "1", "EXTERNAL_RAY": "yes"}, "must be 0 or 1"),
        ({"SKIP_DOCTOR": "yes"}, "SLIME_SCRIPT_SKIP_DOCTOR is yes; it must be 0 or 1"),
        ({"TEACHER_RESTARTS": "-1"}, "SLIME_SCRIPT_TEACHER_RESTARTS is -1; it must be a whole number"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_runs(
    tmp_path: Path, knobs: dict[str, str], sentence: str
) -> None:
    machine = Machine(tmp_path)
    (tmp_path / "empty").mkdir()
    launcher = machine.start(
        **machine.local() | {"SKIP_SETUP": "1", "OUTPUT_DIR": str(tmp_path / "out")} | knobs
    )
    _, stderr = launcher.communicate(timeout=PATIENCE_SECONDS)
    assert launcher.returncode not in (0, None)
    assert sentence in stderr
    assert not list(machine.stage.iterdir())
    assert not (tmp_path / "out").exists()


def test_a_split_that_does_not_fit_names_the_variable(tmp_path: Path) -> None:
    launched = Machine(tmp_path, 8).dry_run(NUM_GPUS_TEACHER="3")
    assert launched.returncode != 0
    assert "SLIME_SCRIPT_NUM_GPUS_TEACHER" in launched.stderr


def checkpointed(folder: Path, *rollouts: int) -> Path:
    """Make an output folder in which a run stopped after the last of `rollouts`."""
    for number in rollouts:
        path = folder / "checkpoints" / f"rollout-{number:06d}"
        path.mkdir(parents=True)
        (path / "state.json").touch()
        (folder / "checkpoints" / "latest").write_text(path.name)
    return folder


@pytest.mark.parametrize(("gpus", "interval"), [(0, 10), (8, 50)])
def test_every_run_saves_and_leaves_the_trained_model(tmp_path: Path, gpus: int, interval: int) -> None:
    machine = Machine(tmp_path, gpus=gpus)
    launched = machine.dry_run(**machine.local(), OUTPUT_DIR=str(tmp_path / "run"))
    args = training(launched)
    assert (args.save, args.load) == (str(tmp_path / "run" / "checkpoints"), None)
    assert (args.save_interval, args.save_hf_interval) == (interval, 0)
    assert "Resuming" not in launched.stdout


def test_a_run_that_was_stopped_goes_on_where_it_stood_and_this_is_said(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    folder = checkpointed(tmp_path / "run", 8, 10)
    launched = machine.dry_run(**machine.local(), OUTPUT_DIR=str(folder))
    assert training(launched).load == str(folder / "checkpoints")
    said = f"Resuming from {folder}/checkpoints/rollout-000010 (rollout 10 of 20)"
    assert said in launched.stdout.splitlines()
    assert "complete" not in launched.stdout


def test_a_finished_run_says_how_to_go_on(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    folder = checkpointed(tmp_path / "run", 20)
    launched = machine.dry_run(**machine.local(), OUTPUT_DIR=str(folder))
    assert "This run is complete" in launched.stdout
    assert "A larger SLIME_SCRIPT_NUM_ROLLOUT goes on with it." in launched.stdout
    longer = machine.dry_run(**machine.local(), OUTPUT_DIR=str(folder), NUM_ROLLOUT="30")
    assert "(rollout 20 of 30)" in longer.stdout
    assert "complete" not in longer.stdout


def test_a_damaged_marker_is_left_to_the_driver(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    folder = checkpointed(tmp_path / "run", 10)
    (folder / "checkpoints" / "latest").unlink()
    launched = machine.dry_run(**machine.local(), OUTPUT_DIR=str(folder))
    assert training(launched).load == str(folder / "checkpoints")
    assert f"Resuming from {folder}/checkpoints" in launched.stdout.splitlines()


def test_a_checkpoint_that_is_named_goes_before_the_folders_own(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    folder = checkpointed(tmp_path / "run", 10)
    extra = "--load elsewhere/rollout-000004"
    launched = machine.dry_run(**machine.local(), OUTPUT_DIR=str(folder), EXTRA_ARGS=extra)
    assert training(launched).load == "elsewhere/rollout-000004"
    assert "Resuming" not in launched.stdout
