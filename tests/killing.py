"""A three-stage run to be killed at random moments, and what is compared in the end: every bit of it."""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lehr
from lehr.data import Transform, open_data
from lehr.data.datasets import ImageSamples
from lehr.events import EpochEnded, Event, FreezeAudited, RunEnded, StageEnded, StageStarted, StepsTaken
from lehr.journal import effective, read_journal
from lehr.run.checkpoint import CheckpointFolder
from lehr.run.update import cross_entropy
from nursery import Kill, Nursery

RECIPE = lehr.Recipe(
    [
        lehr.Stage("2 epochs", train="head", lr=1e-2),
        lehr.Stage("2 epochs", train=["head", "last 1 blocks"], lr=1e-2, restore_best=True),
        lehr.Stage("2 epochs", train="all", lr=1e-2, restore_best=True),
    ],
    batch_size=4,
    accumulate=2,
    ema=0.9,
    clip_norm=1.0,
    schedule=lehr.warmup("10%") >> lehr.cosine(0.01),
)
KILLED = -9
_LINE = 32  # bytes


class Net(nn.Module):
    """Two blocks of convolution, batch-norm and dropout, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(_block(a, b) for a, b in ((1, 4), (4, 8))))
        self.fc = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.blocks(x).mean((2, 3)))


def _block(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.Dropout(0.2)
    )


def halves() -> tuple[ImageSamples, ImageSamples]:
    """25 digits, augmented at random; 40 to validate."""
    data = open_data("digits")
    transform = Transform((8, 8), 8, (0.3,), (0.35,), channels=1, augment=("crop", "flip"))
    return data.train(transform), data.valid(transform).part(range(40))


class Place:
    """Adds a line to a file wherever a run comes by, so that it can be killed there: an observer, and its loss."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._stage, self._loss = 0, cross_entropy()

    def __call__(self, event: Event) -> None:
        if isinstance(event, StageStarted):
            self._stage = event.stage
        elif isinstance(event, FreezeAudited):
            self._write("its end")
        elif isinstance(event, RunEnded):
            self._write("after the run's end")

    def loss(self, model: nn.Module, batch: Any) -> Any:
        self._write("an epoch" if model.training else "a validation")
        return self._loss(model, batch)

    def _write(self, what: str) -> None:
        said = what if "run" in what else f"stage {self._stage + 1}, {what}"
        os.write(self._file, said.ljust(_LINE - 1).encode() + b"\n")


def run(out: Path, *, workers: int = 0, seed: int = 0) -> None:
    """Begin the run in `out`, or go on with it; leave beside it a hash of the model that came of it."""
    torch.set_num_threads(1)
    torch.manual_seed(100 + seed)
    train, valid = halves()
    place = Place(out.with_suffix(".place"))
    result = lehr.fit(
        Net(), train, valid, recipe=dataclasses.replace(RECIPE, seed=seed), out=out, loss=place.loss,
        observers=[place], device="cpu", workers=workers, checkpoint="2 steps", resume="auto",
    )  # fmt: skip
    leave(result, out)


def leave(result: lehr.Result, out: Path) -> None:
    """Write down what `fit` returned, beside the directory `out`."""
    model = {name: _hash(tensor) for name, tensor in result.model.state_dict().items()}
    said = (model, [dict(row) for row in result.history], dict(result.best))
    out.with_suffix(".result").write_text(repr(said))


def warm_up() -> None:
    """Load all that a run needs."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder) / "run")


def outcome(out: Path) -> dict[str, str]:
    """All that a run ends with: a hash of every tensor of its last checkpoint and of its best weights; what its
    journal says of losses, epochs, stages and the end; what is counted; what `fit` returned.
    """
    found = CheckpointFolder(out / "checkpoints").newest()
    assert found is not None
    assert found.passed_over == ()
    state = found.snapshot.state
    events = [record.event for record in effective(read_journal(out / "journal.jsonl").records)]
    ends = [_timeless(e) for e in events if isinstance(e, (EpochEnded, FreezeAudited, StageEnded, RunEnded))]
    return {
        **{name: _hash(tensor) for name, tensor in found.snapshot.tensors.items()},
        **{f"best-{n}/{k}": _hash(t) for n, kept in found.snapshot.best.items() for k, t in kept.items()},
        "best.safetensors": sha256((out / "best.safetensors").read_bytes()).hexdigest(),
        "losses": repr([loss for e in events if isinstance(e, StepsTaken) for loss in e.losses]),
        "ends": repr(ends),
        "state": repr((state.at, state.history, state.best, state.frozen, state.optimizer, state.scalers)),
        "decided": repr((state.gauge, state.decisions, state.random)),
        "result": out.with_suffix(".result").read_text(),
    }  # fmt: skip


def _timeless(event: Event) -> Event:
    """An event without what the machine's speed is in."""
    if isinstance(event, EpochEnded):
        return dataclasses.replace(event, seconds=0.0, samples_per_second=0.0)
    return dataclasses.replace(event, seconds=0.0) if isinstance(event, RunEnded) else event


def _hash(tensor: torch.Tensor) -> str:
    values = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return sha256(f"{tuple(tensor.shape)} {tensor.dtype}".encode() + values.numpy().tobytes()).hexdigest()[
        :16
    ]


def differences(one: dict[str, str], other: dict[str, str]) -> list[str]:
    """The names of what is not equal."""
    return [name for name in {**one, **other} if one.get(name) != other.get(name)]


@dataclass(frozen=True)
class Trial:
    """One run that was killed and resumed: where it was killed each time, with how many workers its parts ran,
    what is not equal in the end, and what went wrong in words.
    """

    places: tuple[str, ...]
    workers: tuple[int, ...]
    different: tuple[str, ...]
    problem: str


@dataclass(frozen=True)
class Whole:
    """A run that was never stopped: what it ends with, the lines that `Place` wrote, and the seconds that it took
    by the number of workers.
    """

    outcome: dict[str, str]
    lines: int
    seconds: dict[int, float]


def whole(place: Nursery, folder: Path, *, workers: Sequence[int] = (0, 2)) -> Whole:
    """Run it once for each number of workers, which must make no difference."""
    seconds, outcomes = {}, []
    for count in workers:
        out = folder / f"whole-{count}"
        ended = place.run(partial(run, out, workers=count))
        assert ended.code == 0, ended.said
        seconds[count] = ended.seconds
        outcomes.append(outcome(out))
    assert all(one == outcomes[0] for one in outcomes)
    return Whole(outcomes[0], len(_places(out)), seconds)


def trial(place: Nursery, folder: Path, number: int, reference: Whole) -> Trial:
    """Kill a run one to three times, at random moments that `number` decides, and resume it until it is done.

    A moment is a line of `Place` and a while after it: so all parts of a run have their share, however fast the
    machine is; every tenth is before the first line. A run that was done before the first moment had come is begun again, with another one.
    """
    draw = random.Random(number)
    kills, out = draw.choice((1, 1, 1, 2, 3)), folder / f"trial-{number}"
    log = out.with_suffix(".place")
    places: list[str] = []
    workers: list[int] = []
    rest = reference.lines
    while len(places) < kills:
        workers.append(_another(workers, reference.seconds, draw))
        line, part = draw.randint(1, rest) if draw.random() < 0.9 else 0, draw.random()
        kill = _moment(line, part, reference.seconds[workers[-1]], reference.lines, log)
        ended = place.run(partial(run, out, workers=workers[-1]), kill=kill)
        if ended.code not in (0, KILLED):
            return Trial(tuple(places), tuple(workers), (), ended.said)
        if ended.code == KILLED:
            places.append((_places(out) or ["before its first batch"])[-1])
            rest = max(rest - line, 1)
        elif places:
            break
        else:
            shutil.rmtree(out)
            workers.clear()
        log.unlink(missing_ok=True)
    workers.append(_another(workers, reference.seconds, draw))
    ended = place.run(partial(run, out, workers=workers[-1]))
    different = differences(reference.outcome, outcome(out)) if ended.code == 0 else []
    shutil.rmtree(out)
    return Trial(tuple(places), tuple(workers), tuple(different), ended.said if ended.code else "")


def _moment(line: int, part: float, seconds: float, lines: int, log: Path) -> Kill:
    """A part of the time between two lines after `line`; a part of what is done before the first one."""
    if not line:
        return Kill(part * seconds / 2)
    return Kill(part * seconds / lines, log, line * _LINE)


def _another(before: Sequence[int], counts: Iterable[int], draw: random.Random) -> int:
    """Another number of workers than last time."""
    return draw.choice([count for count in counts if [count] != list(before[-1:])])


def _places(out: Path) -> list[str]:
    """By where a run came."""
    log = out.with_suffix(".place")
    return [line.strip() for line in log.read_text().splitlines()] if log.exists() else []
