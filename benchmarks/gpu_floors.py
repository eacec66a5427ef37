"""What a step of `gpu.py` cannot do without, from operations and bytes that are counted and rates that are measured; who
trains, and how, is not known here.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gpu_device import On
from pictures_runs import Setting


def measured_rates(on: On) -> dict[str, float]:
    """Operations a second of a large bf16 product, and bytes a second, read and written, of a copy on the device."""
    side, size = (8192, 1 << 31) if on.is_cuda else (512, 1 << 24)
    a, b = (torch.randn(side, side, device=on.device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(size, dtype=torch.uint8, device=on.device).random_()
    target = torch.empty_like(source)
    return {
        "operations": 2 * side**3 / _seconds(lambda: a @ b, on),
        "bytes": 2 * size / _seconds(lambda: target.copy_(source), on),
    }


def _seconds(call: Callable[[], object], on: On) -> float:
    """The median of ten calls after three."""
    times = []
    for _ in range(13):
        began = on.since(0.0)
        call()
        times.append(on.since(began))
    return statistics.median(times[3:])


def counted(model: nn.Module, side: int) -> dict[str, float]:
    """Of a forward pass of one picture: its operations, the elements that products (convolutions and linear layers) and that
    all leaf modules put out; and the network's weights.
    """
    model, outputs = copy.deepcopy(model).eval(), {"products": 0, "leaves": 0}

    def add(module: nn.Module, _: Any, output: Any) -> None:
        size = output.numel() if isinstance(output, torch.Tensor) else 0
        outputs["leaves"] += size
        outputs["products"] += size if isinstance(module, (nn.Conv2d, nn.Linear)) else 0

    for module in model.modules():
        if not any(module.children()):
            module.register_forward_hook(add)
    # Attention as products: the counter does not know its kernel on a CPU.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, side, side))
    weights = sum(p.numel() for p in model.parameters())
    return {"operations": counter.get_total_flops(), "weights": weights, **outputs}


def floors(counts: Mapping[str, float], rates: Mapping[str, float], setting: Setting) -> dict[str, float]:
    """Seconds that a step cannot do without, by arithmetic and by bytes; and those of the bytes of a kernel a layer."""
    passes = setting.batch * (1 if setting.thaw == "head" else 3)
    written_and_read, weights = 2 * 2 * passes, 4 * counts["weights"]
    return {
        "arithmetic": passes * counts["operations"] / rates["operations"],
        "bytes": (written_and_read * counts["products"] + weights) / rates["bytes"],
        "layer by layer": (written_and_read * counts["leaves"] + weights) / rates["bytes"],
    }
