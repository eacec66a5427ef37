"""What the tests of the prefix share: a model that is cut, and an independent comparison of its halves with the whole."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from lehr.run.facts import named
from lehr.run.freezing import set_trainable
from lehr.run.prefix.analysis import Analysis, Call, Halves, analyse, choose
from lehr.run.prefix.proof import prove


def analysed(model: nn.Module, call: Call, *trained: str, training: bool = True) -> Analysis:
    """`analyse`, where the parameters under these names train."""
    names = frozenset(n for n in named(model) if any(n == t or n.startswith(f"{t}.") for t in trained))
    set_trainable(model, names)
    model.train(training)
    return analyse(model, call, trained=names)


def halves_of(model: nn.Module, call: Call, *trained: str, training: bool = True) -> Halves:
    """The halves that `choose` takes."""
    analysis = analysed(model, call, *trained, training=training)
    cut = choose(analysis.cuts)
    assert cut is not None
    return analysis.split(cut)


def proved(model: nn.Module, halves: Halves, call: Call, *, store: torch.dtype | None = None) -> None:
    """`prove` in the mode that the model is in."""
    loss = (lambda f: number(f(*call.args, **call.kwargs))) if model.training else None
    prove(model, halves, call, loss=loss, store=store)


def number(output: Any) -> torch.Tensor:
    """A number that depends on all of an output."""
    total = torch.zeros(())
    for place, leaf in enumerate(t for t in pytree.tree_leaves(output) if isinstance(t, torch.Tensor)):
        if leaf.is_floating_point():
            weights = torch.linspace(-1, 1, leaf.numel()).reshape(leaf.shape)
            total = total + (place + 1) * (leaf * weights).sum() + leaf.square().mean()
    return total


def assert_same(model: nn.Module, halves: Halves, call: Call, *, exact: bool = True) -> None:
    """The halves are the model: outputs and their form, and in training gradients, buffers and random numbers drawn."""
    with in_eval(model, halves.stilled):
        whole = step(model, lambda: model(*copy.deepcopy(call.args), **call.kwargs))
    ours = step(model, lambda: halves.suffix(halves.prefix(*copy.deepcopy(call.args), **call.kwargs)))
    assert whole.keys() == ours.keys()
    for name, expected in whole.items():
        if isinstance(expected, torch.Tensor):
            near = {"rtol": 0.0, "atol": 0.0} if exact else {"rtol": 1e-3, "atol": 1e-4}
            torch.testing.assert_close(ours[name], expected, **near, msg=lambda text, n=name: f"{n}: {text}")
        else:
            assert ours[name] == expected, name


def step(model: nn.Module, forward: Any) -> dict[str, Any]:
    """All that a step gives, by name; the model is afterwards as before."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    torch.manual_seed(3)
    with torch.set_grad_enabled(model.training):
        output = forward()
    leaves, form = pytree.tree_flatten(output)
    found: dict[str, Any] = {"form": form} | {f"output {n}": leaf for n, leaf in enumerate(leaves)}
    if model.training:
        number(output).backward()
        found |= {
            f"gradient {n}": None if p.grad is None else p.grad.clone() for n, p in named(model).items()
        }
        found |= {f"buffer {n}": b.clone() for n, b in model.named_buffers()}
        model.zero_grad()
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(before[name])
    return found | {"random": torch.get_rng_state()}


@contextmanager
def in_eval(model: nn.Module, paths: tuple[str, ...]) -> Iterator[None]:
    """The modules at these paths are in eval mode."""
    modules = [m for path in paths for m in model.get_submodule(path).modules()]
    for module in modules:
        module.training = False
    yield
    for module in modules:
        module.training = True


def state(model: nn.Module) -> list[Any]:
    """All of a model that a look at it must not change, and the random state."""
    return [
        [t.detach().clone() for t in (*model.parameters(), *model.buffers())],
        [(name, module.training, sorted(module.__dict__)) for name, module in model.named_modules()],
        [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        [p.requires_grad for p in model.parameters()],
        torch.get_rng_state(),
    ]


def assert_as_before(before: list[Any], after: list[Any]) -> None:
    torch.testing.assert_close(after[0], before[0], rtol=0, atol=0)
    assert after[1] == before[1]
    for old, new in zip(before[2], after[2], strict=True):
        assert (old is None and new is None) or torch.equal(old, new)
    assert after[3] == before[3]
    assert torch.equal(after[4], before[4])


def with_suffix(halves: Halves, function: Callable[..., Any]) -> Halves:
    """Halves whose suffix does something else."""
    return replace(halves, _second=replace(halves._second, module=SimpleNamespace(forward=function)))


def with_prefix(halves: Halves, function: Callable[..., Any]) -> Halves:
    """Halves whose prefix does something else."""
    return replace(halves, _first=replace(halves._first, module=SimpleNamespace(forward=function), sizes=()))
