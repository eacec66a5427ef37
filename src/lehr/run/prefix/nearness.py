"""Whether two tensors are the same up to rounding, in the arithmetic that is on; and the one that rounds least. It must not
know what was computed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, NamedTuple

import torch

_LEAST = 1e-2
"""No slice counts for less than this share of a usual one: it may be what large numbers have left of each other."""


class Tolerance(NamedTuple):
    """How far two computations of the same may be apart, as a share of the norm: of the `whole`, and of single `slices`."""

    whole: float
    slices: float


def near(a: torch.Tensor, b: torch.Tensor, tolerance: Tolerance) -> bool:
    """Whether two tensors are the same, floating point up to so much of the norm: of the whole, and of each slice along each
    dimension. So a wrong channel is seen beside one that is larger by far.

    Rounding of small slices is larger, as a share: they are allowed that of the geometric mean of their own norm and a usual
    one's.
    """
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not (a.is_floating_point() or a.is_complex()):
        return torch.equal(a, b)
    if torch.equal(a, b):
        return True
    unequal = (a != b) & ~(a.isnan() & b.isnan())
    off = (a - b).masked_fill(~unequal, 0).abs().double().square_()
    size = a.abs().masked_fill(~a.isfinite(), 0).double().square_()
    if not off.sum().sqrt() <= tolerance.whole * size.sum().sqrt():
        return False
    return all(_near_slices(off, size, dim, tolerance.slices) for dim in range(a.ndim))


def _near_slices(off: torch.Tensor, size: torch.Tensor, dim: int, share: float) -> bool:
    """Whether each slice along a dimension is the same; `off` and `size` are squares."""
    rest = [d for d in range(size.ndim) if d != dim]
    found, own = (t.sum(rest).sqrt() if rest else t.sqrt() for t in (off, size))
    usual = own.square().mean().sqrt()
    counted = torch.maximum(own, (own * usual).sqrt()).maximum(_LEAST * usual)
    return bool((found <= share * counted).all())


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """In fp32, without autocast and TF32, as far as what is computed leaves it open.

    Features of a sample alone and in a batch of 32 were apart, as a share of their norm, on an H200 and in five networks: by
    up to 1.2e-5 here, 2e-2 in TF32 and 4e-2 in bf16 (resnet50).
    """
    with without_tf32(device), torch.autocast(device.type, enabled=False):
        yield


@contextmanager
def without_tf32(device: torch.device) -> Iterator[None]:
    """CUDA's products and convolutions in fp32 are exact ones."""
    switches = _switches(device)
    try:
        for switch in switches:
            switch.set(switch.full)
        yield
    finally:
        for switch in reversed(switches):
            switch.set(switch.now)


class _Switch(NamedTuple):
    """Something of torch's that allows TF32: how it is set, to what it is set now, and to what for full precision."""

    set: Callable[[Any], None]
    now: Any
    full: Any


def _switches(device: torch.device) -> list[_Switch]:
    """Those that allow TF32 now. torch has two sets of names, and refuses to read what was set by the other."""
    found: list[_Switch] = []
    if device.type != "cuda":
        return found
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    with suppress(RuntimeError):
        if (precision := torch.get_float32_matmul_precision()) != "highest":
            cpu = getattr(torch.backends.mkldnn, "matmul", None)
            if value := getattr(cpu, "fp32_precision", None):  # which the next one sets as well
                found.append(_Switch(partial(_set, cpu, "fp32_precision"), value, value))
            found.append(_Switch(torch.set_float32_matmul_precision, precision, "highest"))
    with suppress(RuntimeError):
        found += [_Switch(partial(_set, cudnn, "allow_tf32"), True, False)] * bool(cudnn.allow_tf32)
    newer = [matmul, getattr(cudnn, "conv", None), getattr(cudnn, "rnn", None)]
    tf32 = [part for part in newer if getattr(part, "fp32_precision", None) == "tf32"]
    return [*found, *(_Switch(partial(_set, part, "fp32_precision"), "tf32", "ieee") for part in tf32)]


def _set(where: Any, name: str, to: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch prefers its newer names
        setattr(where, name, to)


def is_full_precision(device: torch.device) -> bool:
    """Whether `full_precision` would change nothing."""
    return not torch.is_autocast_enabled(device.type) and not _switches(device)


def tolerance(device: torch.device) -> Tolerance:
    """How far two computations of the same may be apart, in the arithmetic that is on.

    In fp32 on a CPU several times the worst that was seen, over the models of benchmarks/coverage.py: of the whole 2.6e-4 (a
    sample alone beside itself in a batch), of slices 4e-4. bf16 and fp16 have 8 and 11 bits, and errors grow from layer to
    layer; TF32, which CUDA's convolutions use, has 11. Slices were up to 18 times as far apart as the whole.
    """
    if not torch.is_autocast_enabled(device.type):
        return Tolerance(1e-3, 1e-3 if is_full_precision(device) else 1e-2)
    bf16 = torch.get_autocast_dtype(device.type) is torch.bfloat16
    return Tolerance(3e-2, 0.3) if bf16 else Tolerance(1e-2, 0.1)
