"""The places where a graph can be cut, by a linear scan over what is pure in it. It must not know how a cut is carried out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import inf, prod
from typing import Any

from torch import fx

from lehr.run.prefix.cuts import Crossing, Cut
from lehr.run.prefix.pureness import Purity, below, crossable, is_about_sizes
from lehr.run.prefix.seen import Seen, tensors_of
from lehr.run.prefix.tracing import Traced, own_path


@dataclass(frozen=True)
class Place:
    """A cut, the nodes before it that depend on a sample's values, and those whose values cross it, in order."""

    cut: Cut
    before: frozenset[fx.Node]
    crossing: tuple[fx.Node, ...]


def places(traced: Traced, seen: Mapping[fx.Node, Seen], found: Purity) -> tuple[Place, ...]:
    """The cuts of which none has both more bytes and no larger share than another, by share, the largest first."""
    total = sum(s.flops for s in seen.values())
    if not total:
        return ()
    spans = _spans(traced, found)
    arithmetic = {node for n, s in seen.items() if s.flops for node in (n, *below(n))}
    flops, least, kept = _running(found.pure, seen), inf, []
    sizes = _bytes(found.pure, spans, seen)
    order = sorted(range(len(sizes)), key=lambda n: (-flops[n], sizes[n], -n))
    for number in order:
        if not flops[number] or sizes[number] >= least:
            continue
        crossing = tuple(n for n, (first, last) in spans.items() if first <= number < last)
        before = frozenset(found.pure[: number + 1])
        if not crossing or _aliased(crossing, before, seen, found):
            continue
        least = sizes[number]
        named = tuple(c for n in crossing for c in _crossings(n, seen[n].value))
        kept.append(
            Place(
                Cut(_after(traced, _last(crossing, arithmetic)), named, flops[number] / total),
                before,
                crossing,
            )
        )
    return tuple(kept)


def _running(pure: Sequence[fx.Node], seen: Mapping[fx.Node, Seen]) -> list[int]:
    """The arithmetic up to and with each node."""
    sums, total = [], 0
    for node in pure:
        total += seen[node].flops
        sums.append(total)
    return sums


def _spans(traced: Traced, found: Purity) -> dict[fx.Node, tuple[float, float]]:
    """From which pure node on each value is there, and up to which it is used; inf where what is impure uses it, too."""
    number = {node: float(n) for n, node in enumerate(found.pure)}
    spans, output = {}, traced.output
    for node in found.pure:
        users = [u for u in node.users if not (u in found.free and is_about_sizes(u))]
        last = max((inf if u is output or u in found.impure else number[u] for u in users), default=-1.0)
        spans[node] = (-1.0 if node.op == "placeholder" else number[node], last)
    return spans


def _bytes(
    pure: Sequence[fx.Node], spans: Mapping[fx.Node, tuple[float, float]], seen: Mapping[fx.Node, Seen]
) -> list[float]:
    """Of a sample, for a cut behind each pure node; inf where something that cannot be kept would cross."""
    changes = [0.0] * (len(pure) + 1)
    refused = [0] * (len(pure) + 1)
    for node, (first, last) in spans.items():
        begin, end = int(max(first, 0)), int(min(last, len(pure)))
        if begin >= end:
            continue
        value = seen[node].value
        size = sum(max(t.fold, 1) * prod(t.shape) * t.dtype.itemsize for t in tensors_of(value))
        for at, sign in ((begin, 1), (end, -1)):
            changes[at] += sign * size
            refused[at] += sign * (not crossable(value))
    sums = zip(accumulate(changes), accumulate(refused), strict=True)
    return [inf if bad else size for size, bad in sums][: len(pure)]


def _aliased(
    crossing: Sequence[fx.Node], before: frozenset[fx.Node], seen: Mapping[fx.Node, Seen], found: Purity
) -> bool:
    """Whether two of what crosses share memory that is written to behind the cut: kept apart, they would not see it."""
    shared: set[int] = set()
    once: set[int] = set()
    for node in crossing:
        shared |= seen[node].groups & once
        once |= seen[node].groups
    return bool(shared) and any(
        s.writes & shared for n, s in seen.items() if n not in before and n not in found.free
    )


def _crossings(node: fx.Node, value: Any) -> list[Crossing]:
    name = own_path(str(node.target)) if node.op == "call_module" else node.name
    return [Crossing(name, (t.fold, *t.shape) if t.fold > 1 else t.shape, t.dtype) for t in tensors_of(value)]


def _last(crossing: Sequence[fx.Node], arithmetic: set[fx.Node]) -> fx.Node:
    """Of what crosses, the last that took arithmetic: masks and labels are no place in a model."""
    return next((n for n in reversed(crossing) if n in arithmetic), crossing[-1])


def _after(traced: Traced, node: fx.Node) -> str:
    """The outermost module that ends with `node`, or the last that has ended before it."""
    here = node
    while here.op not in ("root", "placeholder"):
        following = here.next
        while following.op == "get_attr":
            following = following.next
        inside = traced.path(following) if following.op != "output" else ()
        ended = [path for path in traced.path(here) if path not in inside]
        if ended and here.op != "get_attr":
            return ended[0]
        here = here.prev
    return "the input"
