"""CUDA calls end on the CPU inside the block, in this thread, and nowhere else."""

from __future__ import annotations

import threading

import pytest
import torch

if torch.cuda.is_available():
    pytest.skip("stands in for a GPU where there is none", allow_module_level=True)

from slime.backends.megatron.device_shim import cpu_as_cuda


def test_cuda_calls_end_on_the_cpu() -> None:
    with cpu_as_cuda():
        made = torch.zeros(2, device="cuda")
        assert made.device.type == "cpu"
        assert made.cuda() is made
        assert made.to("cuda:0").device.type == "cpu"
        assert torch.empty(1, device=torch.cuda.current_device()).device.type == "cpu"
        assert made.type() == "torch.cuda.FloatTensor"
        assert made.bfloat16().type() == "torch.cuda.BFloat16Tensor"
        torch.cuda.synchronize()
        assert len(torch.cuda.random.get_rng_state()) == 0


def test_nothing_of_it_stays() -> None:
    before = (torch.cuda.current_device, torch.cuda.synchronize, torch.cuda.random.get_rng_state)
    with pytest.raises(RuntimeError, match="inside"), cpu_as_cuda():
        raise RuntimeError("inside")
    assert before == (torch.cuda.current_device, torch.cuda.synchronize, torch.cuda.random.get_rng_state)
    assert torch.zeros(1).type() == "torch.FloatTensor"
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda")


def test_another_thread_is_left_alone() -> None:
    kinds: list[str] = []
    with cpu_as_cuda():
        thread = threading.Thread(target=lambda: kinds.append(torch.zeros(1).type()))
        thread.start()
        thread.join()
    assert kinds == ["torch.FloatTensor"]
