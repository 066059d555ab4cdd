"""The embedded default of a run without a GPU: generated problems, with pictures and in words, and tiny
Qwen3-VL and Qwen3 checkpoints."""

from slime.tiny.paths import CHECKPOINTS, checkpoint_path, ensure_dataset

__all__ = ["CHECKPOINTS", "checkpoint_path", "ensure_dataset"]
