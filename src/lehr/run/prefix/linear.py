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


def by_onednn(graph: fx.Graph, root: dict[str, Any]) -> bool:
    """Have the linear layers of a graph computed by oneDNN, where that is faster; whether there are any (docs/speed.md)."""
    if not _is_faster():
        return False
    found = False
    for node in graph.nodes:
        if node.op == "call_module" and _is_plain(layer := root[str(node.target)]):
            root[str(node.target)] = _ByOneDnn(layer)
        elif node.op == "call_function" and node.target in _FUNCTIONS and _is_on_weights(node, root):
            node.target = product
        else:
            continue
        found = True
    return found


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
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
        return product(x, layer.weight, layer.bias)


def _is_faster() -> bool:
    """On AMD's processors in fp32; on Intel's both libraries have the same author, and nothing was measured."""
    libraries: tuple[Any, ...] = (torch.backends.mkl, torch.backends.mkldnn)
    return (
        all(library.is_available() for library in libraries)
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and torch._C._get_mkldnn_enabled()
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
        and not (module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)
        and _are_fit(module.weight, module.bias)
    )


def _is_on_weights(node: fx.Node, root: dict[str, Any]) -> bool:
    """Whether a product is one with weights, and a bias, of the model's."""
    held = [
        root[str(n.target)] if isinstance(n, fx.Node) and n.op == "get_attr" else n for n in node.args[1:]
    ]
    return not node.kwargs and len(held) in (1, 2) and _are_fit(*held)


def _are_fit(weight: Any, bias: Any = None) -> bool:
    """Whether the operator computes with these what torch does: it takes a bias for numbers that lie side by side, one for each row."""
    if not _is_plain_tensor(weight) or weight.ndim != 2 or weight.numel() < _LARGE:
        return False
    return bias is None or bool(
        _is_plain_tensor(bias) and bias.is_contiguous() and bias.shape == weight.shape[:1]
    )


def _is_plain_tensor(tensor: Any) -> bool:
    """Of torch's own classes: what another holds does not lie where a pointer to it says."""
    return bool(
        type(tensor) in (torch.Tensor, nn.Parameter)
        and tensor.dtype is torch.float32
        and tensor.device.type == "cpu"
    )
