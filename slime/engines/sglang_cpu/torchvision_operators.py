"""Declare torchvision's compiled operators where its library cannot be loaded.

The registry's torchvision is linked to CUDA and does not load beside a CPU torch. Its image transforms are
plain torch, but importing it registers shape functions for the compiled operators, so these must be known.
They are declared, not implemented: SGLang's Qwen-VL calls none of them.
"""

import importlib.util
from pathlib import Path

import torch

_BOXES = "Tensor input, Tensor rois, float spatial_scale"
_POOLED = "SymInt pooled_height, SymInt pooled_width"
_DEFORM_INPUTS = "Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias"
_DEFORM_SIZES = "SymInt sh, SymInt sw, SymInt ph, SymInt pw, SymInt dh, SymInt dw, SymInt g, SymInt og"
_OPERATORS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "roi_align": f"({_BOXES}, {_POOLED}, int sampling_ratio, bool aligned) -> Tensor",
    "roi_pool": f"({_BOXES}, {_POOLED}) -> (Tensor, Tensor)",
    "ps_roi_align": f"({_BOXES}, {_POOLED}, int sampling_ratio) -> (Tensor, Tensor)",
    "ps_roi_pool": f"({_BOXES}, {_POOLED}) -> (Tensor, Tensor)",
    "deform_conv2d": f"({_DEFORM_INPUTS}, {_DEFORM_SIZES}, bool m) -> Tensor",
    "_roi_align_backward": "(Tensor x) -> Tensor",
    "_roi_pool_backward": "(Tensor x) -> Tensor",
    "_ps_roi_align_backward": "(Tensor x) -> Tensor",
    "_ps_roi_pool_backward": "(Tensor x) -> Tensor",
    "_deform_conv2d_backward": "(Tensor x) -> Tensor",
}


def declare_where_missing() -> None:
    """Declare the operators unless torchvision's own library loads here; to be called before its import."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or _library_loads(Path(spec.origin).parent):
        return
    for name, schema in _OPERATORS.items():
        torch.library.define(f"torchvision::{name}", schema)


def _library_loads(package: Path) -> bool:
    try:
        for library in package.glob("_C*.so"):
            torch.ops.load_library(str(library))
    except OSError:
        return False
    return True
