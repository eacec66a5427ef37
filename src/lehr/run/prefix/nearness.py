"""Whether two tensors are the same up to rounding, in the arithmetic that is on. It must not know what was computed."""

from __future__ import annotations

import torch


def near(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> bool:
    """Whether two tensors are the same, floating point up to so much of the norm."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not (a.is_floating_point() or a.is_complex()):
        return torch.equal(a, b)
    if torch.equal(a, b):
        return True
    unequal = (a != b) & ~(a.isnan() & b.isnan())
    off = (a - b).masked_fill(~unequal, 0).abs().double().norm()
    size = a.abs().masked_fill(~a.isfinite(), 0).double().norm()
    return bool(off <= tolerance * size)


def tolerance(device: torch.device) -> float:
    """How far two computations of the same may be apart, as a share of the norm, in the arithmetic that is on.

    In fp32 four times the worst that was seen: a sample alone beside itself in a batch, over the models of
    benchmarks/coverage.py (2.6e-4). bf16 and fp16 have 8 and 11 bits, and errors grow from layer to layer.
    """
    if not torch.is_autocast_enabled(device.type):
        return 1e-3
    return 3e-2 if torch.get_autocast_dtype(device.type) is torch.bfloat16 else 1e-2
