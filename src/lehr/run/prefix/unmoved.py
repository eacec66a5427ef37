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
from lehr.run.untouched import kept_state

_PLAIN = (bool, int, float, str, type(None))
_MODE = "training"
_PIECE = 1 << 18


@contextmanager
def unmoved(model: nn.Module) -> Iterator[None]:
    """What is done in this context may run the model, and must not change it. What has changed is noticed by its sum, and put
    back: a parameter is copied when an operation is about to write to it, so that this takes no memory where nothing does. What is
    written past torch, by NumPy in shared memory say, is noticed alone.

    Raises:
        CannotSplit: where a parameter, the buffer under a name, or a plain attribute has changed, with the name.
    """
    parameters = {n: (p, p.data, _sum(p.detach())) for n, p in model.named_parameters()}
    modules = {path: (m, _plain(m), dict(m._buffers)) for path, m in model.named_modules()}
    written = _Written(p.data for p, _, _ in parameters.values())
    changed: list[str] = []
    try:
        with written:
            yield
    finally:
        for name, (parameter, data, before) in parameters.items():
            if parameter.data.data_ptr() != data.data_ptr() or not torch.equal(
                _sum(parameter.detach()), before
            ):
                changed.append(name)
                parameter.data = data
        written.put_back()
        for path, (module, plain, buffers) in modules.items():
            changed += [f"{path}.{name}".lstrip(".") for name in _put_back(module, plain, buffers)]
    if changed:
        raise CannotSplit(
            f"a forward pass changes {changed[0]}, which only the whole model does; nothing is cached"
        )


class _Written(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Copies those of some tensors that an operation in this context writes to, before it does, through whatever view."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._watched: dict[int, list[torch.Tensor]] = {}
        for tensor in tensors:
            self._watched.setdefault(_memory(tensor), []).append(tensor)
        self._copies: dict[int, list[torch.Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation; first copy what it is about to write to."""
        schema = getattr(
            func, "_schema", None
        )  # operators that take functions have none, and write nothing themselves
        if schema is not None and schema.is_mutable:
            for leaf in pytree.tree_leaves((args, kwargs)):
                if isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided:
                    self._copy(_memory(leaf))
        return func(*args, **(kwargs or {}))

    def _copy(self, memory: int) -> None:
        if memory in self._watched and memory not in self._copies:
            self._copies[memory] = [tensor.clone() for tensor in self._watched[memory]]

    def put_back(self) -> None:
        """Give what was written to its values back."""
        for memory, copies in self._copies.items():
            for tensor, copy in zip(self._watched[memory], copies, strict=True):
                tensor.copy_(copy)


def _memory(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


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
    """The sum of what lies in its memory, read as whole numbers; in pieces, since torch widens what it sums."""
    memory = tensor.untyped_storage()
    kind = torch.uint8 if memory.nbytes() % 4 else torch.int32
    words = torch.empty(0, dtype=kind, device=tensor.device).set_(memory)
    return torch.stack([piece.sum() for piece in torch.split(words, _PIECE)]).sum() if len(words) else words


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
