"""One way to train in a process of its own, so that its memory is its own.

Takes a step for each line that comes in, and answers with a line; where the GPU has no room for it, that line
says so and is the last. `python -m scripts.benchmarks.training.worker` is started by `processes.py`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from scripts.benchmarks.training.measuring import measured, measured_on_gpu
from scripts.benchmarks.training.ours import ApartTrainer, OurTrainer
from scripts.benchmarks.training.plain import PlainTrainer
from scripts.benchmarks.training.workload import Machine, Shape, make_samples
from slime.engines.process import free_port

WAYS = {"plain": PlainTrainer, "ours": OurTrainer, "apart": ApartTrainer}


def main() -> int:
    parser = argparse.ArgumentParser(description="One way of the training benchmark.")
    parser.add_argument("way", choices=tuple(WAYS))
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--shape", required=True, help="the workload's, as JSON")
    parser.add_argument("--machine", required=True, help="device, dtype and the rest, as JSON")
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shape, machine = Shape(**json.loads(options.shape)), Machine(**json.loads(options.machine))
    way, device = WAYS[options.way], torch.device(machine.device)
    try:
        trainer = way(options.model, shape, machine, *make_samples(shape), free_port())
        for _ in sys.stdin:
            on_gpu = device.type == "cuda"
            answer(measured_on_gpu(trainer.step, device) if on_gpu else measured(trainer.step))
    except torch.OutOfMemoryError as error:
        answer({"out_of_memory": str(error).split(". ")[0]})
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


def answer(record: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(record) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
