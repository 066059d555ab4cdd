"""The teacher's files work in an upstream slime checkout: with its `Sample`, a bare `args`, and nothing else
of ours."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from slime.tiny.paths import checkpoint_path
from tests.fakes.engine_server import log_prob, serve
from tests.fakes.rollouts import fake_engine

REPOSITORY = Path(__file__).parents[3]
COPIED = (
    "slime/engines/api.py",
    "slime/engines/client.py",
    "slime/engines/model_facts.py",
    "slime/engines/pictures.py",
    "slime/rollout/on_policy_distillation.py",
    "examples/opd_vlm/opd_vlm_reward.py",
)
STAND_INS = {
    "slime/utils/types.py": """
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Sample:
    group_index: Any = None
    index: Any = None
    prompt: Any = ""
    tokens: list = field(default_factory=list)
    multimodal_inputs: Any = None
    multimodal_train_inputs: Any = None
    response: str = ""
    response_length: int = 0
    label: Any = None
    reward: Any = None
    teacher_log_probs: Any = None
    metadata: dict = field(default_factory=dict)

    def get_reward_value(self, args):
        return self.reward if not args.reward_key else self.reward[args.reward_key]
""",
    "slime/utils/processing_utils.py": """
import base64
import io


def encode_image_for_rollout_engine(image):
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
""",
}
SCRIPT = """
import argparse, asyncio, importlib, json, sys
import torch
from PIL import Image
from slime.utils.types import Sample

module, url, checkpoint, pad = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
plugin = importlib.import_module(module)
args = argparse.Namespace(rm_url=url, reward_key=None, hf_checkpoint=checkpoint)
sample = Sample(
    tokens=[40, 41] + [pad] * 6 + [42, 11, 12, 2],
    response_length=3,
    multimodal_inputs={"images": [Image.new("RGB", (96, 64))]},
    multimodal_train_inputs={"pixel_values": torch.zeros(1), "image_grid_thw": torch.tensor([[1, 4, 6]])},
)
sample.reward = asyncio.run(plugin.reward_func(args, sample))
rewards = plugin.post_process_rewards(args, [sample])
print(json.dumps([sample.teacher_log_probs.tolist(), str(sample.teacher_log_probs.dtype), rewards]))
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in COPIED:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, tmp_path / name)
    for name, text in STAND_INS.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    for folder in {path.parent for path in tmp_path.rglob("*.py")} | {
        tmp_path / "slime",
        tmp_path / "examples",
    }:
        (folder / "__init__.py").touch()
    (tmp_path / "run.py").write_text(SCRIPT, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    "module", ["slime.rollout.on_policy_distillation", "examples.opd_vlm.opd_vlm_reward"]
)
def test_the_plugin_runs_with_upstreams_sample_and_a_bare_namespace(checkout: Path, module: str) -> None:
    with serve(fake_engine()) as teacher:
        pad = str(teacher.image_token_id)
        command = [
            sys.executable,
            "run.py",
            module,
            teacher.url + "/generate",
            str(checkpoint_path("student")),
            pad,
        ]
        environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, cwd=checkout, env=environment, capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stderr
    values, dtype, rewards = json.loads(done.stdout)
    assert values == pytest.approx([log_prob(token, 9 + place, 1) for place, token in enumerate((11, 12, 2))])
    assert (dtype, rewards) == ("torch.float32", [[0.0], [0.0]])
