"""The embedded default of a run without a GPU: a generated geometry set and tiny Qwen3-VL checkpoints."""

from slime.tiny.paths import CHECKPOINTS, checkpoint_path, ensure_dataset

__all__ = ["CHECKPOINTS", "checkpoint_path", "ensure_dataset"]
