"""One check in a process of its own: each row is in the file as soon as it is known. Started by the command
line."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from scripts.checks.gpu.registry import CHECKS
from scripts.checks.gpu.setting import Setting


def main() -> int:
    parser = argparse.ArgumentParser(description="One check of the GPU.")
    parser.add_argument("check", choices=tuple(CHECKS))
    parser.add_argument("--device", required=True)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--rows", type=Path, required=True, help="where the rows go, as JSON")
    options = parser.parse_args()
    disable_progress_bar()
    torch.backends.cudnn.allow_tf32 = False  # float32 is to mean float32 on both sides
    torch.backends.cuda.matmul.allow_tf32 = False
    device = torch.device(options.device, 0) if options.device == "cuda" else torch.device(options.device)
    setting = Setting(device=device, tiny=options.tiny, scratch=options.scratch)
    with options.rows.open("w", encoding="utf-8") as file:
        for row in CHECKS[options.check].function()(setting):
            file.write(json.dumps(asdict(row)) + "\n")
            file.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
