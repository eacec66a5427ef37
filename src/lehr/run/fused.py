"""Which optimizers take torch's fused kernels, and what keeps those right. It must not know plans or stages.

A fused kernel updates a parameter in one pass over memory in place of five to fifteen. torch's choice on a CPU is a loop
over single operations; measured here, AdamW over the weights of a resnet18 takes 25 ms fused and 186 ms so (docs/speed.md).
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

_FUSED = {"cpu": ("Adam", "AdamW", "SGD", "Adagrad"), "cuda": ("Adam", "AdamW", "SGD")}
_DTYPES = (torch.float32, torch.float64)
_SAID = ("fused", "foreach", "differentiable", "capturable")
"""Settings by which a person has chosen a way of computing."""


def fused_setting(
    cls: type[torch.optim.Optimizer],
    settings: Mapping[str, Any],
    parameters: Iterable[torch.Tensor],
    model: nn.Module,
) -> dict[str, bool]:
    """`{"fused": True}` where torch has such a kernel of `cls`, it is faster, and it is right; else nothing.

    Not where `settings` choose a way already (`fused = false` turns this off), for SGD without momentum (one operation, in
    which there is nothing to fuse), for numbers other than float32 and float64, on devices other than one CPU or CUDA, for
    weights in odd layouts, nor where embeddings have sparse gradients, which the kernels refuse.

    Example:
        >>> net = nn.Linear(4, 2)
        >>> fused_setting(torch.optim.AdamW, {}, net.parameters(), net)
        {'fused': True}
        >>> fused_setting(torch.optim.AdamW, {"fused": False}, net.parameters(), net)
        {}
    """
    if (
        any(settings.get(key) is not None for key in _SAID)
        or "fused" not in inspect.signature(cls).parameters
    ):
        return {}
    if cls.__name__ == "SGD" and not settings.get("momentum"):
        return {}
    found = list(parameters)
    devices = {parameter.device for parameter in found}
    if len(devices) != 1 or cls.__name__ not in _FUSED.get(devices.pop().type, ()):
        return {}
    usable = all(parameter.dtype in _DTYPES and _is_plain(parameter) for parameter in found)
    is_sparse = any(getattr(module, "sparse", False) is True for module in model.modules())
    return {"fused": True} if usable and not is_sparse else {}


def keep_right(optimizer: torch.optim.Optimizer) -> None:
    """Mends three things that torch (2.14) does not look after in an optimizer with fused kernels.

    The kernels on a CPU go by addresses: a gradient, or a momentum from before the weights were laid out anew, in another
    order of memory gives wrong weights without a word. So before each step these are laid out as their parameter is.
    Of weights that lie channels last they make a copy first, which takes longer than the rest; so Adam's and AdamW's kernels
    are shown the same memory as what it is to them, one number after the other.
    And where a `GradScaler` refuses the first update, SGD keeps a momentum that nobody has written: it may not be asked.
    """
    if type(optimizer).__name__ == "SGD":
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]  # the scaler asks for it
    images = [p for group in optimizer.param_groups for p in group["params"] if p.ndim in (4, 5)]
    if not images:  # only such have more than one layout
        return

    def align(optimizer: torch.optim.Optimizer, *_: object) -> None:
        state = optimizer.state
        for parameter in images:
            strides = parameter.stride()
            gradient = parameter.grad
            if gradient is None:
                continue
            if gradient.stride() != strides:
                parameter.grad = _laid_out(gradient, parameter)
            kept: dict[str, Any] = state.get(parameter) or {}
            for key, value in kept.items():
                if isinstance(value, torch.Tensor) and value.ndim and value.stride() != strides:
                    kept[key] = _laid_out(value, parameter)

    optimizer.register_step_pre_hook(align)
    if type(optimizer) in (torch.optim.Adam, torch.optim.AdamW) and images[0].device.type == "cpu":
        _show_in_order(optimizer)


def _show_in_order(optimizer: Any) -> None:
    """Hand the kernels channels-last tensors as contiguous views of the same memory: an update number by number is the same.

    It stands in for a method of torch's own (seen in 2.6 and 2.14). What that fills are lists; AdamW of 2.6 gives it a flag, too.
    Not for SGD and Adagrad: what they do with these lists afterwards goes by the weights.
    """
    gather = type(optimizer)._init_group
    held = weakref.ref(optimizer)  # held by itself it would outlive its run

    def in_order(group: dict[str, Any], *given: Any) -> Any:
        found = gather(held(), group, *given)
        for tensors in given:
            if isinstance(tensors, list):
                tensors[:] = map(_in_order, tensors)
        return found

    optimizer._init_group = in_order


def _in_order(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.ndim not in (4, 5) or tensor.is_contiguous():
        return tensor
    turned = tensor.detach().movedim(1, -1)
    return turned if turned.is_contiguous() else tensor


def _laid_out(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`value` in the layout of `like`; itself where it has another shape, or the order of memory is the same."""
    sides = zip(value.shape, value.stride(), like.stride(), strict=False)
    if value.shape != like.shape or all(size == 1 or one == other for size, one, other in sides):
        return value
    return torch.empty_like(like, dtype=value.dtype, requires_grad=False).copy_(value)


def _is_plain(parameter: torch.Tensor) -> bool:
    """Whether a weight fills its memory without gaps, in one of the usual orders."""
    return (
        type(parameter) in (nn.Parameter, torch.Tensor)
        and parameter.layout is torch.strided
        and (
            parameter.is_contiguous()
            or (parameter.ndim == 4 and parameter.is_contiguous(memory_format=torch.channels_last))
            or (parameter.ndim == 5 and parameter.is_contiguous(memory_format=torch.channels_last_3d))
        )
    )
