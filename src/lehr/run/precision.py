"""Where the arithmetic happens and in which numbers: a device and autocast. Nothing here knows a stage."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from lehr.errors import RequestError

Precision = Literal["auto", "fp32", "bf16", "fp16"]
_LARGE = 1_000_000
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_UNITS = {  # of x86, and of ARM
    "bf16": frozenset({"avx512_bf16", "amx_bf16", "bf16"}),
    "fp16": frozenset({"avx512_fp16", "amx_fp16", "asimdhp"}),
}


@dataclass(frozen=True)
class Arithmetic:
    """A device and a precision: `"fp32"`, `"bf16"` or `"fp16"`."""

    device: torch.device
    precision: str

    def autocast(self) -> AbstractContextManager[object]:
        """The context in which forward passes run."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=_DTYPES[self.precision])

    @property
    def synchronous(self) -> bool:
        """Whether reading a number back costs nothing."""
        return self.device.type == "cpu"


def arithmetic(device: str | torch.device = "auto", precision: str = "auto") -> Arithmetic:
    """Resolve `"auto"`: CUDA, else Apple's MPS, else the CPU; bf16 on a CUDA device that has it, else fp32.

    Raises:
        RequestError: for a device that is not there, or an unknown precision.
    """
    if precision not in ("auto", "fp32", "bf16", "fp16"):
        raise RequestError(f'precision={precision!r}; expected "auto", "fp32", "bf16" or "fp16"')
    place = _device(device)
    if precision == "auto":
        precision = (
            "bf16"
            if place.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
            else "fp32"
        )
    return Arithmetic(place, precision)


def slow_arithmetic(on: Arithmetic) -> str:
    """A sentence where a CPU has no units for the numbers that were asked for; empty elsewhere, and where nobody can say.

    Without them products are computed in float32 behind conversions, or one by one: forward passes of small convolutional
    networks took 12 to 29 times as long (docs/speed.md).

    Example:
        >>> slow_arithmetic(Arithmetic(torch.device("cpu"), "fp32"))
        ''
    """
    if on.device.type != "cpu" or on.precision == "fp32":
        return ""
    features = _cpu_features()
    if not features or features & _UNITS[on.precision]:
        return ""
    return (
        f'precision="{on.precision}": this CPU has no units for such numbers, and is many times slower with them than in '
        'float32; say precision="fp32", or "auto", which takes what the hardware has'
    )


@cache
def _cpu_features() -> frozenset[str]:
    """What the processor can do, in the words of Linux (proc_cpuinfo(5)); empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    return next(
        (
            frozenset(line.partition(":")[2].split())
            for line in lines
            if line.lower().startswith(("flags", "features"))
        ),
        frozenset(),
    )


def channels_last_pays(model: nn.Module, on: Arithmetic) -> bool:
    """Whether to lay convolution weights out channels-last: values stay the same, rounding may differ.

    True for networks of mostly 2-d convolutions with at least a million parameters, on a CPU in fp32 or on CUDA in
    half precision, where kernels for that layout are faster (benchmarks/README.md).
    """
    convolutions = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d))
    total = sum(p.numel() for p in model.parameters())
    if convolutions < _LARGE or 2 * convolutions < total:
        return False
    return (on.device.type, on.precision == "fp32") in (("cpu", True), ("cuda", False))


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device(
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    try:
        place = torch.device(device)
    except RuntimeError:
        raise RequestError(
            f'device={str(device)!r}; expected "auto", "cpu", "cuda", "cuda:1" or "mps"'
        ) from None
    if place.type == "cuda" and not torch.cuda.is_available():
        raise RequestError(
            f'device="{place}": this machine has no CUDA device that torch can use; say "auto" or "cpu"'
        )
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise RequestError(
            f'device="{place}": there are {torch.cuda.device_count()} CUDA devices, counted from 0'
        )
    if place.type == "mps" and not torch.backends.mps.is_available():
        raise RequestError(
            'device="mps": this machine has no Apple GPU that torch can use; say "auto" or "cpu"'
        )
    return place
