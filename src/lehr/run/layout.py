"""The memory layout of convolution weights: measured where a stage begins, and laid out as was decided.

Values stay the same; sums are rounded in another order. So a layout is a decision that a run writes down, once, and that a
resume takes over: `measured` decides and changes nothing, `apply_layout` does what was decided and measures nothing. This
file must not know the loop.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from lehr.errors import RequestError
from lehr.run.batches import leaves
from lehr.run.precision import Arithmetic, channels_last_pays
from lehr.run.untouched import attributes_kept, state_kept, tensors_kept
from lehr.run.update import Loss, placed, scalar_loss

Name = Literal["contiguous", "channels_last"]
TURNED_OFF_BY = "LEHR_LAYOUT"
"""The environment variable that decides without measuring: `contiguous`, `channels_last`, or `rule`."""
_FORMATS: dict[Name, torch.memory_format] = {
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last,
}
_LEAST = 100_000  # convolution weights; below, no step is long enough for a layout to matter
_FEWEST_STEPS = 600  # of which the six that are timed are 1 %
_CLEARLY = 0.95
_SHORT = 0.005  # seconds of a step, below which clocks and other processes decide
_ROUNDS = 3  # of both layouts: six steps in all


@dataclass(frozen=True)
class Layout:
    """How convolution weights lie in memory, and a sentence that says why; `seconds` are those of a step laid out
    contiguous and channels-last, where it was measured.
    """

    name: Name
    said: str
    seconds: tuple[float, float] | None = None


def named_layout(name: str) -> Layout:
    """The layout of that name, as it was written down when it was decided.

    Raises:
        RequestError: for another name.

    Example:
        >>> named_layout("channels_last").name
        'channels_last'
    """
    for known in _FORMATS:
        if name == known:
            return Layout(known, f"convolution weights are laid out {_words(known)}, as was decided before")
    raise RequestError(f"layout: {name!r}; expected {' or '.join(map(repr, _FORMATS))}")


def by_rule(model: nn.Module, on: Arithmetic) -> Layout:
    """The layout by what the network is made of (`precision.channels_last_pays`), or that of the environment's `LEHR_LAYOUT`.

    Raises:
        RequestError: for an unknown word there.
    """
    asked = os.environ.get(TURNED_OFF_BY, "")
    if asked not in ("", "rule"):
        given = named_layout(asked).name
        return Layout(given, f"convolution weights are laid out {_words(given)}: {TURNED_OFF_BY}={asked}")
    if _came_channels_last(model):
        return Layout("channels_last", "convolution weights are laid out channels-last, as they came")
    name: Name = "channels_last" if channels_last_pays(model, on) else "contiguous"
    return Layout(name, f"convolution weights are laid out {_words(name)}, by what the network is made of")


def may_be_measured(model: nn.Module, on: Arithmetic, steps: int) -> bool:
    """Whether there is something to gain from another layout, as far as can be told without a batch: time enough, enough
    convolutions, and nobody who has decided.
    """
    return (
        not os.environ.get(TURNED_OFF_BY, "")
        and steps >= _FEWEST_STEPS
        and on.device.type in ("cpu", "cuda")
        and sum(w.numel() for w in _weights(model)) >= _LEAST
        and not _came_channels_last(model)
    )


def measured(
    model: nn.Module,
    batch: Any,
    loss: Loss,
    on: Arithmetic,
    *,
    steps: int,
    keep: Iterable[nn.Module] = (),
) -> Layout:
    """The layout in which a step of `model` is faster, on this batch, here and now; six steps are timed, both in turn.

    Model, gradients, buffers, batch and random states are afterwards as they were. The rule of
    `precision.channels_last_pays` holds where the two are closer than 5 %, where the stage has fewer than 600 steps, or a
    step takes less than 5 ms; it is the only word where nothing can be measured.

    Args:
        model: in the mode in which its stage has it, with what that freezes.
        batch: a batch as the stage has it; `placed` on the device, if it is not there.
        loss: the stage's loss function.
        on: device and arithmetic.
        steps: how many such steps follow.
        keep: other modules that the loss runs, whose buffers are to stay as they are, too.

    Raises:
        RequestError: for an unknown word in the environment's `LEHR_LAYOUT`.
    """
    rule = by_rule(model, on)
    if not may_be_measured(model, on, steps) or not any(tensor.ndim == 4 for tensor in leaves(batch)):
        return rule
    try:
        times = _timed(model, placed(batch, on.device), loss, on, tuple(keep))
    except Exception:  # what is wrong is found, and said, by the first step itself
        return rule
    plain, last = min(times["contiguous"]), min(times["channels_last"])
    if min(plain, last) < _SHORT:
        return Layout(rule.name, rule.said, (plain, last))
    clear: Name | None = (
        "channels_last" if last < _CLEARLY * plain else "contiguous" if plain < _CLEARLY * last else None
    )
    name = clear or rule.name
    said = (
        f"convolution weights are laid out {_words(name)}: a step takes {1e3 * last:.3g} ms channels-last and "
        f"{1e3 * plain:.3g} ms contiguous here ({TURNED_OFF_BY}=contiguous or channels_last decides without measuring)"
    )
    return Layout(name, said, (plain, last))


def apply_layout(model: nn.Module, layout: Layout) -> None:
    """Lay the weights of the 2-d convolutions out so, and their gradients; each stays the same parameter.

    Optimizers of `lehr.optimizer` follow before their next step, and so may any other that is not fused.

    Example:
        >>> net = nn.Conv2d(3, 8, 3)
        >>> apply_layout(net, named_layout("channels_last"))
        >>> net.weight.is_contiguous(memory_format=torch.channels_last)
        True
    """
    form = _FORMATS[layout.name]
    for weight in _weights(model):
        if not weight.is_contiguous(memory_format=form):
            weight.data = weight.data.contiguous(memory_format=form)
        if weight.grad is not None and not weight.grad.is_contiguous(memory_format=form):
            weight.grad = weight.grad.contiguous(memory_format=form)


def said(layout: Layout) -> tuple[str, ...]:
    """What a person should know of a layout: nothing where it is the usual one and nothing was measured.

    >>> said(named_layout("contiguous"))
    ()
    """
    return (layout.said,) if layout.name != "contiguous" or layout.seconds else ()


def _words(name: Name) -> str:
    return name.replace("_", "-")


def _weights(model: nn.Module) -> list[nn.Parameter]:
    """The weights of 2-d convolutions, each once."""
    found = {
        id(module.weight): module.weight
        for module in model.modules()
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) and type(module.weight) is nn.Parameter
    }
    return list(found.values())


def _came_channels_last(model: nn.Module) -> bool:
    """Whether a person has laid the weights out so already; one of 1 x 1 lies in both ways."""
    told = [w for w in _weights(model) if not w.is_contiguous()]
    return bool(told) and all(w.is_contiguous(memory_format=torch.channels_last) for w in told)


def _timed(
    model: nn.Module, batch: Any, loss: Loss, on: Arithmetic, keep: tuple[nn.Module, ...]
) -> dict[Name, list[float]]:
    """Seconds of steps in each layout; the first of each, which sets things up, is left out."""
    times: dict[Name, list[float]] = {name: [] for name in _FORMATS}
    with ExitStack() as kept:
        for module in (model, *keep):
            kept.enter_context(attributes_kept(module))
            kept.enter_context(state_kept(module, on.device))
        kept.enter_context(tensors_kept(leaves(batch)))
        kept.enter_context(_as_it_was(model, *keep))
        for number in range(_ROUNDS):
            for name in _FORMATS:
                apply_layout(model, Layout(name, ""))
                seconds = _step(model, batch, loss, on)
                if number:
                    times[name].append(seconds)
    return times


def _step(model: nn.Module, batch: Any, loss: Loss, on: Arithmetic) -> float:
    """Seconds of a forward and backward pass."""
    _wait(on.device)
    began = time.perf_counter()
    with on.autocast():
        value = scalar_loss(loss(model, batch))
    if value.requires_grad:
        torch.autograd.backward(value)
    _wait(on.device)
    seconds = time.perf_counter() - began
    for parameter in model.parameters():
        parameter.grad = None
    return seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _as_it_was(*modules: nn.Module) -> Iterator[None]:
    """The parameters have afterwards the very memory and gradients that they have now."""
    parameters = {id(p): p for module in modules for p in module.parameters()}.values()
    before = [(parameter, parameter.data, parameter.grad) for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, data, gradient in before:
            parameter.grad = None
            parameter.data = data
            parameter.grad = gradient
