"""From a model and one call of it to a graph of what it computes: torch.fx first, torch.export second.

The graph's inputs are the tensors of the call, in order; its output is a tuple of the leaves of what the model returns.
It must not know cuts. The model is afterwards as before, and nothing is printed.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torchvision
from torch import fx, nn
from torch.utils import _pytree as pytree

from lehr.run.prefix.cuts import CannotSplit, CannotTrace
from lehr.run.prefix.forms import PLAIN, Form
from lehr.run.randomness import Randomness
from lehr.run.structure import clean
from lehr.run.untouched import (
    Mark,
    attributes_kept,
    kept_state,
    quiet,
    same_random,
    state_kept,
    without_caches,
    without_compiling,
)

Route = Literal["fx", "export"]
_OWN = "model"
_TORCHVISION = ("DeformConv2d", "FrozenBatchNorm2d", "MultiScaleRoIAlign", "PSRoIAlign", "PSRoIPool",
                "RoIAlign", "RoIPool", "StochasticDepth", "DropBlock2d", "DropBlock3d")  # fmt: skip
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.TransformerEncoder, nn.TransformerDecoder)


@dataclass(frozen=True)
class Traced:
    """What a model computes. `spec` is the tree of its output, whose leaves are the graph's output in order; `owner` holds
    what the graph's targets name; `path` says in which modules a node lies, outermost first.
    """

    graph: fx.Graph
    owner: nn.Module
    form: Form
    spec: pytree.TreeSpec
    route: Route

    @property
    def output(self) -> fx.Node:
        """The graph's last node."""
        found: fx.Node = next(node for node in self.graph.nodes if node.op == "output")
        return found

    def target(self, node: fx.Node) -> Any:
        """What a get_attr or call_module node names."""
        found: Any = self.owner
        for step in str(node.target).split("."):
            found = getattr(found, step)
        return found

    def path(self, node: fx.Node) -> tuple[str, ...]:
        """The modules that `node` lies in, as paths of the person's model, outermost first; without the model itself."""
        stack = [str(value[0]) for value in (node.meta.get("nn_module_stack") or {}).values()]
        if node.op == "call_module":
            stack.append(str(node.target))
        return tuple(dict.fromkeys(filter(None, map(own_path, stack))))


def own_path(name: str) -> str:
    """A name in the graph as a path in the person's model; "" for the model itself."""
    name = clean(name.replace("L['self'].", "").replace("L['self']", ""))
    return "" if name == _OWN else name.removeprefix(f"{_OWN}.")


def trace(model: nn.Module, form: Form, tensors: Sequence[torch.Tensor], route: Route) -> Traced:
    """The graph of `model` in the mode it is in, for calls of this form.

    Raises:
        CannotSplit: where it cannot be traced this way.
    """
    root = _Flat(model, form)
    randomness = Randomness(tensors[0].device)
    before, marks = randomness.take(), [Mark(t, copied=True) for t in kept_state(model)]
    with (
        quiet(), state_kept(model, tensors[0].device), attributes_kept(model) as held, without_compiling(model),
        torch.no_grad(),
    ):  # fmt: skip
        try:
            traced = (_by_fx if route == "fx" else _by_export)(root, tensors)
        except CannotSplit:
            raise
        except Exception as error:
            in_ = f" in {root.returned.failed}" if root.returned.failed else ""
            raise CannotTrace(
                f"the model cannot be traced{in_} ({_reason(error)}); a branch on the values of a tensor, for example, has no "
                "fixed graph"
            ) from error
        draws = not same_random(before, randomness.take())
        moves = any(mark.is_changed() for mark in marks)
    if draws:
        raise CannotSplit(
            "the model's forward draws random numbers of its own (in Python, or to decide what to do), so it is another one "
            "each time; put the layers that do it in eval mode"
        )
    if moves:
        raise CannotSplit(
            "the model's forward changes a tensor of its own that is no buffer; make it a buffer"
        )
    if name := next((name for name, values in held if any(map(_is_of_inputs, values))), None):
        raise CannotSplit(
            f"the model keeps tensors of a forward pass in its attribute {name}; return them instead, for a prefix "
            "that is not run keeps none"
        )
    return traced


class _Returned:
    """The form of what the model returned. No dict: torch.export would put what is in it back."""

    spec: pytree.TreeSpec
    plain: list[Any]
    computed: list[bool]
    failed = ""


class _Flat(nn.Module):
    """The model as a function from tensors to the tuple of its output's leaves."""

    def __init__(self, model: nn.Module, form: Form) -> None:
        super().__init__()
        self.model = model
        self.form = form
        self.returned = _Returned()

    def forward(self, *tensors: Any) -> Any:
        """Calls the model; what is no tensor in its output is set aside."""
        args, kwargs = self.form.call(tensors)
        leaves, spec = pytree.tree_flatten(self.model(*args, **kwargs))
        for leaf in leaves:
            if not isinstance(leaf, (*PLAIN, torch.Tensor, fx.Proxy, torch.SymInt)):
                raise TypeError(f"it returns a {type(leaf).__name__}")
        computed = [_is_computed(leaf) for leaf in leaves]
        plain = [None if c else leaf for leaf, c in zip(leaves, computed, strict=True)]
        self.returned.spec, self.returned.plain, self.returned.computed = spec, plain, computed
        return tuple(leaf for leaf in leaves if _is_computed(leaf))


def _is_computed(leaf: Any) -> bool:
    return isinstance(leaf, (torch.Tensor, fx.Proxy, torch.SymInt))


class _Tracer(fx.Tracer):
    """torch.fx's tracer with the leaves of torchvision and timm, and one placeholder for each tensor."""

    proxy_buffer_attributes = True

    def __init__(
        self,
        tensors: Sequence[torch.Tensor],
        leaves: tuple[type, ...],
        functions: tuple[Callable[..., Any], ...],
    ) -> None:
        searched: Any = (math, torchvision.ops)
        super().__init__(autowrap_modules=searched, autowrap_functions=functions)
        self.count, self.leaves, self.failed = len(tensors), leaves, ""
        self.device, self.switches = tensors[0].device.type, False
        self.began = self._autocast()

    def _autocast(self) -> torch.dtype | None:
        """The type that autocast computes in here."""
        return torch.get_autocast_dtype(self.device) if torch.is_autocast_enabled(self.device) else None

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Notices where autocast is another than outside the model: the graph would not know."""
        self.switches = self.switches or self._autocast() != self.began
        return super().create_node(*args, **kwargs)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:  # noqa: ARG002
        """The wrapper, and a placeholder for each of its tensors."""
        made = [self.create_proxy("placeholder", f"input_{n}", (), {}) for n in range(self.count)]
        return root_fn, [self.root, *made]

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """Remembers in which module tracing failed, the innermost one."""
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed = self.failed or own_path(self.path_of_module(m))
            raise

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """What is called as a whole."""
        if isinstance(m, _CONTAINERS):
            return False
        return isinstance(m, self.leaves) or super().is_leaf_module(m, module_qualified_name)


def _by_fx(root: _Flat, tensors: Sequence[torch.Tensor]) -> Traced:
    leaves, functions = _notraced()
    ops = tuple(getattr(torchvision.ops, name) for name in _TORCHVISION if hasattr(torchvision.ops, name))
    tracer = _Tracer(tensors, (*ops, *leaves), functions)
    try:
        graph = tracer.trace(root)
    finally:
        root.returned.failed = tracer.failed
    if tracer.switches:
        raise CannotSplit(
            "the model's forward switches autocast on or off by itself, which no graph of it tells"
        )
    return _finished(graph, root, root, "fx")


def _notraced() -> tuple[tuple[type, ...], tuple[Callable[..., Any], ...]]:
    """What timm says that fx cannot look into; where timm is not loaded, nothing of it is in the model."""
    models: Any = sys.modules.get("timm.models")
    if models is None:
        return (), ()
    return tuple(models.get_notrace_modules()), tuple(models.get_notrace_functions())


def _by_export(root: _Flat, tensors: Sequence[torch.Tensor]) -> Traced:
    batch = torch.export.Dim.AUTO
    shapes = ({0: batch},) * len(tensors)
    with without_caches(root.model), _without_autocast(tensors):
        program = torch.export.export(root, tuple(tensors), dynamic_shapes=(shapes,), strict=False)
    unguarded = (
        {"check_guards": False} if "check_guards" in inspect.signature(program.module).parameters else {}
    )
    module = program.module(**unguarded)
    for part in module.children():
        if isinstance(part, fx.GraphModule):  # what is computed where the model has switched autocast off
            _without_assertions(part.graph)
            part.recompile()
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    graph.graph_copy(module.graph, copied)
    output = next(node for node in module.graph.nodes if node.op == "output")
    graph.output(fx.node.map_arg(output.args[0], copied.__getitem__))
    _swap_in(module, root)
    return _finished(graph, module, root, "export")


def _swap_in(module: nn.Module, root: _Flat) -> None:
    """The person's own parameters and buffers where the exported module has them under their names."""
    for name, tensor in (
        *root.named_parameters(remove_duplicate=False),
        *root.named_buffers(remove_duplicate=False),
    ):
        *steps, last = name.split(".")
        holder: Any = module
        for step in steps:
            holder = getattr(holder, step, None)
        if holder is not None and isinstance(getattr(holder, last, None), torch.Tensor):
            (holder._parameters if isinstance(tensor, nn.Parameter) else holder._buffers)[last] = tensor


def _finished(graph: fx.Graph, owner: nn.Module, root: _Flat, route: Route) -> Traced:
    returned = root.returned
    _without_assertions(graph)
    output = next(node for node in graph.nodes if node.op == "output")
    computed = iter(output.args[0])
    output.args = (
        tuple(next(computed) if c else p for p, c in zip(returned.plain, returned.computed, strict=True)),
    )
    return Traced(graph, owner, root.form, returned.spec, route)


def _without_assertions(graph: fx.Graph) -> None:
    """They would be of no use to the suffix, and some are about types that autocast changes."""
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op == "call_function" and "assert" in getattr(node.target, "__name__", ""):
            graph.erase_node(node)


def _is_of_inputs(held: Any) -> bool:
    """Whether something depends on the inputs, as far as it can be told: what a module computes from its weights alone it
    may put away as it likes.
    """
    if not isinstance(held, fx.Proxy):
        return True
    rest, known = [held.node], set()
    while rest:
        node = rest.pop()
        if node.op == "placeholder":
            return True
        rest += [a for a in node.all_input_nodes if a not in known]
        known |= set(node.all_input_nodes)
    return False


def _without_autocast(tensors: Sequence[torch.Tensor]) -> contextlib.AbstractContextManager[object]:
    """A graph is written down in the types of its inputs; autocast works where it is run."""
    return torch.autocast(tensors[0].device.type, enabled=False)


def _reason(error: BaseException) -> str:
    """The kind of an error and the first line of what it says, cut short."""
    lines = str(error).strip().splitlines() or [""]
    first = lines[0] if len(lines[0]) <= 120 else f"{lines[0][:117]}..."
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
