"""Giving the engine's memory back while a trainer on the same device needs it, and taking it again.

The tags are SGLang's. On the order of the verbs the real server is unforgiving and dies; here a wrong one is
refused.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from slime.engines.transformers_engine.model import EngineModel
from slime.engines.transformers_engine.stepper import Stepper

KV_CACHE, WEIGHTS, CUDA_GRAPH = TAGS = ("kv_cache", "weights", "cuda_graph")
"""Kinds of memory. There is no CUDA graph here; its tag is only taken note of."""


class OccupationError(Exception):
    """Memory cannot be released or resumed now."""


class Memory:
    """What of the engine's memory is released. All but its property and `lacking` is the model thread's."""

    def __init__(self, model: EngineModel, stepper: Stepper):
        self._model = model
        self._stepper = stepper
        self._released: set[str] = set()
        self._shapes: dict[str, torch.Size] = {}
        self._unwritten: set[str] = set()

    @property
    def weights_released(self) -> bool:
        """Whether there are no weights to write to."""
        return WEIGHTS in self._released

    def lacking(self) -> str | None:
        """Say what keeps the engine from running its model, None where nothing does; any thread may ask."""
        released = [tag for tag in (KV_CACHE, WEIGHTS) if tag in self._released]
        if released:
            listed = " and ".join(released)
            return f"the memory of {listed} is released; call /resume_memory_occupation first."
        if self._unwritten:
            return (
                f"{len(self._unwritten)} weights have no values since /resume_memory_occupation, "
                f"{min(self._unwritten)} among them; send them by a weight update first."
            )
        return None

    def _check_release(self, tags: Sequence[str]) -> None:
        if gone := [tag for tag in tags if tag in self._released]:
            raise OccupationError(f"the memory of {', '.join(gone)} is released already.")
        if len(self._stepper.rows):
            raise OccupationError(
                f"{len(self._stepper.rows)} requests are running; pause by retract or abort, or let them "
                "end, then release memory."
            )

    def release(self, tags: Sequence[str]) -> None:
        """Free the memory of `tags`; nothing runs until it is back. Raise OccupationError."""
        self._check_release(tags)
        self._released |= set(tags)
        if KV_CACHE in tags:
            self._stepper.rows.cache.clear()
        if WEIGHTS in tags:
            self._unwritten.clear()
            for name, parameter in self._model.net.named_parameters():
                self._shapes[name] = parameter.shape
                # Buffers stay: no weight update brings the rotary frequencies back.
                parameter.data = parameter.data.new_empty(0)
        self._stepper.held = self.lacking() is not None
        if self._model.device.type == "cuda":
            torch.cuda.empty_cache()

    def resume(self, tags: Sequence[str]) -> None:
        """Allocate what was released; weights are NaN until they are written. Raise OccupationError."""
        if there := [tag for tag in tags if tag not in self._released]:
            raise OccupationError(f"the memory of {', '.join(there)} was not released.")
        if WEIGHTS in tags:
            for name, parameter in self._model.net.named_parameters():
                parameter.data = parameter.data.new_full(self._shapes[name], float("nan"))
                self._unwritten.add(name)
        self._released -= set(tags)
        self._stepper.held = self.lacking() is not None

    def written(self, names: Iterable[str]) -> None:
        """Take note of weights that have values now."""
        if not self._unwritten:
            return
        # By place, not by name: a tied head is its embedding.
        state: dict[str, Tensor] = self._model.net.state_dict()
        places = {state[name].data_ptr() for name in names}
        parameters = self._model.net.named_parameters()
        self._unwritten -= {name for name, tensor in parameters if tensor.data_ptr() in places}
        self._stepper.held = self.lacking() is not None
