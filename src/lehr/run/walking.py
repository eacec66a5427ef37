"""A graph, run node by node on two batches at once that share samples in another order: what each node does is seen.

Seen are aliases, writes, draws of random numbers, rows that depend on other rows, sizes that follow the batch's, and the
arithmetic. Nothing is known of operators by name. It must not know what trains, or cuts. The model's state is afterwards
as before.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode

from lehr.run.cuts import CannotSplit
from lehr.run.randomness import Randomness
from lehr.run.tracing import Traced, kept_as_it_is, quiet

SMALL, LARGE = 2, 3
"""Samples in the two batches: (0, 1) and (2, 1, 0)."""
_SHARED = torch.tensor([2, 1])  # where the rows of the small batch are in the large one


@dataclass(frozen=True)
class Affine:
    """A whole number that is `slope` times the batch size plus `offset`."""

    slope: int
    offset: int

    def at(self, batch: int) -> int:
        """The number for a batch of this size."""
        return self.slope * batch + self.offset


class Sizes(tuple[Any, ...]):
    """A `torch.Size` with `Affine` in it."""

    __slots__ = ()


class Unclear:
    """In the place of a value that is neither constant nor affine in the batch size."""


def filled(value: Any, batch: int) -> Any:
    """A value as it is for a batch of this size, where it can be known.

    >>> filled(Sizes((Affine(2, 0), 5)), 3)
    (6, 5)
    """
    if isinstance(value, Affine):
        return value.at(batch)
    if isinstance(value, slice):
        return slice(*(filled(part, batch) for part in (value.start, value.stop, value.step)))
    if isinstance(value, dict):
        return {key: filled(part, batch) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        return rebuilt_sequence(value, [filled(part, batch) for part in value])
    return value


def rebuilt_sequence(value: Any, parts: Sequence[Any]) -> Any:
    """A tuple, named tuple or list like `value` with other parts; sizes become a plain tuple."""
    if isinstance(value, Sizes):
        return tuple(parts)
    return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)


@dataclass(frozen=True)
class Tensor:
    """A tensor of a node's value. `fold` is how many rows a sample has, where the rows come sample by sample; else 0.
    `shape` is that of one row.
    """

    fold: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Seen:
    """What a node was seen to do. Groups number the memory that tensors share; those of the model's own state are
    negative. `value` is the node's value with `Tensor`, `Affine` and `Unclear` in it; `same` whether it was the same for
    both batches.
    """

    value: Any
    groups: frozenset[int]
    reads: frozenset[int]
    writes: frozenset[int]
    draws: bool
    mixes: bool
    same: bool
    flops: int


@dataclass
class Memory:
    """Groups by where their memory is. Only what is alive is looked up, so that memory used again is not taken for shared."""

    state: dict[int, int] = field(default_factory=dict)
    made: int = 0

    @classmethod
    def of(cls, model: nn.Module) -> Memory:
        """The groups of a model's parameters and buffers."""
        memory = cls()
        for tensor in (*model.parameters(), *model.buffers()):
            memory.state.setdefault(_place(tensor), -1 - len(memory.state))
        return memory

    def of_state(self, tensors: Iterable[torch.Tensor]) -> frozenset[int]:
        """The groups of parameters or buffers."""
        return frozenset(self.state[_place(tensor)] for tensor in tensors)

    def group(self, tensor: torch.Tensor, alive: Mapping[int, int]) -> int:
        """The group of a tensor, given those of the arguments that it may share memory with."""
        place = _place(tensor)
        known = self.state.get(place, alive.get(place))
        if known is not None:
            return known
        self.made += 1
        return self.made


def walk(
    traced: Traced, model: nn.Module, tensors: Sequence[torch.Tensor], memory: Memory
) -> dict[fx.Node, Seen]:
    """What each node of a graph does, for these inputs. Nodes of no use are taken out of the graph.

    Raises:
        CannotSplit: where the graph cannot be run, or would change a parameter.
    """
    small, large = _batches(tensors)
    with quiet(), state_kept(model, tensors[0].device), kept_as_it_is(model), torch.no_grad():
        torch.clear_autocast_cache()
        walker = _Walker(traced, memory, tolerance(tensors[0].device), model.buffers())
        try:
            return walker.run(list(zip(small, large, strict=True)))
        finally:
            torch.clear_autocast_cache()


class _Walker:
    def __init__(self, traced: Traced, memory: Memory, near: float, buffers: Iterable[torch.Tensor]) -> None:
        self.traced, self.memory, self.near = traced, memory, near
        self.buffers = {id(buffer) for buffer in buffers}
        self.values: dict[fx.Node, tuple[Any, Any]] = {}
        self.seen: dict[fx.Node, Seen] = {}
        self.places: dict[fx.Node, dict[int, int]] = {}

    def run(self, inputs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> dict[fx.Node, Seen]:
        rest = iter(inputs)
        nodes = list(self.traced.graph.nodes)
        last = {argument: node for node in nodes for argument in node.all_input_nodes}
        for node in nodes:
            if node.op == "output":
                break
            self._visit(node, rest)
            for argument in {*node.all_input_nodes, node}:
                if last.get(argument, node) is node:
                    self.values.pop(argument, None)
                    self.places.pop(argument, None)
        for node in reversed(list(self.seen)):
            s = self.seen[node]
            if not node.users and not s.writes and not s.draws and node.op != "placeholder":
                self.traced.graph.erase_node(node)
                del self.seen[node]
        return self.seen

    def _visit(self, node: fx.Node, inputs: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> None:
        alive = {place: group for n in node.all_input_nodes for place, group in self.places[n].items()}
        given = [t for n in node.all_input_nodes for t in tensors_in(self.values[n][0])]
        given += _state_of(self.traced.target(node)) if node.op == "call_module" else []
        _refuse_writing(node, self.traced)
        marks = [Mark(t, copied=id(t) in self.buffers) for t in given]
        before = _random_state(given)
        flops = 0
        if node.op == "placeholder":
            pair = next(inputs)
        elif node.op == "get_attr":
            pair = (self.traced.target(node),) * 2
        else:
            with FlopCounterMode(display=False) as counter:
                one = self._run(node, 0)
            flops = int(counter.get_total_flops())
        draws = before != _random_state(given)
        written = [mark.tensor for mark in marks if mark.is_changed()]
        if node.op not in ("placeholder", "get_attr"):
            pair = one, self._run(node, 1)
        self._note(node, pair, alive, given, written, draws, flops)

    def _note(
        self, node: fx.Node, pair: tuple[Any, Any], alive: dict[int, int], given: list[torch.Tensor],
        written: list[torch.Tensor], draws: bool, flops: int,
    ) -> None:  # fmt: skip
        self.values[node] = pair
        group = self.memory.group
        self.places[node] = {_place(t): group(t, alive) for t in tensors_in(pair[0])}
        compared = _Compared(self.near)
        value = compared.value(*pair)
        self.seen[node] = Seen(
            value, frozenset(self.places[node].values()), frozenset(group(t, alive) for t in given),
            frozenset(group(t, alive) for t in written), draws, compared.mixes, compared.same, flops,
        )  # fmt: skip

    def _run(self, node: fx.Node, which: int) -> Any:
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: self.values[n][which])
        try:
            if node.op == "call_module":
                return self.traced.target(node)(*args, **kwargs)
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            assert callable(node.target)
            return node.target(*args, **kwargs)
        except Exception as error:
            where = self.traced.path(node)
            raise CannotSplit(
                f"the traced model does not run on batches of {SMALL} and {LARGE} samples ({type(error).__name__} in "
                f"{where[-1] if where else 'its forward'})"
            ) from error


@dataclass
class _Compared:
    """Values of the two batches side by side; `mixes` and `same` gather what is found."""

    near: float
    mixes: bool = False
    same: bool = True

    def value(self, a: Any, b: Any) -> Any:
        """The value with `Tensor`, `Affine` and `Unclear` in it."""
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            return self._tensor(a, b)
        if type(a) is not type(b):
            return self._unclear()
        if isinstance(a, slice):
            parts = [self.value(x, y) for x, y in ((a.start, b.start), (a.stop, b.stop), (a.step, b.step))]
            return slice(*parts)
        if isinstance(a, dict):
            return {k: self.value(a[k], b[k]) for k in a} if a.keys() == b.keys() else self._unclear()
        if isinstance(a, (tuple, list)):
            return self._sequence(a, b)
        if type(a) is int and a != b:
            self.same = False
            slope, rest = divmod(b - a, LARGE - SMALL)
            return Affine(slope, a - slope * SMALL) if not rest else Unclear()
        try:
            return a if bool(a == b) else self._unclear()
        except Exception:
            return self._unclear()

    def _sequence(self, a: Any, b: Any) -> Any:
        if len(a) != len(b):
            return self._unclear()
        parts = [self.value(x, y) for x, y in zip(a, b, strict=True)]
        if type(a) is torch.Size:
            return Sizes(parts)
        return rebuilt_sequence(a, parts)

    def _unclear(self) -> Unclear:
        self.same = False
        return Unclear()

    def _tensor(self, a: torch.Tensor, b: torch.Tensor) -> Tensor:
        self.same = self.same and (
            a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b))
        )
        rows = len(a) if a.ndim else 0
        by_sample = (
            a.ndim == b.ndim > 0
            and rows % SMALL == 0
            and rows * LARGE == len(b) * SMALL
            and a.shape[1:] == b.shape[1:]
        )
        if not by_sample or not rows:
            return Tensor(0, tuple(a.shape), a.dtype)
        if not near(a.reshape(SMALL, -1), b.reshape(LARGE, -1)[_SHARED.to(b.device)], self.near):
            self.mixes = True
        return Tensor(rows // SMALL, tuple(a.shape[1:]), a.dtype)


def near(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> bool:
    """Whether two tensors are the same, floating point up to so much of the norm."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not (a.is_floating_point() or a.is_complex()):
        return torch.equal(a, b)
    unequal = (a != b) & ~(a.isnan() & b.isnan())
    if not unequal.any():
        return True
    off = (a - b).masked_fill(~unequal, 0).abs().double().norm()
    size = a.abs().masked_fill(~a.isfinite(), 0).double().norm()
    return bool(off <= tolerance * size)


def tolerance(device: torch.device) -> float:
    """How far two computations of the same may be apart, as a share of the norm, in the arithmetic that is on.

    The worst that was seen over the models of benchmarks/coverage.py is in docs/prefix.md; autocast's types have 8 and 11
    bits.
    """
    if not torch.is_autocast_enabled(device.type):
        return 1e-3
    return 3e-2 if torch.get_autocast_dtype(device.type) is torch.bfloat16 else 1e-2


@contextmanager
def state_kept(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Buffers and random states are afterwards as before, also where something fails."""
    randomness = Randomness(device)
    before = randomness.take()
    marks = [Mark(buffer, copied=True) for buffer in model.buffers()]
    try:
        yield
    finally:
        for mark in marks:
            mark.put_back()
        randomness.put(before)


class Mark:
    """A tensor as it is now. A buffer is to be `copied`: batch-norm moves its statistics without a trace in their version."""

    def __init__(self, tensor: torch.Tensor, *, copied: bool) -> None:
        self.tensor = tensor
        self._version = tensor._version
        self._copy = tensor.detach().clone() if copied else None

    def is_changed(self) -> bool:
        """Whether something was written to it since."""
        return self.tensor._version != self._version or (
            self._copy is not None and not same_bits(self.tensor, self._copy)
        )

    def put_back(self) -> None:
        """Make it what it was."""
        if self.is_changed():
            assert self._copy is not None
            with torch.no_grad():
                self.tensor.copy_(self._copy)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are equal, NaN included."""
    return a.shape == b.shape and (torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all()))


def tensors_in(value: Any) -> list[torch.Tensor]:
    """The tensors of a node's value."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for part in value.values() for t in tensors_in(part)]
    if isinstance(value, (tuple, list)) and type(value) is not torch.Size:
        return [t for part in value for t in tensors_in(part)]
    return []


def _batches(tensors: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    count = len(tensors[0])
    picked = torch.tensor([n % count for n in (2, 1, 0)], device=tensors[0].device)
    large = [t[picked.to(t.device)] for t in tensors]
    return [b[_SHARED.to(b.device)] for b in large], large


def _place(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _state_of(module: Any) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()] if isinstance(module, nn.Module) else []


def _refuse_writing(node: fx.Node, traced: Traced) -> None:
    """A parameter that a forward pass changes in place is found before it is changed."""
    name = str(getattr(node.target, "__name__", node.target)).split(".")[0]
    if node.op not in ("call_function", "call_method") or not name.endswith("_") or name.endswith("__"):
        return
    for argument in node.all_input_nodes[:1]:
        if argument.op == "get_attr" and isinstance(traced.target(argument), nn.Parameter):
            raise CannotSplit(f"a forward pass changes the parameter {argument.target} in place")


def _random_state(tensors: Sequence[torch.Tensor]) -> tuple[Any, ...]:
    """What changes when a random number is drawn."""
    of_numpy: Any = np.random.get_state(legacy=False)
    state = [torch.get_rng_state().numpy().tobytes(), random.getstate()[1], of_numpy["state"].get("pos")]
    state.append(bytes(of_numpy["state"]["key"].data) if "key" in of_numpy["state"] else str(of_numpy))
    if any(t.is_cuda for t in tensors):
        state.append(torch.cuda.get_rng_state().numpy().tobytes())
    return tuple(state)
