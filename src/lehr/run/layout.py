"""The memory layout of convolution weights: by rule, or tried in a stage's first steps.

Values stay the same; sums are rounded in another order. So a layout is a decision that a run writes down, and that a resume
takes over. This file must not know the loop.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from lehr.errors import RequestError
from lehr.run.facts import named
from lehr.run.precision import Arithmetic, channels_last_pays

Name = Literal["contiguous", "channels_last"]
TURNED_OFF_BY = "LEHR_LAYOUT"
"""The environment variable that decides without trying: `contiguous`, `channels_last`, or `rule`."""
_FORMATS: dict[Name, torch.memory_format] = {
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last,
}
_LEAST = 100_000  # convolution weights that train; below, no step is long enough for a layout to matter
_FEWEST_STEPS = 100  # of which those that are tried are 6 %
_CLEARLY = 0.95
_SHORT = 0.005  # seconds of a step, below which clocks and other processes decide
_TRIED = 3  # steps in each layout


@dataclass(frozen=True)
class Layout:
    """How convolution weights lie in memory, and a sentence that says why; whether a person has decided it (`is_given`)."""

    name: Name
    said: str
    is_given: bool = False


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
        said = f"convolution weights are laid out {_words(given)}: {TURNED_OFF_BY}={asked}"
        return Layout(given, said, is_given=True)
    if _came_channels_last(model):
        return Layout(
            "channels_last", "convolution weights are laid out channels-last, as they came", is_given=True
        )
    name: Name = "channels_last" if channels_last_pays(model, on) else "contiguous"
    said = f"convolution weights are laid out {_words(name)}, by what the network is made of"
    return Layout(name, said, is_given=asked == "rule")


def may_be_tried(rule: Layout, model: nn.Module, on: Arithmetic, trained: frozenset[str], steps: int) -> bool:
    """Whether a stage that trains these parameters for so many steps can gain from another layout than the rule's: time
    enough, enough convolutions, and nobody who has decided.
    """
    return (
        not rule.is_given
        and steps >= _FEWEST_STEPS
        and on.device.type in ("cpu", "cuda")
        and sum(w.numel() for w in _weights(model, trained)) >= _LEAST
    )


class Trial:
    """Both layouts tried in the first steps of a stage, which are steps like any other: three as the rule has it, three in the
    other one. The first of each, which sets things up, does not count. The other is kept where its step is 5 % faster or more,
    and takes 5 ms or more.

    Example:
        >>> trial = Trial(named_layout("contiguous"), torch.device("cpu"))
        >>> [trial.at(number) for number in (0, 3)]
        ['contiguous', 'channels_last']
        >>> for seconds in (2.0, 0.9, 1.0, 2.0, 0.5, 0.6):
        ...     trial.took(seconds)
        >>> trial.decided().name
        'channels_last'
    """

    steps = 2 * _TRIED

    def __init__(self, rule: Layout, device: torch.device) -> None:
        self._rule, self._device = rule, device
        self._seconds: list[float] = []
        self._other: Name = "contiguous" if rule.name == "channels_last" else "channels_last"

    def at(self, number: int) -> Name:
        """The layout of the stage's step `number`, of those that are tried."""
        return self._rule.name if number < _TRIED else self._other

    @contextmanager
    def timed(self) -> Iterator[None]:
        """A step made in this context is timed."""
        self._wait()
        began = time.perf_counter()
        yield
        self._wait()
        self.took(time.perf_counter() - began)

    def took(self, seconds: float) -> None:
        """Count a step's time."""
        self._seconds.append(seconds)

    def decided(self) -> Layout:
        """The layout to go on with; the rule's where a run went on after a stop and did not see all of the steps."""
        if len(self._seconds) < self.steps:
            return self._rule
        ours, theirs = min(self._seconds[1:_TRIED]), min(self._seconds[_TRIED + 1 :])
        is_other = theirs < _CLEARLY * ours and ours >= _SHORT
        name = self._other if is_other else self._rule.name
        said = (
            f"convolution weights are laid out {_words(name)} in this stage: a step takes {1e3 * ours:.3g} ms "
            f"{_words(self._rule.name)} and {1e3 * theirs:.3g} ms {_words(self._other)} here "
            f"({TURNED_OFF_BY}=contiguous or channels_last decides without trying)"
        )
        return Layout(name, said)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def apply_layout(model: nn.Module, layout: Layout, trained: frozenset[str] | None = None) -> None:
    """Lay the weights of the 2-d convolutions out so, and their gradients; each stays the same parameter. With `trained` those
    alone that have these names.

    Optimizers of `lehr.optimizer` follow before their next step, and so may any other that is not fused.

    Example:
        >>> net = nn.Conv2d(3, 8, 3)
        >>> apply_layout(net, named_layout("channels_last"))
        >>> net.weight.is_contiguous(memory_format=torch.channels_last)
        True
    """
    form = _FORMATS[layout.name]
    for weight in _weights(model, trained):
        if not weight.is_contiguous(memory_format=form):
            weight.data = weight.data.contiguous(memory_format=form)
        if weight.grad is not None and not weight.grad.is_contiguous(memory_format=form):
            weight.grad = weight.grad.contiguous(memory_format=form)


def laid_out(tensors: Sequence[torch.Tensor], name: Name) -> tuple[torch.Tensor, ...]:
    """Images and feature maps in the layout of that name, others as they are."""
    form = _FORMATS[name]
    return tuple(t.contiguous(memory_format=form) if t.ndim == 4 else t for t in tensors)


def _words(name: Name) -> str:
    return name.replace("_", "-")


def _weights(model: nn.Module, among: frozenset[str] | None = None) -> list[nn.Parameter]:
    """The weights of 2-d convolutions, each once; of those `among` these names, if they are given."""
    known = named(model)
    wanted = {id(p) for name, p in known.items() if among is None or name in among}
    found = {
        id(module.weight): module.weight
        for module in model.modules()
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) and type(module.weight) is nn.Parameter
    }
    return [weight for key, weight in found.items() if key in wanted]


def _came_channels_last(model: nn.Module) -> bool:
    """Whether a person has laid the weights out so already; one of 1 x 1 lies in both ways."""
    told = [w for w in _weights(model) if not w.is_contiguous()]
    return bool(told) and all(w.is_contiguous(memory_format=torch.channels_last) for w in told)
