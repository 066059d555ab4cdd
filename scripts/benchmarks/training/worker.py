"""One way to train in a process of its own, so that its memory is its own.

Takes a step for each line that comes in, and answers with a line. `python -m
scripts.benchmarks.training.worker` is started by the benchmark.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from scripts.benchmarks.training.measuring import measured
from scripts.benchmarks.training.ours import ApartTrainer, OurTrainer
from scripts.benchmarks.training.plain import PlainTrainer
from scripts.benchmarks.training.workload import Shape, make_samples
from slime.engines.process import free_port

WAYS = {"plain": PlainTrainer, "ours": OurTrainer, "apart": ApartTrainer}


def main() -> int:
    parser = argparse.ArgumentParser(description="One way of the training benchmark.")
    parser.add_argument("way", choices=tuple(WAYS))
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--shape", required=True, help="the workload's, as JSON")
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shape = Shape(**json.loads(options.shape))
    trainer = WAYS[options.way](options.model, shape, *make_samples(shape), free_port())
    for _ in sys.stdin:
        sys.stdout.write(json.dumps(measured(trainer.step)) + "\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
