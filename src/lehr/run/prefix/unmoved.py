"""Whether running a model leaves it as it was: what a forward pass changes by itself cannot be cut in two without a trace.

Parameters, which buffer stands under which name, and plain attributes are compared; batch statistics may move.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lehr.run.prefix.cuts import CannotSplit
from lehr.run.untouched import kept_state, same_bits

_PLAIN = (bool, int, float, str, type(None))
_MODE = "training"
_PIECE = 1 << 18


@contextmanager
def unmoved(model: nn.Module) -> Iterator[None]:
    """What is done in this context may run the model, and must not change it. A parameter that has changed is noticed by the sums
    of its memory, which is not copied: within `undone`, or `Copies`, it has its values again by then.

    Raises:
        CannotSplit: where a parameter, the buffer under a name, or a plain attribute has changed, with the name.
    """
    parameters = {n: (p, p.data) for n, p in model.named_parameters()}
    before = _sums(data for _, data in parameters.values())
    modules = {path: (m, _plain(m), dict(m._buffers)) for path, m in model.named_modules()}
    changed: list[str] = []
    try:
        yield
    finally:
        for name, (parameter, data) in parameters.items():
            if parameter.data.data_ptr() != data.data_ptr():
                changed.append(name)
                parameter.data = data
        for path, (module, plain, buffers) in modules.items():
            changed += [f"{path}.{name}".lstrip(".") for name in _put_back(module, plain, buffers)]
    now = _sums(data for _, data in parameters.values())
    changed += [
        n for n, (_, data) in parameters.items() if not torch.equal(before[_memory(data)], now[_memory(data)])
    ]
    if changed:
        raise moved(changed[0])


def moved(name: str) -> CannotSplit:
    """What to say of a parameter, a buffer or an attribute that has changed."""
    return CannotSplit(f"a forward pass changes {name}, which only the whole model does; nothing is cached")


@contextmanager
def undone(model: nn.Module) -> Iterator[None]:
    """In this context a parameter that an operator is about to write to is copied first, and has its values again afterwards. Nothing
    else is copied. No place for a loss function: torch.compile does not compile here, and torch 2.6 never compiles later what it was
    first called with here.

    Raises:
        CannotSplit: where one has changed, with its name.
    """
    copies = Copies(model)
    try:
        with _Written(copies):
            yield
    finally:
        changed = copies.put_back()
    if changed:
        raise moved(changed[0])


class Copies:
    """Copies of a model's parameters, made when they are asked for.

    Example:
        >>> copies = Copies(layer := nn.Linear(2, 2))
        >>> copies.take()
        >>> _ = layer.bias.data.add_(1)
        >>> copies.put_back()
        ['bias']
    """

    def __init__(self, model: nn.Module) -> None:
        self._parameters: dict[int, list[tuple[str, torch.Tensor]]] = {}
        for name, parameter in model.named_parameters():
            self._parameters.setdefault(_memory(parameter.data), []).append((name, parameter.data))
        self._copies: dict[int, list[torch.Tensor]] = {}

    def take(self, memory: int | None = None) -> None:
        """Copy what lies in this memory, if it is not copied yet; by default everything."""
        for place in self._parameters if memory is None else [memory]:
            if place in self._parameters and place not in self._copies:
                self._copies[place] = [data.clone() for _, data in self._parameters[place]]

    def put_back(self) -> list[str]:
        """Give what was copied its values again; the names of what had others."""
        changed = []
        for place, copies in self._copies.items():
            for (name, data), copy in zip(self._parameters[place], copies, strict=True):
                if not same_bits(data, copy):
                    changed.append(name)
                    data.copy_(copy)
        return changed


class _Written(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Has what an operation is about to write to copied before it does, through whatever view it is given."""

    supports_higher_order_operators = True

    def __init__(self, copies: Copies) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._copies = copies

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation."""
        given = kwargs or {}
        schema = getattr(func, "_schema", None)
        if schema is not None and schema.is_mutable:
            for number, argument in enumerate(schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    value = args[number] if number < len(args) else given.get(argument.name)
                    for leaf in pytree.tree_leaves(value):
                        if isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided:
                            self._copies.take(_memory(leaf))
        return func(*args, **given)


def _memory(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _sums(tensors: Iterable[torch.Tensor]) -> dict[int, torch.Tensor]:
    """Sums of the memory of these, each once."""
    return {place: _sum(tensor) for place, tensor in {_memory(t): t for t in tensors}.items()}


def refuse_sparse(model: nn.Module) -> None:
    """Refuse what cannot be compared with what it was.

    Raises:
        CannotSplit: where the model holds a sparse tensor, with its shape.
    """
    for tensor in (*model.parameters(), *kept_state(model)):
        if tensor.layout is not torch.strided:
            raise CannotSplit(
                f"the model holds a sparse tensor of shape {tuple(tensor.shape)}, of which it cannot be told whether a forward "
                "pass changes it; make it dense"
            )


def _sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sums of what lies in its memory, read as whole numbers: piece by piece, since torch widens what it sums."""
    memory = tensor.untyped_storage()
    kind = torch.uint8 if memory.nbytes() % 4 else torch.int32
    words = torch.empty(0, dtype=kind, device=tensor.device).set_(memory)
    return torch.stack([piece.sum() for piece in torch.split(words, _PIECE)]) if len(words) else words


def _plain(module: nn.Module) -> dict[str, Any]:
    return {
        name: value for name, value in vars(module).items() if name != _MODE and isinstance(value, _PLAIN)
    }


def _put_back(module: nn.Module, plain: dict[str, Any], buffers: dict[str, Any]) -> list[str]:
    """Make plain attributes and the table of buffers what they were; the names of what was otherwise."""
    now = _plain(module)
    changed = [
        name for name in {**now, **plain} if name not in now or name not in plain or now[name] != plain[name]
    ]
    for name in changed:
        if name in plain:
            module.__dict__[name] = plain[name]
        elif name not in module.__dict__ or isinstance(module.__dict__[name], _PLAIN):
            module.__dict__.pop(name, None)
    moved = [name for name, buffer in module._buffers.items() if buffers.get(name) is not buffer]
    if moved:
        module._buffers.update({name: buffers[name] for name in moved if name in buffers})
    return [*changed, *moved]
