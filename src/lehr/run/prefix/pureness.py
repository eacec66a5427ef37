"""Which nodes of a graph give the same for a sample in each epoch, and why the others do not.

A node is pure where nothing before it trains, draws random numbers, looks at other samples of the batch, or reads a state
that a forward pass changes. It is free where, besides, it depends on the sizes of the inputs alone. It must not know cuts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx, nn

from lehr.run.prefix.seen import Seen, Tensor
from lehr.run.prefix.tracing import Traced

Kind = Literal["trained", "random", "batch", "state"]
_SIZES = frozenset({"size", "dim", "ndimension", "numel", "nelement", "stride", "is_floating_point", "is_complex",
                    "get_device", "element_size", "is_contiguous", "sym_size", "sym_numel", "sym_stride",
                    "sym_storage_offset", "len"})  # fmt: skip
_ATTRIBUTES = frozenset(
    {"shape", "ndim", "dtype", "device", "layout", "is_cuda", "itemsize", "requires_grad"}
)
_LIKE = frozenset({"new_zeros", "new_ones", "new_full", "new_empty", "new_tensor", "zeros_like", "ones_like", "full_like",
                   "empty_like"})  # fmt: skip
_TRAINING = 5  # the place of `training` among the arguments of torch.nn.functional's batch_norm and of ATen's


@dataclass(frozen=True)
class Source:
    """Where something impure begins: the node, and what it does."""

    node: fx.Node
    kind: Kind


@dataclass(frozen=True)
class Purity:
    """The nodes of a graph in order: `pure` ones that depend on a sample's values, `free` ones that do not, and the others
    (`impure`); the `sources` of what is impure; those that use what trains (`training`), whatever comes before them.
    """

    pure: tuple[fx.Node, ...]
    free: frozenset[fx.Node]
    impure: frozenset[fx.Node]
    sources: tuple[Source, ...]
    training: frozenset[fx.Node]


def purity(traced: Traced, seen: Mapping[fx.Node, Seen], trained_groups: frozenset[int]) -> Purity:
    """What is pure in a graph, where the memory of `trained_groups` holds what trains."""
    nodes = list(seen)
    by_values = _by_values(nodes)
    impure: set[fx.Node] = set()
    sources: list[Source] = []
    training: set[fx.Node] = set()
    moving = {group for s in seen.values() for group in s.writes if group < 0}
    unsteady = set(trained_groups) | moving
    read_by_impure: set[int] = set()
    for node in nodes:
        s = seen[node]
        kind = _kind(traced, node, s, trained_groups, moving, by_values)
        inherits = any(a in impure for a in node.all_input_nodes) or bool((s.reads | s.groups) & unsteady)
        if kind == "trained":
            training.add(node)
        if kind and not any(a in impure for a in node.all_input_nodes):
            sources.append(Source(node, kind))
        if kind or inherits or s.writes & read_by_impure:
            impure.add(node)
            unsteady |= s.writes
            read_by_impure |= s.reads
    free = _free([n for n in nodes if n not in impure and n not in by_values], seen)
    pure = tuple(n for n in nodes if n not in impure and n not in free)
    return Purity(pure, free, frozenset(impure), tuple(sources), frozenset(training))


def is_about_sizes(node: fx.Node) -> bool:
    """Whether a node reads nothing of its first argument's values."""
    name = operator_name(node)
    if not node.args:
        return False
    if name == "getattr":
        return len(node.args) > 1 and node.args[1] in _ATTRIBUTES
    return name in _SIZES or name in _LIKE


def read_by(node: fx.Node) -> list[fx.Node]:
    """The nodes whose values a node reads."""
    if not is_about_sizes(node):
        return node.all_input_nodes
    found: list[fx.Node] = []
    fx.node.map_arg((node.args[1:], node.kwargs), found.append)
    return found


def unread_by(node: fx.Node) -> fx.Node | None:
    """The first argument of a node that reads nothing of its values."""
    first = node.args[0] if is_about_sizes(node) else None
    return first if isinstance(first, fx.Node) else None


def operator_name(node: fx.Node) -> str:
    """What a node calls: "add", "size", "batch_norm"."""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target._schema.name).split("::")[-1]
    return target if isinstance(target, str) else str(getattr(target, "__name__", target))


def crossable(value: Any) -> bool:
    """Whether a value that depends on samples can be kept for each of them."""
    if isinstance(value, Tensor):
        return value.fold > 0
    if isinstance(value, dict):
        return all(map(crossable, value.values()))
    if isinstance(value, (tuple, list)):
        return all(map(crossable, value))
    return value is None


def _kind(
    traced: Traced, node: fx.Node, s: Seen, trained: frozenset[int], moving: set[int], by_values: frozenset[fx.Node]
) -> Kind | None:  # fmt: skip
    if (s.reads | s.groups) & trained:
        return "trained"
    if s.draws or any(isinstance(a, torch.Generator) for a in (*node.args, *node.kwargs.values())):
        return "random"
    if node in by_values and (s.mixes or _is_batch_norm(traced, node)):
        return "batch"
    if (s.reads | s.groups) & moving or any(group < 0 for group in s.writes):
        return "state"
    return None


def _is_batch_norm(traced: Traced, node: fx.Node) -> bool:
    """Whether a node normalises by the batch that it sees."""
    if node.op == "call_module":
        module = traced.target(node)
        return isinstance(module, nn.modules.batchnorm._BatchNorm) and (
            module.training or module.running_mean is None
        )
    if node.op != "call_function" or operator_name(node) != "batch_norm":
        return False
    return bool(node.kwargs.get("training", node.args[_TRAINING] if len(node.args) > _TRAINING else False))


def _by_values(nodes: list[fx.Node]) -> frozenset[fx.Node]:
    """The nodes that depend on what is in the inputs, and not on their sizes alone."""
    found: set[fx.Node] = set()
    for node in nodes:
        if node.op == "placeholder" or any(a in found for a in read_by(node)):
            found.add(node)
    return frozenset(found)


def _free(candidates: list[fx.Node], seen: Mapping[fx.Node, Seen]) -> frozenset[fx.Node]:
    """Those of the candidates that can be run again from sizes: nothing else writes to the memory that they use."""
    free = set(candidates)
    while True:
        written = {g for node, s in seen.items() if node not in free for g in s.writes}
        gone = {n for n in free if (_memory(n, seen) & written) or any(a not in free for a in read_by(n))}
        if not gone:
            return frozenset(free)
        free -= gone


def _memory(node: fx.Node, seen: Mapping[fx.Node, Seen]) -> frozenset[int]:
    return seen[node].groups | (frozenset() if is_about_sizes(node) else seen[node].reads)


def below(node: fx.Node) -> Iterator[fx.Node]:
    """All nodes that depend on `node`, each once."""
    known: set[fx.Node] = set()
    rest = list(node.users)
    while rest:
        user = rest.pop()
        if user not in known:
            known.add(user)
            yield user
            rest.extend(user.users)
