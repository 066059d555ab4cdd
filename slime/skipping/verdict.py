"""Whether an optimizer step may be taken. Pure."""

from __future__ import annotations

import math


def refusal(loss: float, grad_norm: float, skip_grad: float = 0.0) -> str | None:
    """Return why a step must not be taken; None where it may.

    Loss and gradient norm are those over all ranks. A norm above `skip_grad` counts as exploded; 0: any
    finite one will do, and clipping makes it small.
    """
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if not math.isfinite(grad_norm):
        return f"the gradient norm is {grad_norm} though the loss is {loss:.4g}"
    if 0 < skip_grad < grad_norm:
        return f"the gradient norm {grad_norm:.4g} is above --skip-grad {skip_grad:g}"
    return None
