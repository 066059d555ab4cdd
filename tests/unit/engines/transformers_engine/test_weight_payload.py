"""Payloads of named tensors are read; a pickle that holds anything else does nothing and is refused."""

import base64
import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.storage
from torch.multiprocessing import reductions

from slime.engines.transformers_engine.weight_payload import PayloadRefusedError, read_payload
from tests.fakes.weight_senders import payload, pickled

CPU = torch.device("cpu")
TENSORS = {
    "a": torch.arange(6, dtype=torch.bfloat16).view(2, 3),
    "b": torch.tensor(0.5),
    "c": torch.randn(70_000, generator=torch.Generator().manual_seed(0)),
}


class Reduced:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any, state: Any = None) -> None:
        self.call = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.call


def encoded(value: Any) -> str:
    return base64.b64encode(pickle.dumps(value)).decode()


def refusal(given: str) -> str:
    with pytest.raises(PayloadRefusedError) as caught:
        read_payload(given, CPU)
    return str(caught.value)


@pytest.mark.parametrize("protocol", [4, 5])
def test_named_tensors_come_back_whole(protocol: int) -> None:
    with payload(TENSORS, protocol) as given:
        read = read_payload(given, CPU)
        assert list(read) == ["a", "b", "c"]
        for name, tensor in TENSORS.items():
            assert read[name].dtype == tensor.dtype
            assert torch.equal(read[name], tensor)
        assert len({tensor.untyped_storage().data_ptr() for tensor in read.values()}) == 1


def test_many_tensors_are_read() -> None:
    many = {f"layers.{number}.weight": torch.full((3, number + 1), float(number)) for number in range(400)}
    with payload(many) as given:
        read = read_payload(given, CPU)
        assert all(torch.equal(read[name], many[name]) for name in many)
        assert read.keys() == many.keys()


def test_calls_are_refused_and_not_made(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    loaded = io.BytesIO()
    torch.save(torch.ones(2), loaded)
    for value, name in (
        (Reduced(os.system, f"touch {mark}"), "posix.system"),
        ([("w", Reduced(os.system, f"touch {mark}"))], "posix.system"),
        (Reduced(eval, f"open({str(mark)!r}, 'w')"), "builtins.eval"),
        (Reduced(getattr, "words", "format"), "builtins.getattr"),
        (Reduced(torch.load, str(mark)), "torch.serialization.load"),
        (Reduced(torch.storage._load_from_bytes, loaded.getvalue()), "torch.storage._load_from_bytes"),
        (Reduced(torch.hub.load, "a/b", "c"), "torch.hub.load"),
        ([("w", torch.ones(2))], "torch._utils._rebuild_tensor_v2"),
    ):
        assert name in refusal(encoded(value))
    assert not mark.exists()


def test_a_name_behind_an_allowed_one_is_refused() -> None:
    data = b"\x80\x04\x8c\x05torch\x8c\x0fTensor.__class__\x93."
    data = data.replace(b"\x0f", bytes([len("Tensor.__class__")]))
    assert "Tensor.__class__" in refusal(base64.b64encode(data).decode())


def test_no_attribute_of_an_allowed_class_can_be_set() -> None:
    # BUILD with (None, {name: value}) sets attributes of what is on the stack: here of the class itself.
    begin = b"\x80\x04\x8c\x05torch\x8c\x06Tensor\x93"
    for end in (b"N}\x8c\x07planted\x88s\x86b.", b"NN\x86b."):
        message = refusal(base64.b64encode(begin + end).decode())
        assert "instruction EMPTY_DICT" in message or "instruction BUILD" in message
    assert not hasattr(torch.Tensor, "planted")


def test_other_ways_to_call_are_refused() -> None:
    newobj = b"\x80\x04\x8c\x05torch\x8c\x06Tensor\x93)\x81."
    assert "NEWOBJ" in refusal(base64.b64encode(newobj).decode())
    assert "GLOBAL" in refusal(base64.b64encode(b"cposix\nsystem\n(S'true'\ntR.").decode())
    assert "PERSID" in refusal(base64.b64encode(b"Pid\n.").decode())


def test_broken_bytes_are_refused() -> None:
    with payload(TENSORS) as given:
        data = base64.b64decode(given)
    for length in range(len(data)):
        refusal(base64.b64encode(data[:length]).decode())
    assert "base64" in refusal("no base64!")
    assert "base64" in refusal("ü")
    refusal(base64.b64encode(os.urandom(64)).decode())


def test_what_is_no_list_of_named_weights_is_refused() -> None:
    names = {"w": torch.ones(2)}
    for value in (
        "words",
        [("w", "words")],
        [(1, torch.ones(2))],
        [torch.ones(2)],
        [("w", torch.ones(2), torch.ones(2))],
        torch.ones(2),
    ):
        assert "list of (name, tensor" in refusal(pickled(value))
    assert "int64" in refusal(pickled([("w", torch.ones(2, dtype=torch.int64))]))
    assert "EMPTY_DICT" in refusal(pickled(names))


def test_memory_that_is_gone_is_refused() -> None:
    with payload({"w": torch.ones(5)}) as given:
        data = base64.b64decode(given)
    at = data.index(b"/torch_")
    gone = data[: at + 7] + b"0" + data[at + 8 :]
    assert "keep its tensors" in refusal(base64.b64encode(gone).decode())


def test_torchs_other_way_of_sharing_is_refused() -> None:
    # By file descriptors, which another process can only fetch from a server in the sender.
    message = refusal(pickled([("w", torch.ones(5))], strategy="file_descriptor"))
    assert "is refused" in message


def test_memory_of_a_gpu_is_refused_on_a_cpu() -> None:
    data = b"\x80\x04\x8c\x20torch.multiprocessing.reductions\x8c\x13rebuild_cuda_tensor\x93)R."
    assert "rebuild_cuda_tensor" in refusal(base64.b64encode(data).decode())
    with pytest.raises(PayloadRefusedError, match="cannot be read"):
        read_payload(base64.b64encode(data).decode(), torch.device("cuda"))


def test_memory_of_a_gpu_is_opened_on_the_engines_own(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [torch.Tensor, torch.Size([2]), (1,), 0, torch.storage.TypedStorage, torch.float32, 3, b"h"]
    arguments += [8, 0, False, b"r", 0, b"e", True]
    given = encoded([("w", Reduced(reductions.rebuild_cuda_tensor, *arguments))])
    calls: list[Any] = []

    def rebuild(*arguments: Any) -> torch.Tensor:
        calls.append(list(arguments))
        return torch.ones(2)

    monkeypatch.setattr(reductions, "rebuild_cuda_tensor", rebuild)
    assert torch.equal(read_payload(given, torch.device("cuda:1"))["w"], torch.ones(2))
    assert calls == [[*arguments[:6], 1, *arguments[7:]]]
