"""Nodes of a traced graph copied into a new one, which calls the person's own modules and reads their own parameters.

It must not know which nodes, or why.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from lehr.run.prefix.cuts import CannotSplit
from lehr.run.prefix.seen import Affine, Sizes, Tensor, Unclear, rebuilt_sequence
from lehr.run.prefix.tracing import Traced, own_path


class Still(nn.Module):
    """Calls a module in eval mode, whatever mode it is in."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._held = (module,)  # not registered: nobody's train() is to reach it through here

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module gives in eval mode."""
        (module,) = self._held
        modes = [(inner, inner.training) for inner in module.modules()]
        for inner, _ in modes:
            inner.training = False
        try:
            return module(*args, **kwargs)
        finally:
            for inner, mode in modes:
                inner.training = mode


class GraphWriter:
    """A new `graph`, and `at` which of its nodes those of the traced graph are. Modules and tensors are attributes of a root
    of its own under flat names, so nothing is set on the person's modules.
    """

    def __init__(self, traced: Traced, stilled: frozenset[str]) -> None:
        self.graph = fx.Graph()
        self.at: dict[fx.Node, Any] = {}
        self.named: dict[str, str] = {}
        self._traced, self._stilled = traced, stilled
        self._root: dict[str, Any] = {}
        self._made: list[fx.Node] = []

    def copy(self, node: fx.Node, first: Any = None) -> None:
        """Write down a node, with its arguments as they are known here; `first` stands for the first of them."""
        args = fx.node.map_arg(node.args if first is None else node.args[1:], self.at.__getitem__)
        args = args if first is None else (first, *args)
        kwargs = fx.node.map_arg(dict(node.kwargs), self.at.__getitem__)
        if node.op in ("get_attr", "call_module"):
            value, target = self._traced.target(node), str(node.target)
            if node.op == "call_module" and own_path(target) in self._stilled:
                value = Still(value)
            self.at[node] = self.graph.create_node(
                node.op, self._hold(target, value), args, kwargs, name=node.name
            )
        else:
            self.at[node] = self.graph.create_node(node.op, node.target, args, kwargs, name=node.name)

    def put(self, node: fx.Node, value: Any) -> None:
        """Stand for a node with a value: a tensor, or tuples, lists and dicts of them."""
        self.at[node] = self._kept(node.name, value)

    def made(self, value: Any, batch: fx.Node) -> Any:
        """A value as `walking` saw it, computed from the batch size.

        Raises:
            CannotSplit: where it cannot be.
        """
        if isinstance(value, Affine):
            scaled = self._call(operator.mul, batch, value.slope)
            return self._call(operator.add, scaled, value.offset) if value.offset else scaled
        if isinstance(value, slice):
            return slice(*(self.made(part, batch) for part in (value.start, value.stop, value.step)))
        if isinstance(value, dict):
            return {key: self.made(part, batch) for key, part in value.items()}
        if isinstance(value, (tuple, list)):
            parts = rebuilt_sequence(value, [self.made(part, batch) for part in value])
            return self._call(torch.Size, parts) if isinstance(value, Sizes) else parts
        if isinstance(value, (Unclear, Tensor)):
            raise CannotSplit(
                "a size that is needed behind the cut does not grow with the batch in a simple way"
            )
        return value

    def like(self, node: fx.Node, value: Tensor, batch: fx.Node) -> fx.Node:
        """A tensor with the sizes, type and device of a node's value, and no values of its own; it takes no memory.

        Raises:
            CannotSplit: where its sizes cannot be computed.
        """
        one = self._kept(node.name, torch.empty((), dtype=value.dtype, device=value.device))
        return self.graph.call_method("expand", (one, self.made(value.sizes, batch)))

    def module(self) -> fx.GraphModule:
        """What was written, ready to run; without sizes that turned out to be of no use."""
        for node in reversed(self._made):
            if not node.users:
                self.graph.erase_node(node)
        self.graph.lint()
        return fx.GraphModule(self._root, self.graph)

    def _kept(self, name: str, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self.graph.create_node("get_attr", self._hold(f"constant {name}", value))
        if isinstance(value, dict):
            return {key: self._kept(f"{name}.{key}", part) for key, part in value.items()}
        if isinstance(value, (tuple, list)):
            return rebuilt_sequence(value, [self._kept(f"{name}.{n}", part) for n, part in enumerate(value)])
        return value

    def _hold(self, target: str, value: Any) -> str:
        """The flat name under which `value` is an attribute of the root."""
        if target not in self.named:
            name = f"{'module' if isinstance(value, nn.Module) else 'tensor'}_{len(self.named)}"
            self.named[target], self._root[name] = name, value
        return self.named[target]

    def _call(self, function: Callable[..., Any], *args: Any) -> fx.Node:
        node = self.graph.call_function(function, args)
        self._made.append(node)
        return node
