"""A run of two short stages that is over in a blink, stopped after any step as by Ctrl-C, and what it came to."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

import lehr
from lehr.events import StepsTaken
from lehr.journal import effective, read_journal
from lehr.recipe import Recipe, Stage
from lehr.run import state as states
from lehr.run.update import cross_entropy

STEPS = 12


class Net(nn.Module):
    """A backbone with batch-norm and dropout, and a head."""

    def __init__(self, hidden: int = 8, classes: int = 3) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Dropout(0.3))
        self.fc = nn.Linear(hidden, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.body(x))


class HeadFirst(Net):
    """The same parts, registered in the other order."""

    def __init__(self) -> None:
        super().__init__()
        self._modules = dict(reversed(self._modules.items()))


def net(make: Callable[[], nn.Module] = Net, seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return make()


def data(samples: int = 20, seed: int = 2) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(samples, 6, generator=generator)
    return TensorDataset(inputs, inputs[:, :3].argmax(1))


def recipe(last: str = "2 epochs", lr: float = 0.02, **said: Any) -> Recipe:
    """Two epochs of the head, two of all; three steps in each."""
    stages = [Stage("2 epochs", train="head", lr=0.05), Stage(last, train="all", lr=lr, restore_best=True)]
    return Recipe(stages, **{"batch_size": 8, "ema": 0.9, "seed": 3, **said})


def fit(
    out: Path | None,
    *,
    stop: int | None = None,
    model: nn.Module | None = None,
    loss: Callable[[int | None], Any] | None = None,
    **said: Any,
) -> lehr.Result | None:
    """The run; with `stop`, Ctrl-C comes in that update of this process, and None is returned.

    `loss` makes the loss function, given `stop`, where it is not the built-in one.
    """
    usual = {
        "train": data(), "valid": data(9, seed=5), "recipe": recipe(), "device": "cpu", "precision": "fp32",
        "checkpoint": {"every": "1000 steps", "keep": 9}, "loss": (loss or pressing)(stop),
    }  # fmt: skip
    try:
        return lehr.fit(net() if model is None else model, **{**usual, **said}, out=out)
    except KeyboardInterrupt:
        assert stop is not None
        return None


def pressing(stop: int | None) -> Callable[[nn.Module, Any], Any]:
    """The built-in loss, under which Ctrl-C is pressed in the `stop`-th update."""
    press, usual = presser(stop), cross_entropy()

    def loss(model: nn.Module, batch: Any) -> Any:
        press(model)
        return usual(model, batch)

    return loss


def presser(stop: int | None) -> Callable[[nn.Module], None]:
    """Presses Ctrl-C the `stop`-th time that a model is trained on a batch."""
    done = 0

    def press(model: nn.Module) -> None:
        nonlocal done
        done += model.training
        if model.training and done == stop:
            signal.raise_signal(signal.SIGINT)

    return press


def came_to(result: lehr.Result | None) -> dict[str, Any]:
    """All that must be the same to the bit."""
    assert result is not None
    weights = {name: bits(tensor) for name, tensor in result.model.state_dict().items()}
    history = [{k: v for k, v in row.items() if k != "seconds"} for row in result.history]
    found = {"weights": weights, "history": repr(history), "best": repr(result.best)}
    if result.run:
        found["losses"] = repr(losses(result.run))
        found["best.safetensors"] = sha256((result.run / "best.safetensors").read_bytes()).hexdigest()
    return found


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def events(run: Path) -> list[Any]:
    """What the journal of a run tells, without what was lost and done again."""
    return [record.event for record in effective(read_journal(run / "journal.jsonl").records)]


def losses(run: Path) -> list[float]:
    return [loss for event in events(run) if isinstance(event, StepsTaken) for loss in event.losses]


def checkpoints(run: Path) -> list[Path]:
    """The JSON of each checkpoint, the oldest first."""
    return sorted((run / "checkpoints").glob("*-step-*.json"))


def forge(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change what a checkpoint's JSON says, and make its hash right again."""
    plain: dict[str, Any] = json.loads(path.read_bytes())
    change(plain)
    plain.pop("hash", None)
    path.write_text(json.dumps({**plain, "hash": states._hash(plain)}), encoding="utf-8")


def content(folder: Path) -> Mapping[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
