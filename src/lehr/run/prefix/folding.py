"""A prefix made faster for its one pass over the data: batch-norm folded into convolutions, images laid out channels last,
linear layers by oneDNN.

It computes the same up to rounding. The model's own modules stay as they are; weights are copied where they are folded or
laid out anew, and folded only where that spares a pass over more than it copies. It must not know how a prefix was found.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from lehr.run.prefix.halving import SEEN, Prefix
from lehr.run.prefix.linear import by_onednn
from lehr.run.prefix.seen import filled, tensors_of

_LARGE, _SHARE = 100_000, 0.1
"""Weights in convolutions, and their share of the prefix's, below which neither is worth a copy: a transformer's patches, or
ConvNeXt's few convolutions by channel (8 images through convnext_tiny: 1.21 s so, 1.12 s as they are; one thread, best of 5).
"""
_IMAGES = 4
"""A convolution is folded if its weights are no more than its output for so many images. The copies of all are then small
beside a batch, and a norm behind small maps costs little (resnet18, which lies channels last: 3 of 45 MB of weights are copied).
"""
_PIECE = 8 << 20
"""Bytes, for each thread, of the largest tensor of a piece of a batch on a CPU, so that what a pass needs does not grow with the
batch. 8 images of 224 px before a head, one thread, MiB at once and so: resnet18 53 and 26, mobilenet_v3_large 48 and 19, resnet50 145
and 52, convnext_tiny 120 and 42, vit_small 33 and 20; in 1.1, 1.02, 0.99, 0.80 and 0.80 of the time (median of 7). A GPU wants all of it.
"""


def piece_of(first: Prefix) -> int:
    """How many samples the prefix takes at a time, at most; 0: all."""
    values = [node.meta[SEEN].value for node in first.module.graph.nodes if SEEN in node.meta]
    made = [t for value in values for t in tensors_of(value) if t.fold]
    if any(t.device.type != "cpu" for t in made):
        return 0
    largest = max((t.fold * math.prod(t.shape) * t.dtype.itemsize for t in made), default=0)
    return -(-_PIECE * torch.get_num_threads() // max(1, largest))


def faster(first: Prefix) -> Prefix | None:
    """The faster prefix; None where there is nothing to gain.

    >>> faster(Prefix(fx.GraphModule({}, fx.Graph()), (), frozenset(), ())) is None
    True
    """
    if first.written:
        return None
    graph = fx.Graph()
    graph.output(graph.graph_copy(first.module.graph, copied := {}))  # type: ignore[var-annotated]
    root = {str(n.target): _held(first.module, n) for n in copied if n.op in ("get_attr", "call_module")}
    if not (_with_faster_convolutions(graph, root) | by_onednn(graph, root)):
        return None
    graph.lint()
    return replace(first, module=fx.GraphModule(root, graph))


def _with_faster_convolutions(graph: fx.Graph, root: dict[str, Any]) -> bool:
    """Fold and lay out the convolutions of a graph, if there are many; whether anything has changed."""
    modules: list[Any] = [module for module in root.values() if isinstance(module, nn.Module)]
    convolutions = [m for m in modules if _is_convolution(m)]
    size = sum(m.weight.numel() for m in convolutions)
    if size < max(_LARGE, _SHARE * sum(p.numel() for m in modules for p in m.parameters())):
        return False
    laid = all(_is_laid_out(m.weight) for m in convolutions if m.weight.shape[2:] != (1, 1))
    lays_out = _lays_out(convolutions)
    if not _fold(graph, root) and (laid or not lays_out):
        return False
    if lays_out:
        _lay_out(graph, root, keep=laid)
    return True


def _fold(graph: fx.Graph, root: dict[str, Any]) -> int:
    """Each batch-norm into the convolution whose output nothing else reads, where that spares time; how many there were."""
    count = 0
    for node in list(graph.nodes):
        before = (
            node.args[0] if node.op == "call_module" and len(node.args) == 1 and not node.kwargs else None
        )
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) > 1:
            continue
        convolution, norm = root[str(before.target)], root[str(node.target)]
        if not (_is_convolution(convolution) and _is_still_norm(norm) and _spares(before, convolution)):
            continue
        count += 1
        name = f"folded_{len(root)}"
        root[name] = _with_weights(
            convolution,
            *fuse_conv_bn_weights(
                convolution.weight.double(), _double(convolution.bias), norm.running_mean.double(),
                norm.running_var.double(), norm.eps, _double(norm.weight), _double(norm.bias),
            ),
        )  # fmt: skip
        before.target = name
        rest = _after_norm(norm)
        if rest is None:
            node.replace_all_uses_with(before)
            graph.erase_node(node)
        else:
            node.target = f"rest_{len(root)}"
            root[node.target] = rest
    return count


def _spares(node: fx.Node, convolution: nn.Conv2d) -> bool:
    """Whether the norm's pass over a batch is larger than a copy of the convolution's weights."""
    (out,) = tensors_of(node.meta[SEEN].value)
    return bool(convolution.weight.numel() <= math.prod(filled(out.sizes, _IMAGES)))


def _lay_out(graph: fx.Graph, root: dict[str, Any], *, keep: bool) -> None:
    """Convolutions and their pictures channels last. What leaves is as it was, unless the model's weights lie so too (`keep`)."""
    laid = {name: _laid_out(module) for name, module in root.items() if _is_convolution(module)}
    root.update(laid)
    for node in [n for n in graph.nodes if n.op == "placeholder"]:
        users = [u for u in node.users if u.op == "call_module" and str(u.target) in laid]
        with graph.inserting_after(node):
            turned = (
                graph.call_method("contiguous", (node,), {"memory_format": torch.channels_last})
                if users
                else None
            )
        for user in users if turned else ():
            user.replace_input_with(node, turned)
    if keep:
        return
    output = next(n for n in graph.nodes if n.op == "output")
    features, sizes = output.args[0]
    with graph.inserting_before(output):
        output.args = ((tuple(graph.call_method("contiguous", (feature,)) for feature in features), sizes),)


def _lays_out(convolutions: list[Any]) -> bool:
    """Whether kernels for channels last are faster: in fp32 on a CPU, and in half precision on CUDA (see docs/speed.md)."""
    weight = convolutions[0].weight
    if weight.device.type == "cpu":
        return bool(weight.dtype is torch.float32 and not torch.is_autocast_enabled("cpu"))
    return bool(weight.is_cuda and (weight.dtype.itemsize == 2 or torch.is_autocast_enabled("cuda")))


def _is_convolution(module: Any) -> bool:
    """A convolution whose output is linear in its weights, and that nothing else looks at."""
    return (
        type(module) is nn.Conv2d
        and not (module._forward_hooks or module._forward_pre_hooks)
        and type(module.weight) is nn.Parameter
    )


def _is_still_norm(module: Any) -> bool:
    """A batch-norm that normalises by what it has gathered: torch's, or timm's with an activation behind."""
    return (
        (type(module) is nn.BatchNorm2d or _is_with_activation(module))
        and not module.training
        and module.running_mean is not None
        and not (module._forward_hooks or module._forward_pre_hooks)
    )


def _is_with_activation(module: Any) -> bool:
    return type(module).__name__ == "BatchNormAct2d" and type(module).__module__ == "timm.layers.norm_act"


def _after_norm(module: Any) -> nn.Module | None:
    """What timm's batch-norm does besides. It is held, not registered: nobody's train() is to reach it through here."""
    return _Held(module.drop, module.act) if _is_with_activation(module) else None


class _Held(nn.Module):
    """Modules of the person's, one after the other."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self._held = modules

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What they make of `x`."""
        for module in self._held:
            x = module(x)
        return x


def _with_weights(module: Any, weight: torch.Tensor, bias: torch.Tensor) -> nn.Conv2d:
    like = module.weight
    return _copied(module, {"weight": weight.to(like.dtype), "bias": bias.to(like.dtype)})


def _laid_out(module: Any) -> Any:
    if _is_laid_out(module.weight):
        return module
    weight = module.weight.detach().to(memory_format=torch.channels_last, copy=True)
    return _copied(module, {"weight": weight, "bias": module.bias})


def _is_laid_out(weight: torch.Tensor) -> bool:
    return weight.is_contiguous(memory_format=torch.channels_last)


def _copied(module: nn.Conv2d, tensors: dict[str, torch.Tensor | None]) -> nn.Conv2d:
    """A convolution like `module` with other weights, in the mode that does not matter to it."""
    copy = nn.Conv2d(
        module.in_channels, module.out_channels, module.kernel_size, module.stride, module.padding, module.dilation,  # type: ignore[arg-type]
        module.groups, padding_mode=module.padding_mode, bias=False, device="meta",
    )  # fmt: skip
    for name, tensor in tensors.items():
        held = (
            tensor
            if tensor is None or isinstance(tensor, nn.Parameter)
            else nn.Parameter(tensor, requires_grad=False)
        )
        copy.register_parameter(name, held)
    return copy


def _double(tensor: torch.Tensor | None) -> Any:
    return None if tensor is None else tensor.detach().double()


def _held(module: fx.GraphModule, node: fx.Node) -> Any:
    return getattr(module, str(node.target))
