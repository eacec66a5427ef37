"""Small runs of many kinds, and exact places at which to stop them: by a signal, or by death."""

from __future__ import annotations

import os
import random
import signal
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, TensorDataset

import lehr
from killing import differences, leave, outcome
from lehr.events import Event
from nursery import Nursery

DEAD = 9
STEPS = 3
"""Updates in an epoch: windows of 4 + 4, 4 + 4 and 4 + 2 samples."""
_STAGES = (
    lehr.Stage("2 epochs", train="head", lr=1e-2),
    lehr.Stage("2 epochs", train=["head", "1"], lr=1e-2),
    lehr.Stage("2 epochs", train="all", lr=1e-2),
)


@dataclass(frozen=True)
class Case:
    """What is unlike the usual run: parts of the recipe, the person's own loader with so many `workers`, with a
    `generator` of its own or without; whether the loss has a buffer and draws at random; arguments of `fit`.
    """

    recipe: Mapping[str, Any] = field(default_factory=dict)
    stages: tuple[lehr.Stage, ...] = _STAGES
    loader: bool = False
    generator: bool = False
    workers: int = 0
    own_loss: bool = False
    more: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Stop:
    """Where a process is stopped: when the loss is called for the `nth` time (from 0) in "training" or "validation",
    or an event is told for the nth time; and how: "death" or signals, one after the other.
    """

    at: str
    nth: int = 0
    how: tuple[str, ...] = ("death",)


@dataclass
class _Stopper:
    """Counts what happens, and stops the process there; an observer."""

    stop: Stop | None
    counts: Counter[str] = field(default_factory=Counter)

    def __call__(self, event: Event) -> None:
        self.comes_by(type(event).__name__)

    def comes_by(self, place: str) -> None:
        """The run is there once more."""
        nth = self.counts[place]
        self.counts[place] += 1
        if self.stop and (place, nth) == (self.stop.at, self.stop.nth):
            for how in self.stop.how:
                if how == "death":
                    os._exit(DEAD)
                os.kill(os.getpid(), signal.Signals[how])


class _Loss(nn.Module):
    """Cross-entropy over its own running mean, a buffer, and times something random."""

    mean: torch.Tensor

    def __init__(self, stopper: _Stopper) -> None:
        super().__init__()
        self.register_buffer("mean", torch.ones(()))
        self._stopper = stopper

    def forward(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        said = _cross_entropy(model, batch, self._stopper)
        if model.training:
            self.mean.mul_(0.9).add_(0.1 * said["loss"].detach())
        drawn = (
            1 + 0.1 * random.random() + 0.1 * float(np.random.standard_normal())
        )  # which caches every second
        return {**said, "loss": said["loss"] / self.mean.clone() * drawn * (1 + 0.1 * random.gauss(0, 1))}


def _cross_entropy(model: nn.Module, batch: Any, stopper: _Stopper) -> dict[str, torch.Tensor]:
    stopper.comes_by("training" if model.training else "validation")
    outputs = model(batch[0])
    loss = functional.cross_entropy(outputs, batch[1])
    return {"loss": loss, "outputs": outputs, "targets": batch[1]}


class _Noisy(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Samples with noise from the three global generators."""

    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = self.data[index]
        return x + 0.1 * torch.randn(3) + 0.1 * random.random() + 0.1 * float(np.random.standard_normal()), y


def run(case: Case, out: Path, stop: Stop | None = None) -> None:
    """Begin the run in `out`, or go on with it, and stop there."""
    torch.set_num_threads(1)
    torch.manual_seed(7)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.2), nn.Linear(4, 2))
    inputs = 2 * torch.linspace(-1, 1, 3 * 62).mul(99).sin().reshape(62, 3)
    train, valid = (TensorDataset(part, (part.sum(1) > 0).long()) for part in (inputs[:22], inputs[22:]))
    stopper = _Stopper(stop)
    loss: Callable[..., Any] = (
        _Loss(stopper) if case.own_loss else lambda model, batch: _cross_entropy(model, batch, stopper)
    )
    names = [objective.name for stage in case.stages for objective in stage.objectives]
    recipe = lehr.Recipe(case.stages, **{"batch_size": 4, "accumulate": 2, "ema": 0.9, **case.recipe})
    result = lehr.fit(
        net, _loader(case, train) if case.loader else train, valid, recipe=recipe, out=out,
        loss=dict.fromkeys(names, loss) if names else loss,
        observers=[stopper], device="cpu", head="3", resume="auto", **{"checkpoint": "1 step", **case.more},
    )  # fmt: skip
    leave(result, out)


def _loader(case: Case, data: TensorDataset) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(3) if case.generator else None
    return DataLoader(_Noisy(data), 4, shuffle=True, generator=generator, num_workers=case.workers)


def never_stopped(place: Nursery, folder: Path, case: Case) -> dict[str, str]:
    """What a run ends with."""
    ended = place.run(partial(run, case, folder / "whole"))
    assert ended.code == 0, ended.said
    return outcome(folder / "whole")


def stopped(place: Nursery, out: Path, case: Case, *stops: Stop) -> dict[str, str]:
    """What a run ends with that is stopped there, resumed, stopped again, and so on, and resumed."""
    codes = {"death": DEAD, "SIGINT": 130, "SIGTERM": 143}
    for stop in stops:
        ended = place.run(partial(run, case, out, stop))
        assert ended.code == codes[stop.how[-1]], ended.said
    ended = place.run(partial(run, case, out))
    assert ended.code == 0, ended.said
    return outcome(out)


def check(place: Nursery, folder: Path, case: Case, *stops: Stop) -> dict[str, str]:
    """Compare a run that is stopped with one that is not."""
    expected = never_stopped(place, folder, case)
    assert differences(expected, stopped(place, folder / "stopped", case, *stops)) == []
    return expected
