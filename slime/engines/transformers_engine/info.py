"""What the engine says about itself."""

import time
from dataclasses import dataclass, field
from typing import Any

from slime.engines.transformers_engine.batcher import Batcher
from slime.engines.transformers_engine.control import Control

ENGINE_NAME = "transformers"


@dataclass(frozen=True)
class ServerInfo:
    """Facts that do not change while the engine runs."""

    tokenizer_path: str
    sees: bool
    """Whether the model takes pictures."""
    model_type: str
    architectures: list[str]
    context_length: int
    settings: dict[str, Any]
    """The command line, as parsed; it holds no key."""
    started: float = field(default_factory=time.time)

    def model(self, control: Control, batcher: Batcher) -> dict[str, Any]:
        """Body of `/model_info`."""
        return {
            "model_path": control.model_path,
            "served_model_name": control.served_name,
            "tokenizer_path": self.tokenizer_path,
            "is_generation": True,
            "preferred_sampling_params": None,
            "weight_version": batcher.weight_version,
            "load_format": "auto",
            "reasoning_parser": None,
            "tool_call_parser": None,
            "disaggregation_mode": "null",
            "has_image_understanding": self.sees,
            "has_audio_understanding": False,
            "model_type": self.model_type,
            "architectures": self.architectures,
        }

    def server(self, control: Control, batcher: Batcher) -> dict[str, Any]:
        """Body of `/server_info`: settings, load, and how often each part of the model ran."""
        running, waiting = batcher.load()
        return {
            **self.settings,
            "engine": ENGINE_NAME,
            "weight_version": batcher.weight_version,
            "context_length": self.context_length,
            "paused": control.paused,
            "running_requests": running,
            "waiting_requests": waiting,
            "held_requests": control.held,
            "startup_time": self.started,
            "internal_states": [batcher.model.counts.as_dict()],
        }

    def models(self, control: Control) -> dict[str, Any]:
        """Body of `/v1/models`."""
        card = {
            "id": control.served_name,
            "object": "model",
            "created": int(self.started),
            "owned_by": "slime",
            "root": control.served_name,
            "parent": None,
            "max_model_len": self.context_length,
        }
        return {"object": "list", "data": [card]}
