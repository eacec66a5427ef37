"""Linear layers of a prefix computed by oneDNN in place of MKL, where that is known to be faster. The same up to rounding.

Weights are neither copied nor packed. It must not know prefixes.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

_LARGE = 100_000
"""Weights of a layer below which a product is too short for what a call of oneDNN costs (64 by 64, 3 rows: 19 us for 5)."""
_FUNCTIONS = (functional.linear, torch.ops.aten.linear.default)


def by_onednn(graph: fx.Graph, root: dict[str, Any]) -> int:
    """Have the linear layers of a graph computed by oneDNN, where that is faster; how many there are.

    Takes 0.80 to 0.92 of MKL's time in 12 of 14 measurements on an EPYC with AVX-512, in fp32 (docs/speed.md).
    """
    if not _is_faster():
        return 0
    count = 0
    for node in graph.nodes:
        if node.op == "call_module" and _is_plain(layer := root[str(node.target)]):
            root[str(node.target)] = _ByOneDnn(layer)
        elif node.op == "call_function" and node.target in _FUNCTIONS and _is_on_weights(node, root):
            node.target = _product
        else:
            continue
        count += 1
    return count


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`functional.linear`, for its positional arguments."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]


class _ByOneDnn(nn.Module):
    """A layer of the person's, whose weights it reads. It is held, not registered: nobody's train() is to reach it."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self._held = (layer,)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What the layer makes of `x`."""
        (layer,) = self._held
        return _product(x, layer.weight, layer.bias)


def _is_faster() -> bool:
    """On AMD's processors in fp32; on Intel's both libraries have the same author, and nothing was measured."""
    libraries: tuple[Any, ...] = (torch.backends.mkl, torch.backends.mkldnn)
    return (
        all(library.is_available() for library in libraries)
        and _is_amd()
        and not torch.is_autocast_enabled("cpu")
    )


@cache
def _is_amd() -> bool:
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0]
    except OSError:
        return False


def _is_plain(module: Any) -> bool:
    """A layer that is a product and nothing else, and that nothing else looks at."""
    return (
        type(module) is nn.Linear
        and not (module._forward_hooks or module._forward_pre_hooks)
        and _is_large(module.weight)
        and type(module.weight) is nn.Parameter
    )


def _is_on_weights(node: fx.Node, root: dict[str, Any]) -> bool:
    weight = node.args[1] if len(node.args) > 1 and not node.kwargs else None
    return isinstance(weight, fx.Node) and weight.op == "get_attr" and _is_large(root[str(weight.target)])


def _is_large(weight: Any) -> bool:
    return bool(
        isinstance(weight, torch.Tensor)
        and weight.numel() >= _LARGE
        and weight.dtype is torch.float32
        and weight.device.type == "cpu"
    )
