"""Contexts in which a model may be traced and run, and after which it and the process are as before.

They must not know why it is run.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import torch
from torch import fx, nn

from lehr.run.randomness import Randomness, RandomState

_LISTS = ("_parameters", "_buffers", "_modules")


@contextmanager
def quiet() -> Iterator[None]:
    """Nothing that is done here warns, logs or prints."""
    off = logging.root.manager.disable
    with (
        warnings.catch_warnings(),
        redirect_stdout(io.StringIO()),
        redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(off)


@contextmanager
def attributes_kept(model: nn.Module) -> Iterator[list[tuple[str, list[Any]]]]:
    """Attributes of the model's modules are afterwards what they were. Gives those that had come to hold tensors by name, with
    what they held. Dicts of tensors, in which some modules keep what they have computed from their weights, are empty.

    Values are not copied: what is changed in place stays changed (`state_kept` is for that).
    """
    before = [(path, module, _shallow(module)) for path, module in model.named_modules()]
    changed: list[tuple[str, list[Any]]] = []
    for _, module, _ in before:
        for name, value in module.__dict__.items():
            if name not in _LISTS and type(value) is dict and _held_tensors(value):
                value.clear()
    try:
        yield changed
    finally:
        for path, module, old in before:
            changed += [(f"{path}.{n}" if path else n, held) for n, held in _put_back(module, old).items()]


@contextmanager
def state_kept(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Buffers, tensors in attributes and random states are afterwards as before, also where something fails."""
    randomness = Randomness(device)
    before = randomness.take()
    marks = [Mark(tensor, copied=True) for tensor in kept_state(model)]
    try:
        yield
    finally:
        for mark in marks:
            mark.put_back()
        randomness.put(before)


@contextmanager
def rewound_after(
    kind: type[Exception], modules: Iterable[nn.Module], device: torch.device
) -> Iterator[None]:
    """Where an exception of this kind comes, torch's random states, and the buffers of those modules that are in training mode, are
    as before, so that what was begun can be done in another way.
    """
    drawn = torch.get_rng_state()
    drawn_there = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    buffers = [(b, b.clone()) for m in modules if m.training for b in m._buffers.values() if b is not None]
    try:
        yield
    except kind:
        torch.set_rng_state(drawn)
        if drawn_there is not None:
            torch.cuda.set_rng_state(drawn_there, device)
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        raise


def same_random(one: RandomState, other: RandomState) -> bool:
    """Whether no random number was drawn in between."""
    return one.plain == other.plain and all(torch.equal(t, other.tensors[n]) for n, t in one.tensors.items())


def kept_state(model: nn.Module) -> list[torch.Tensor]:
    """What a model keeps from one forward pass to the next besides its parameters: buffers, and tensors in attributes."""
    attributes = [v for m in model.modules() for n, v in m.__dict__.items() if n not in _LISTS]
    return [
        *model.buffers(),
        *(t for v in attributes for t in _held_tensors(v) if isinstance(t, torch.Tensor)),
    ]


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


@contextmanager
def tensors_kept(tensors: Iterable[torch.Tensor]) -> Iterator[None]:
    """The inputs are afterwards as before, where the model writes to them."""
    marks = [Mark(tensor, copied=True) for tensor in tensors]
    try:
        yield
    finally:
        for mark in marks:
            mark.put_back()


@contextmanager
def in_eval(model: nn.Module, paths: Iterable[str]) -> Iterator[None]:
    """The modules at these paths are in eval mode for the time being."""
    modules = [m for path in paths for m in model.get_submodule(path).modules()]
    modes = [m.training for m in modules]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


@contextmanager
def without_caches(model: nn.Module) -> Iterator[None]:
    """Configurations of transformers' kind say `use_cache`, whose caches no graph can return: off for the time being."""
    configs: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    found = {id(c): c for c in configs if getattr(c, "use_cache", None) is True}
    try:
        for config in found.values():
            config.use_cache = False
        yield
    finally:
        for config in found.values():
            config.use_cache = True


@contextmanager
def without_compiling(model: nn.Module) -> Iterator[None]:
    """Modules that `module.compile()` was called on are run as they are written."""
    compiled = [m for m in model.modules() if m.__dict__.get("_compiled_call_impl") is not None]
    before = [m.__dict__.pop("_compiled_call_impl") for m in compiled]
    try:
        yield
    finally:
        for module, call in zip(compiled, before, strict=True):
            module.__dict__["_compiled_call_impl"] = call


def _shallow(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """A module's attributes, and what is in those that are lists, dicts or sets."""
    own = dict(module.__dict__)
    return own, {name: value.copy() for name, value in own.items() if type(value) in (list, dict, set)}


def _put_back(module: nn.Module, before: tuple[dict[str, Any], dict[str, Any]]) -> dict[str, list[Any]]:
    own, inside = before
    now = module.__dict__
    held = {n: _held_tensors(v) for n, v in now.items() if n not in own or v is not own[n]}
    for name in [n for n in now if n not in own]:
        del now[name]
    for name, value in own.items():
        if now.get(name, now) is not value:
            now[name] = value
    for name, old in inside.items():
        value = own[name]
        if len(value) != len(old) or not _same(value, old):
            known = {id(t) for t in _held_tensors(old)}
            held[name] = [t for t in _held_tensors(value) if id(t) not in known]
            value.clear()
            value.extend(old) if isinstance(value, list) else value.update(old)
    return {name: tensors for name, tensors in held.items() if tensors}


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(v is other[k] for k, v in one.items())
    if isinstance(one, set):
        return bool(one == other)
    return all(a is b for a, b in zip(one, other, strict=True))


def _held_tensors(value: Any) -> list[Any]:
    """The tensors, or what stands for them while a model is traced, in an attribute."""
    parts = (
        value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else (value,)
    )
    return [part for part in parts if isinstance(part, (torch.Tensor, fx.Proxy))]
