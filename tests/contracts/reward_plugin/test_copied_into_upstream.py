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
    *(f"slime/engines/{name}.py" for name in ("api", "scores", "errors", "client", "replicas", "retry")),
    *(f"slime/engines/{name}.py" for name in ("transport", "model_facts", "pictures", "keys")),
    "slime/engines/sglang_serve.py",
    "slime/utils/pictures.py",
    "slime/rollout/on_policy_distillation.py",
    "slime/utils/pictures.py",
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

url, checkpoint, pad = sys.argv[1], sys.argv[2], int(sys.argv[3])
args = argparse.Namespace(rm_url=url, reward_key=None, hf_checkpoint=checkpoint)
for module in sys.argv[4:]:
    plugin = importlib.import_module(module)
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
    for source in list(tmp_path.rglob("*.py")):
        for folder in source.relative_to(tmp_path).parents:
            (tmp_path / folder / "__init__.py").touch()
    (tmp_path / "run.py").write_text(SCRIPT, encoding="utf-8")
    return tmp_path


def test_the_plugins_run_with_upstreams_sample_and_a_bare_namespace(checkout: Path) -> None:
    modules = ("slime.rollout.on_policy_distillation", "examples.opd_vlm.opd_vlm_reward")
    with serve(fake_engine()) as teacher:
        known = (teacher.url + "/generate", str(checkpoint_path("student")), str(teacher.image_token_id))
        done = subprocess.run(
            [sys.executable, "run.py", *known, *modules],
            cwd=checkout,
            env={**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(modules)
    for line in lines:
        values, dtype, rewards = json.loads(line)
        expected = [log_prob(token, 9 + place, 1) for place, token in enumerate((11, 12, 2))]
        assert values == pytest.approx(expected)
        assert (dtype, rewards) == ("torch.float32", [[0.0], [0.0]])
