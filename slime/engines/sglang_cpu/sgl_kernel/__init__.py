"""Stand-in for SGLang's compiled kernels on a CPU.

SGLang imports the names of its CPU kernels whatever the processor, and without Intel AMX computes every layer
in plain torch instead of calling them. So the names have to exist; only one of them is ever called, and that
one is written out.
"""

from collections.abc import Callable
from typing import NoReturn

import torch

__version__ = "0.0.0"

# Operators that model modules next to Qwen3-VL look up while SGLang imports them; Qwen3-VL calls none. SGLang
# takes the operator `convert_weight_packed` for a sign of AMX, so that one must stay undeclared.
_LOOKED_UP_AT_IMPORT = (
    "fused_dual_residual_rmsnorm_cpu",
    "fused_gdn_gating_cpu",
    "fused_moe_router_cpu",
    "fused_qk_gemma_rmsnorm_cpu",
    "fused_qk_gemma_rmsnorm_with_gate_cpu",
    "fused_qkvzba_split_reshape_cat_contiguous_cpu",
    "fused_qkvzba_split_reshape_cat_cpu",
    "fused_sigmoid_gating_delta_rule_update_cpu",
    "fused_sigmoid_mul_cpu",
    "rmsnorm_cpu",
    "shared_expert_cpu",
)
# The library object keeps its declarations alive, so it must not be collected.
_library = torch.library.Library("sgl_kernel", "FRAGMENT")
for _operator in _LOOKED_UP_AT_IMPORT:
    _library.define(f"{_operator}(Tensor x) -> Tensor")


def assign_req_to_token_pool_cpu(
    request_rows: torch.Tensor,
    pool: torch.Tensor,
    starts: torch.Tensor,
    ends: torch.Tensor,
    slots: torch.Tensor,
    _row_length: int,
) -> None:
    """Write each request's new KV slots, joined in `slots`, to columns `starts[i]:ends[i]` of its row."""
    counts = (ends - starts).tolist()
    for row, start, new in zip(request_rows.tolist(), starts.tolist(), slots.split(counts), strict=True):
        pool[row, start : start + len(new)] = new.to(pool.dtype)


def __getattr__(name: str) -> Callable[..., NoReturn]:
    """Stand for any other CPU kernel, and raise NotImplementedError if SGLang should call it after all."""
    if not name.endswith("_cpu"):
        raise AttributeError(f"the CPU stand-in for sgl_kernel has no {name!r}")

    def missing(*_args: object, **_kwargs: object) -> NoReturn:
        raise NotImplementedError(
            f"SGLang called the compiled kernel sgl_kernel.{name}, which only its GPU and AMX builds have; "
            "serve this model on a GPU or with the transformers engine."
        )

    return missing
