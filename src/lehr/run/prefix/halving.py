"""A traced graph and a place in it, made into two: a prefix from inputs to what crosses, a suffix from there to the output.

Both run the person's own modules and parameters. It must not know why the place was chosen.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from lehr.run.prefix.cutting import Place
from lehr.run.prefix.graph_writer import GraphWriter
from lehr.run.prefix.pureness import Purity, read_by, unread_by
from lehr.run.prefix.seen import Seen, Tensor, filled, rebuilt_sequence, tensors_of
from lehr.run.prefix.tracing import Traced
from lehr.run.prefix.walking import SMALL
from lehr.run.untouched import kept_state


@dataclass(frozen=True)
class Parts:
    """What is known of a graph when it is cut: `stilled` are the paths of modules that run in eval mode in it."""

    traced: Traced
    seen: Mapping[fx.Node, Seen]
    found: Purity
    stilled: frozenset[str]

    @property
    def output(self) -> fx.Node:
        """The graph's last node."""
        return self.traced.output


SEEN = "lehr_seen"
"""What a prefix's node was seen to do is in its `meta` under this key."""


@dataclass(frozen=True)
class Prefix:
    """`module` gives the tensors that cross, and then `sizes`, which the suffix computes from the batch size. `written` are
    the numbers of the inputs that it changes in place; `reads` the parameters and buffers that it reads.
    """

    module: fx.GraphModule
    sizes: tuple[Any, ...]
    written: frozenset[int]
    reads: tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Suffix:
    """`module` takes the batch size and what crosses; `written` are the numbers of the features that it changes in place;
    `reads` the parameters and buffers from which constants were computed.
    """

    module: fx.GraphModule
    written: frozenset[int]
    reads: tuple[torch.Tensor, ...]


def halve(parts: Parts, place: Place) -> tuple[Prefix, Suffix]:
    """Prefix and suffix at `place`.

    Raises:
        CannotSplit: where something behind the cut depends on the batch's size in no simple way.
    """
    needed = {
        n for n in parts.seen if n not in place.before and n not in parts.found.free and n.op != "placeholder"
    }
    constant = _constant(parts, needed)
    later = _with_free(parts, needed, constant)
    sizes = _from_batch(parts, place, later)
    return _prefix(parts, place, sizes), _suffix(parts, place, later, (constant, sizes))


def is_size(s: Seen) -> bool:
    """Whether a free value has no tensor in it."""
    return not tensors_of(s.value)


def _constant(parts: Parts, needed: set[fx.Node]) -> frozenset[fx.Node]:
    """The free tensors that are the same for any batch, and as they end before anything else reads them."""
    seen, free = parts.seen, parts.found.free
    number = {node: n for n, node in enumerate(seen)}
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for node, s in seen.items():
        for group in s.reads if node in needed else ():
            first.setdefault(group, number[node])
        last.update(dict.fromkeys(s.writes, number[node]))
    return frozenset(
        n
        for n in free
        if n.op != "get_attr" and seen[n].same and not is_size(seen[n])
        and all(last.get(g, -1) < first.get(g, len(number)) for g in seen[n].groups)
    )  # fmt: skip


def _with_free(parts: Parts, needed: set[fx.Node], constant: frozenset[fx.Node]) -> list[fx.Node]:
    """What the suffix runs, in order: `needed`, the free nodes that it needs, and those that write to memory these use."""
    seen, free = parts.seen, parts.found.free
    writers = [n for n in free if seen[n].writes]
    rest = [a for user in (*needed, parts.output) for a in user.all_input_nodes if a in free]
    added: set[fx.Node] = set()
    while rest:
        node = rest.pop()
        if node in added:
            continue
        added.add(node)
        if node not in constant and not (is_size(seen[node]) and seen[node].same):
            rest += [a for a in read_by(node) if a in free]
            rest += [w for w in writers if seen[w].writes & (seen[node].groups | seen[node].reads)]
    return [n for n in seen if n in needed or n in added]


def _from_batch(parts: Parts, place: Place, later: Sequence[fx.Node]) -> tuple[fx.Node, ...]:
    """The sizes in `later` that the suffix computes from the batch size, for it has not what they are the sizes of."""
    there = {*place.crossing, *later}
    return tuple(
        n
        for n in later
        if n in parts.found.free and is_size(parts.seen[n]) and not parts.seen[n].same
        and not all(a in there for a in n.all_input_nodes)
    )  # fmt: skip


def _prefix(parts: Parts, place: Place, sizes: Sequence[fx.Node]) -> Prefix:
    seen = parts.seen
    writers = [w for w in (*place.before, *parts.found.free) if seen[w].writes]
    needed: set[fx.Node] = set()
    rest: list[fx.Node] = [*place.crossing, *sizes]
    while rest:
        node = rest.pop()
        if node not in needed:
            needed.add(node)
            rest += node.all_input_nodes
            rest += [w for w in writers if seen[w].writes & (seen[node].groups | seen[node].reads)]
    writer = GraphWriter(parts.traced, parts.stilled)
    placeholders = [n for n in seen if n.op == "placeholder"]
    for node in seen:
        if node in needed or node.op == "placeholder":
            writer.copy(node)
            writer.at[node].meta[SEEN] = seen[node]
    leaves = [leaf for n in place.crossing for leaf in _leaves(writer.graph, writer.at[n], seen[n].value)]
    writer.graph.output((tuple(leaves), tuple(writer.at[n] for n in sizes)))
    written = {g for n in needed for g in seen[n].writes}
    return Prefix(
        writer.module(),
        tuple(seen[n].value for n in sizes),
        frozenset(number for number, n in enumerate(placeholders) if seen[n].groups & written),
        state_read(parts.traced, needed),
    )


def _suffix(
    parts: Parts, place: Place, later: Sequence[fx.Node], known: tuple[frozenset[fx.Node], Sequence[fx.Node]]
) -> Suffix:
    seen, (constant, sizes) = parts.seen, known
    writer = GraphWriter(parts.traced, parts.stilled)
    batch = writer.graph.placeholder("batch")
    written, count = set(), 0
    touched = {g for n in later for g in seen[n].writes}
    for node in place.crossing:
        tensors = tensors_of(seen[node].value)
        given = [writer.graph.placeholder(f"feature_{count + n}") for n in range(len(tensors))]
        written |= set(range(count, count + len(given))) if seen[node].groups & touched else set()
        count += len(given)
        rows = (
            writer.graph.call_method("flatten", (f, 0, 1)) if t.fold > 1 else f
            for f, t in zip(given, tensors, strict=True)
        )
        writer.at[node] = _joined(seen[node].value, rows)
    kept = [n for n in later if n in constant]
    values = _values(parts, kept)
    for node in later:
        if node in values:
            writer.put(node, values[node])
        elif node in sizes or (
            node.op != "get_attr" and node in parts.found.free and is_size(seen[node]) and seen[node].same
        ):
            writer.at[node] = writer.made(seen[node].value, batch)
        else:
            gone = first if (first := unread_by(node)) not in writer.at else None
            writer.copy(node, writer.like(gone, seen[gone].value, batch) if gone else None)
    writer.graph.output(fx.node.map_arg(parts.output.args[0], writer.at.__getitem__))
    return Suffix(writer.module(), frozenset(written), state_read(parts.traced, _needed_for(kept)))


def _values(parts: Parts, kept: Sequence[fx.Node]) -> dict[fx.Node, Any]:
    """The values of constant nodes, computed once."""
    needed, free, seen = _needed_for(kept), parts.found.free, parts.seen
    groups = {g for n in needed if n in seen for g in seen[n].groups}
    values: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for node in seen:
            if node not in free or not (node in needed or seen[node].writes & groups):
                continue
            if is_size(seen[node]):
                values[node] = filled(seen[node].value, SMALL)
            else:
                values[node] = run_node(parts.traced, node, {**_unread(parts, node), **values})
    return {node: values[node] for node in kept}


def _unread(parts: Parts, node: fx.Node) -> dict[fx.Node, torch.Tensor]:
    """What stands for the first argument of a node that reads nothing of its values, in a small batch."""
    first = unread_by(node)
    if first is None:
        return {}
    value = parts.seen[first].value
    one = torch.empty((), dtype=value.dtype, device=value.device)
    return {first: one.expand(filled(value.sizes, SMALL))}


def run_node(traced: Traced, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    """What a node gives for these values of its arguments."""
    if node.op == "get_attr":
        return traced.target(node)
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
    if node.op == "call_module":
        return traced.target(node)(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)


def _needed_for(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes and all whose values they depend on."""
    needed: set[fx.Node] = set()
    rest = list(nodes)
    while rest:
        node = rest.pop()
        if node not in needed:
            needed.add(node)
            rest += read_by(node)
    return needed


def state_read(traced: Traced, nodes: Iterable[fx.Node]) -> tuple[torch.Tensor, ...]:
    """The parameters, buffers and tensors in attributes that these nodes read, each once."""
    found: dict[int, torch.Tensor] = {}
    for node in sorted(nodes):
        held = traced.target(node) if node.op in ("get_attr", "call_module") else None
        tensors = (*held.parameters(), *kept_state(held)) if isinstance(held, nn.Module) else (held,)
        found.update({id(t): t for t in tensors if isinstance(t, torch.Tensor)})
    return tuple(found.values())


def _leaves(graph: fx.Graph, node: fx.Node, value: Any) -> list[fx.Node]:
    """The tensors of a node as they cross: a row for each sample."""
    if isinstance(value, Tensor):
        return [graph.call_method("unflatten", (node, 0, (-1, value.fold))) if value.fold > 1 else node]
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, (tuple, list))
        else ()
    )
    return [
        leaf
        for key, part in items
        if part is not None
        for leaf in _leaves(graph, graph.call_function(operator.getitem, (node, key)), part)
    ]


def _joined(value: Any, leaves: Iterator[fx.Node]) -> Any:
    """A value of a node's form, made of what crosses."""
    if isinstance(value, Tensor):
        return next(leaves)
    if isinstance(value, dict):
        return {key: _joined(part, leaves) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        return rebuilt_sequence(value, [_joined(part, leaves) for part in value])
    return value
