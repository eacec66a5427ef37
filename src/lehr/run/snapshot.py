"""Tensors of a model and an optimizer by name, copied out and put back. It must not know files or stages.

Parts of a run are modules with a name: `model/layer.weight`, `ema/layer.weight`. What the optimizer keeps for a
parameter is `optimizer/layer.weight/exp_avg`, that of an objective `optimizer.d/layer.weight/exp_avg`. So a model whose
parts stand in another order loads right, and one that has changed is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain

import torch
from torch import nn

from lehr.errors import CheckpointError
from lehr.run.facts import named
from lehr.run.state import Slots
from lehr.run.weights import listed

Tensors = dict[str, torch.Tensor]
_PLAIN = (int, float, bool, str, type(None))


class Copies:
    """Tensors copied into memory that is used again for the next copy: the first time, memory is the cost.

    Only one set of copies exists at a time: who takes the next has done with the last.
    """

    def __init__(self) -> None:
        self._pool: Tensors = {}

    def of(self, tensors: Mapping[str, torch.Tensor]) -> Tensors:
        """Copies on the CPU, of the same layout."""
        for name, tensor in tensors.items():
            kept = self._pool.get(name)
            if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
                pinned = tensor.device.type == "cuda"
                self._pool[name] = torch.empty_like(tensor, device="cpu", pin_memory=pinned)
        copies = {name: self._pool[name] for name in tensors}
        with torch.no_grad():
            for name, tensor in tensors.items():
                beside = tensor.device.type == "cuda"  # nothing here would wait for MPS
                copies[name].copy_(tensor, non_blocking=beside)
        for device in {tensor.device for tensor in tensors.values() if tensor.device.type == "cuda"}:
            torch.cuda.synchronize(device)
        return copies


def tensors_of(part: str, module: nn.Module) -> Tensors:
    """A module's parameters and buffers, also those that its `state_dict` leaves out, as `part/name`; a shared
    one under its first name.
    """
    return {
        f"{part}/{name}": tensor.detach()
        for name, tensor in chain(named(module).items(), module.named_buffers())
    }


def put_back(part: str, module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Make a module's parameters and buffers what `tensors_of` gave, in place.

    Raises:
        CheckpointError: where names, shapes or types differ, naming them; nothing has changed then.
    """
    there = {n.removeprefix(f"{part}/"): t for n, t in tensors.items() if n.startswith(f"{part}/")}
    parameters, buffers = named(module), dict(module.named_buffers())
    optional = frozenset(_scratch(module))
    lacking = [n for n in (*parameters, *buffers) if n not in there and n not in optional]
    besides = [n for n in there if n not in parameters and n not in buffers and not _vacant(module, n)]
    other = [
        f"{n} ({_kind(there[n])} there, {_kind(t)} here)"
        for n, t in chain(parameters.items(), buffers.items())
        if n in there and n not in optional and _kind(there[n]) != _kind(t)
    ]
    found = (("lacks", lacking), ("has besides", besides), ("has another form of", other))
    if said := "; ".join(f"it {what} {listed(names)}" for what, names in found if names):
        raise CheckpointError(f"does not fit the {part}: {said}; expected the very model that was trained")
    with torch.no_grad():
        for name, tensor in there.items():
            mine = parameters[name] if name in parameters else buffers.get(name)
            if mine is not None and _kind(mine) == _kind(tensor):
                mine.copy_(tensor)
            else:  # a buffer that the forward pass makes, or makes larger
                path, _, last = name.rpartition(".")
                device = next((p.device for p in module.parameters()), tensor.device)
                module.get_submodule(path)._buffers[last] = tensor.to(device, copy=True)


def slots_of(optimizer: torch.optim.Optimizer, part: str = "optimizer") -> tuple[dict[str, Slots], Tensors]:
    """What an optimizer keeps for each of its parameters, by the parameter's name; its tensors under `part`.

    Raises:
        CheckpointError: for something that is neither a tensor nor a plain value.
    """
    slots: dict[str, Slots] = {}
    tensors: Tensors = {}
    for name, parameter in _parameters(optimizer):
        kept = optimizer.state.get(parameter)
        if not kept:
            continue
        ours = {key: value for key, value in kept.items() if isinstance(value, torch.Tensor)}
        plain = {key: value for key, value in kept.items() if key not in ours}
        strange = [key for key, value in plain.items() if not isinstance(value, _PLAIN)]
        if strange:
            raise CheckpointError(
                f"{type(optimizer).__name__} keeps {strange[0]!r} for {name!r}, a "
                f"{type(plain[strange[0]]).__name__}: checkpoints hold tensors and plain values; "
                "take another optimizer, or train without `out`, which saves nothing"
            )
        off = parameter.device.type != "cpu"
        host = tuple(key for key, value in ours.items() if value.device.type == "cpu") if off else None
        slots[name] = Slots(tuple(ours), plain, host)
        tensors.update({f"{part}/{name}/{key}": value.detach() for key, value in ours.items()})
    return slots, tensors


def fill_slots(
    optimizer: torch.optim.Optimizer,
    slots: Mapping[str, Slots],
    tensors: Mapping[str, torch.Tensor],
    part: str = "optimizer",
) -> None:
    """Make an optimizer keep what `slots_of` gave.

    Raises:
        CheckpointError: for a parameter that the optimizer does not have, or a tensor that is missing.
    """
    parameters = dict(_parameters(optimizer))
    strangers = [name for name in slots if name not in parameters]
    if strangers:
        raise CheckpointError(f"the optimizer's state is of {listed(strangers)}, which it does not train")
    absent = [f"{n}/{k}" for n, s in slots.items() for k in s.tensors if f"{part}/{n}/{k}" not in tensors]
    if absent:
        raise CheckpointError(f"the optimizer's state lacks {listed(absent)}")
    on_device = {
        id(p): bool(group.get("capturable") or group.get("fused"))
        for group in optimizer.param_groups
        for p in group["params"]
    }
    optimizer.state.clear()
    for name, kept in slots.items():
        parameter = parameters[name]
        values: dict[str, object] = dict(kept.plain)
        for key in kept.tensors:
            value = tensors[f"{part}/{name}/{key}"]
            counts = value.ndim == 0 and not on_device[id(parameter)]
            host = counts if kept.host is None else key in kept.host
            values[key] = _laid_out(value, parameter, torch.device("cpu") if host else parameter.device)
        optimizer.state[parameter] = values


def _laid_out(value: torch.Tensor, like: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on `device`, in the layout that the optimizer gives what it keeps: that of the parameter."""
    if value.shape == like.shape:
        return torch.empty_like(like, dtype=value.dtype, device=device, requires_grad=False).copy_(value)
    return value.to(device, copy=True)


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, torch.Tensor]]:
    for group in optimizer.param_groups:
        yield from zip(group["param_names"], group["params"], strict=True)


def _kind(tensor: torch.Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _scratch(module: nn.Module) -> Iterator[str]:
    """The names of buffers that a `state_dict` leaves out."""
    for path, part in module.named_modules():
        for name in part._non_persistent_buffers_set:
            yield f"{path}.{name}" if path else name


def _vacant(module: nn.Module, name: str) -> bool:
    """Whether `name` is the place of a buffer that is not there yet."""
    path, _, last = name.rpartition(".")
    modules = dict(module.named_modules())
    return path in modules and last in modules[path]._buffers and modules[path]._buffers[last] is None
