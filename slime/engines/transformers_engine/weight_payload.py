"""Reading what a trainer on this machine sends by `/update_weights_from_tensor`: tensors by name and place.

The payload is a base64 pickle, as torch's ForkingPickler writes a `list[(name, tensor)]`; the tensors' bytes
lie in shared memory, or on the GPU. A pickle can call anything, so this one may hold only the instructions
and names that such a list takes, each listed here.
"""

import base64
import binascii
import io
import pickle
import pickletools
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing import reductions

_REBUILDING = "torch.multiprocessing.reductions"
_DEVICE_ARGUMENT = 6
"""Place of the GPU's number among the arguments of torch's function."""
DTYPES = ("float32", "bfloat16", "float16")
"""Of the tensors that are taken."""
GLOBALS = frozenset(
    {
        (_REBUILDING, "rebuild_tensor"),
        (_REBUILDING, "rebuild_typed_storage"),
        (_REBUILDING, "rebuild_storage_filename"),
        ("torch.storage", "UntypedStorage"),
        ("torch", "Tensor"),
        ("torch", "Size"),
        *(("torch", dtype) for dtype in DTYPES),
    }
)
CUDA_REBUILD = "rebuild_cuda_tensor"
CUDA_GLOBALS = frozenset({(_REBUILDING, CUDA_REBUILD), ("torch.storage", "TypedStorage")})
"""More names, for tensors on a GPU."""
OPCODES = frozenset(
    {
        *("PROTO", "FRAME", "STOP", "MARK", "MEMOIZE", "BINGET", "LONG_BINGET"),
        *("EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
        *("SHORT_BINUNICODE", "BINUNICODE", "SHORT_BINBYTES", "BINBYTES"),
        *("BININT", "BININT1", "BININT2", "LONG1", "NONE", "NEWTRUE", "NEWFALSE"),
        *("STACK_GLOBAL", "REDUCE"),
    }
)
"""What builds lists, tuples, strings, bytes, numbers, and what a listed name makes of them. None sets an
attribute, which could change a listed class itself."""


class PayloadRefusedError(ValueError):
    """A payload that is broken, or holds more than named tensors."""


def read_payload(payload: str, device: torch.device) -> dict[str, Tensor]:
    """Return the tensors of a payload by name; they still lie in the sender's memory.

    Args:
        payload: what the trainer sent, in base64.
        device: the engine's; references to GPU memory are taken where it is a GPU.

    Raises:
        PayloadRefusedError: the payload is broken, its memory is gone, or it holds anything else.
    """
    try:
        data = base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError) as error:
        raise PayloadRefusedError(f"the payload is no base64: {error}") from error
    _check_opcodes(data)
    allowed = GLOBALS | CUDA_GLOBALS if device.type == "cuda" else GLOBALS
    try:
        value = _Unpickler(data, allowed, device).load()
    except PayloadRefusedError:
        raise
    except _BROKEN as error:
        raise PayloadRefusedError(
            f"the payload cannot be read ({type(error).__name__}: {str(error)[:300]}). The sender must "
            "be on this machine, keep its tensors until it is answered, and share them by torch's strategy "
            "file_system."
        ) from error
    return _named_tensors(value)


_BROKEN = (
    pickle.UnpicklingError,
    EOFError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    AssertionError,
    MemoryError,
    RuntimeError,
)
"""What the pickle machine and torch's own functions raise over wrong arguments."""


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, allowed: frozenset[tuple[str, str]], device: torch.device):
        super().__init__(io.BytesIO(data))
        self._allowed = allowed
        self._device = device

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        """Find a listed name; refuse all others."""
        if (module_name, global_name) not in self._allowed:
            raise PayloadRefusedError(
                f"the payload names {module_name}.{global_name}, which is refused: only named tensors are "
                "taken."
            )
        if global_name == CUDA_REBUILD:
            return partial(_open_here, self._device)
        return super().find_class(module_name, global_name)


def _open_here(device: torch.device, *arguments: Any) -> Tensor:
    """Open GPU memory on the engine's own GPU: the sender may count the GPUs differently."""
    given = list(arguments)
    given[_DEVICE_ARGUMENT] = torch.cuda.current_device() if device.index is None else device.index
    return reductions.rebuild_cuda_tensor(*given)


def _check_opcodes(data: bytes) -> None:
    try:
        for opcode, _, position in pickletools.genops(data):
            if opcode.name not in OPCODES:
                raise PayloadRefusedError(
                    f"the payload holds the pickle instruction {opcode.name} at byte {position}, which is "
                    "refused: only named tensors are taken."
                )
    except PayloadRefusedError:
        raise
    except ValueError as error:
        raise PayloadRefusedError(f"the payload is no whole pickle: {error}") from error


def _named_tensors(value: Any) -> dict[str, Tensor]:
    pairs = value if isinstance(value, list) else [value]
    for pair in pairs:
        match pair:
            case (str(), Tensor() as tensor) if str(tensor.dtype).removeprefix("torch.") in DTYPES:
                continue
            case _:
                raise PayloadRefusedError(
                    f"the payload must be a list of (name, tensor of {', '.join(DTYPES)}), and holds "
                    f"{type(pair).__name__} {str(pair)[:80]!r}"
                )
    return dict(pairs)
