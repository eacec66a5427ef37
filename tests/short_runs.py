"""Runs of a small network whose backbone is frozen, the long way and the short way, and what they came to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import lehr
from lehr.events import CacheClosed, Event, Note, PrefixCached, StepsTaken


class Net(nn.Module):
    """Two blocks of convolution, batch-norm and dropout, and a head with dropout."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(_block(a, b) for a, b in ((3, 8), (8, 8))))
        self.drop = nn.Dropout(0.2)
        self.fc = nn.Linear(8, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.drop(self.blocks(x).mean((2, 3))))


def _block(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.Dropout(0.2)
    )


def net(make: type[nn.Module] = Net) -> nn.Module:
    """The network, always with the same weights, and statistics that are not those of a new one."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = make()
        model.train()
        with torch.no_grad():
            for _ in range(3):
                model(torch.randn(8, 3, 6, 6))
    return model


def images(samples: int = 24, seed: int = 2) -> TensorDataset:
    """Images of three classes, brighter in one channel each."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(samples) % 3
    inputs = torch.randn(samples, 3, 6, 6, generator=generator)
    inputs[torch.arange(samples), targets] += 0.7
    return TensorDataset(inputs, targets)


def recipe(train: Any = "head", length: str = "4 epochs", **said: Any) -> lehr.Recipe:
    """One stage, in batches that divide the samples."""
    stage = {key: said.pop(key) for key in ("views", "until", "every") if key in said}
    return lehr.Recipe(
        [lehr.Stage(length, train=train, lr=0.02, **stage)],
        **{"batch_size": 8, "seed": 3, "cache": "require", **said},
    )


@dataclass
class Ran:
    """What a run came to: the loss of each step, its weights, its rows, and its events."""

    losses: list[float]
    weights: Mapping[str, torch.Tensor]
    history: tuple[Mapping[str, float], ...]
    events: list[Event]

    @property
    def cached(self) -> dict[str, PrefixCached]:
        """What was cached, by the half of the data."""
        return {e.data: e for e in self.events if isinstance(e, PrefixCached)}

    @property
    def closed(self) -> dict[str, CacheClosed]:
        """What the caches did, by the half of the data."""
        return {e.data: e for e in self.events if isinstance(e, CacheClosed)}

    @property
    def notes(self) -> str:
        """All notes, one a line."""
        return "\n".join(e.text for e in self.events if isinstance(e, Note))


def ran(
    said: lehr.Recipe,
    *,
    model: nn.Module | None = None,
    train: Any = None,
    valid: Any = "the usual",
    observed: Any = None,
    **more: Any,
) -> Ran:
    """A run on the CPU in fp32; `observed` is told of its events, too."""
    events: list[Event] = []
    result = lehr.fit(
        net() if model is None else model, images() if train is None else train,
        images(9, seed=5) if isinstance(valid, str) else valid, recipe=said, device="cpu", precision="fp32",
        observers=[events.append, *([observed] if observed else [])], **more,
    )  # fmt: skip
    losses = [loss for e in events if isinstance(e, StepsTaken) for loss in e.losses]
    rows = tuple({k: v for k, v in row.items() if k != "seconds"} for row in result.history)
    return Ran(losses, {k: v.clone() for k, v in result.model.state_dict().items()}, rows, events)


def same(one: Ran, other: Ran) -> bool:
    """Whether two runs came to the same bits."""
    return (
        one.losses == other.losses
        and one.history == other.history
        and all(torch.equal(one.weights[name], other.weights[name]) for name in one.weights)
    )


def close(one: Ran, other: Ran, within: float = 1e-4) -> bool:
    """Whether two runs came to nearly the same."""
    near = torch.allclose(torch.tensor(one.losses), torch.tensor(other.losses), atol=within)
    return near and all(
        torch.allclose(one.weights[n], other.weights[n], atol=10 * within) for n in one.weights
    )


class Own(Dataset[Any]):
    """A data set of a person's own, whose samples are what `make` gives for them."""

    def __init__(self, make: Any = None, data: TensorDataset | None = None) -> None:
        self._data, self._make = data or images(), make or (lambda image, _: image)
        self.drawn = 0

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.drawn += 1
        image, target = self._data[index]
        return self._make(image, index), target


def loader(data: Dataset[Any] | None = None, **said: Any) -> DataLoader[Any]:
    """A loader of a person's own, with a generator."""
    generator = torch.Generator().manual_seed(9)
    return DataLoader(data or images(), **{"batch_size": 8, "shuffle": True, "generator": generator, **said})
