"""A graph, run node by node on two batches at once that share samples in another order: what each node does is seen.

Seen are aliases, writes, draws of random numbers, rows that depend on other rows, sizes that follow the batch's, and the
arithmetic. Nothing is known of operators by name. It must not know what trains, or cuts. The model's state is afterwards
as before.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode

from lehr.run.prefix.cuts import CannotSplit
from lehr.run.prefix.forms import at_least
from lehr.run.prefix.nearness import Tolerance, near, tolerance, without_tf32
from lehr.run.prefix.seen import Affine, Seen, Sizes, Tensor, Unclear, rebuilt_sequence
from lehr.run.prefix.tracing import Traced
from lehr.run.untouched import Mark, attributes_kept, kept_state, quiet, state_kept

SMALL, LARGE = 2, 3
"""Samples in the two batches: (0, 1) and (2, 1, 0)."""
_SHARED = torch.tensor([2, 1])  # where the rows of the small batch are in the large one


@dataclass
class Memory:
    """Groups by where their memory is. Only what is alive is looked up, so that memory used again is not taken for shared."""

    state: dict[int, int] = field(default_factory=dict)
    made: int = 0

    @classmethod
    def of(cls, model: nn.Module) -> Memory:
        """The groups of a model's parameters and of what it keeps besides."""
        memory = cls()
        memory.keep(_state_of(model))
        return memory

    def keep(self, tensors: Iterable[torch.Tensor]) -> None:
        """Count tensors as the model's own state: what stays from one forward pass to the next."""
        for tensor in tensors:
            self.state.setdefault(_place(tensor), -1 - len(self.state))

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
    device = tensors[0].device
    with quiet(), state_kept(model, device), attributes_kept(model), without_tf32(device), torch.no_grad():
        torch.clear_autocast_cache()
        walker = _Walker(traced, memory, tolerance(device), kept_state(model))
        try:
            return walker.run(list(zip(small, large, strict=True)))
        finally:
            torch.clear_autocast_cache()


class _Walker:
    def __init__(
        self, traced: Traced, memory: Memory, near: Tolerance, buffers: Iterable[torch.Tensor]
    ) -> None:
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
            self.memory.keep(tensors_in(pair[0]))
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
        if not compared.mixes:
            self._even(compared.uneven, self.places[node])
        self.seen[node] = Seen(
            value, frozenset(self.places[node].values()), frozenset(group(t, alive) for t in given),
            frozenset(group(t, alive) for t in written), draws, compared.mixes, compared.same, flops,
        )  # fmt: skip

    def _even(self, uneven: Iterable[Uneven], places: Mapping[int, int]) -> None:
        """Give the small batch the large one's rows where they differ by rounding, which would grow from node to node; never
        where they lie in the model's state or in anything else that both have a part of.
        """
        for a, b, rows in uneven:
            is_own = places[_place(a)] >= 0 and _place(a) != _place(b)
            if is_own and a.is_floating_point() and a.is_contiguous():
                a.copy_(rows.reshape(a.shape))

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


class Uneven(NamedTuple):
    """Tensors of the small and of the large batch, and that one's `rows` of the samples that both have, which differ."""

    small: torch.Tensor
    large: torch.Tensor
    rows: torch.Tensor


@dataclass
class _Compared:
    """Values of the two batches side by side; `mixes`, `same` and `uneven` gather what is found."""

    near: Tolerance
    mixes: bool = False
    same: bool = True
    uneven: list[Uneven] = field(default_factory=list)

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
        except Exception:  # values that do not compare are not known to be the same
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
        sizes = self.value(a.shape, b.shape)
        fold = _fold(a, b)
        if fold and not _are_even(a, b, fold):
            rows = b.reshape(LARGE, fold, *b.shape[1:])[_SHARED.to(b.device)]
            self.uneven.append(Uneven(a, b, rows))
            self.mixes = self.mixes or not near(a.reshape(rows.shape), rows, self.near)
        return Tensor(fold, tuple(a.shape[1:] if fold else a.shape), a.dtype, a.device, sizes)


def _fold(a: torch.Tensor, b: torch.Tensor) -> int:
    """How many rows of a tensor are a sample's, of the small batch's `a` and the large one's `b`; 0 where their rows do not come
    sample by sample.
    """
    if not a.ndim == b.ndim > 0 or a.shape[1:] != b.shape[1:]:
        return 0
    fold, rest = divmod(len(a), SMALL)
    return fold if not rest and len(b) == fold * LARGE else 0


def _are_even(a: torch.Tensor, b: torch.Tensor, fold: int) -> bool:
    """Whether the samples that both have are the same bits, as far as that can be told without a copy of them."""
    return a.dtype == b.dtype and all(
        torch.equal(a[n * fold : (n + 1) * fold], b[other * fold : (other + 1) * fold])
        for n, other in enumerate(_SHARED.tolist())
    )


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
    picked = torch.tensor([2, 1, 0])
    large = [t[picked.to(t.device)] for t in at_least(tensors, LARGE)]
    return [b[_SHARED.to(b.device)] for b in large], large


def _place(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _state_of(module: Any) -> list[torch.Tensor]:
    return [*module.parameters(), *kept_state(module)] if isinstance(module, nn.Module) else []


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
