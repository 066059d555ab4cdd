"""Launches of made-up runs, for the checks."""

from __future__ import annotations

import json
from pathlib import Path

from slime.arguments import parse_args
from slime.preflight.launch import Download, Launch, Teacher

CPU = ("--engine", "transformers", "--train-dtype", "float32", "--weight-sync", "disk", "--rm-type", "math")
GPU = ("--engine", "sglang", "--train-dtype", "bfloat16", "--weight-sync", "distributed", "--rm-type", "math")


def launch(
    *flags: str,
    student: Path | str = "student",
    student_gpus: tuple[str, ...] = (),
    teacher: Teacher | None = None,
    downloads: tuple[Download, ...] = (),
    folders: dict[str, Path] | None = None,
) -> Launch:
    """Return a launch of 10 rollouts; on GPUs where the student has some."""
    args = parse_args(
        [
            *("--hf-checkpoint", str(student), "--prompt-data", "train.parquet", "--num-rollout", "10"),
            *(GPU if student_gpus else CPU),
            *flags,
        ]
    )
    return Launch(
        args=args,
        student_gpus=student_gpus,
        teacher=teacher,
        downloads=downloads,
        folders=folders or {},
    )


def teacher(path: Path | str, *gpus: str, engine: str = "sglang", port: int = 13141) -> Teacher:
    """Return a teacher that is served here."""
    return Teacher(path=str(path), gpus=gpus, engine=engine, port=port)


def write_model(folder: Path, tensors: dict[str, list[int]]) -> Path:
    """Write a checkpoint with tensors of these shapes, 2 bytes a value; the file is as long as they are, and
    holds nothing."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_vl"}))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors.items():
        size = 2
        for side in shape:
            size *= side
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return folder
