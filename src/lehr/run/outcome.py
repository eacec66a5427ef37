"""What a run has come to, to the bit, and how two runs differ in it. It reads a run's directory and changes nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from lehr.errors import RunError
from lehr.events import EpochEnded, FreezeAudited, StageStarted, StepsTaken
from lehr.journal import effective, read_journal
from lehr.run.checkpoint import CheckpointFolder
from lehr.run.folder import RunFolder
from lehr.run.state import DamageError, State


@dataclass(frozen=True)
class Outcome:
    """What a run has come to: its last checkpoint's tensors and state, its best weights (as `best/...`), the
    losses of its steps, and its epochs, as the journal tells them.
    """

    tensors: Mapping[str, torch.Tensor]
    state: State
    losses: tuple[float, ...]
    epochs: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Audit:
    """What a stage kept frozen: counts of parameters and buffers, which have the bits of its start."""

    label: str
    parameters: int
    buffers: int


def outcome(run: Path) -> Outcome:
    """What the run in this directory has come to.

    Raises:
        RunError: where it has no good checkpoint, no best weights or no journal.
    """
    folder = RunFolder(run)
    try:
        found = CheckpointFolder(folder.checkpoints).newest()
        best = load_file(folder.weights)
    except (DamageError, OSError) as why:
        raise RunError(f"{run}: has not ended whole: {why}") from None
    if found is None:
        raise RunError(f"{run}: has no checkpoint, so it has not ended whole")
    events = _events(run)
    return Outcome(
        {**found.snapshot.tensors, **{f"best/{name}": tensor for name, tensor in best.items()}},
        found.snapshot.state,
        tuple(loss for event in events if isinstance(event, StepsTaken) for loss in event.losses),
        tuple(_row(event) for event in events if isinstance(event, EpochEnded)),
    )


def audits(run: Path) -> tuple[Audit, ...]:
    """What each stage of the run kept frozen."""
    labels = {event.stage: event.label for event in _events(run) if isinstance(event, StageStarted)}
    return tuple(
        Audit(labels[event.stage], event.parameters, event.buffers)
        for event in _events(run)
        if isinstance(event, FreezeAudited)
    )


def differences(whole: Outcome, other: Outcome) -> tuple[str, ...]:
    """How `other` differs from `whole`, a line for each kind of thing; nothing where every bit is the same.

    Of losses and epochs the first that differs is named, of tensors the first by the checkpoint's order, with
    the largest difference between two numbers of it.
    """
    return (
        *_in_losses(whole.losses, other.losses),
        *_in_tensors(whole.tensors, other.tensors),
        *_in_epochs(whole.epochs, other.epochs),
        *_in_state(whole.state, other.state),
    )


def _events(run: Path) -> list[Any]:
    return [record.event for record in effective(read_journal(RunFolder(run).journal).records)]


def _row(event: EpochEnded) -> dict[str, Any]:
    return {"epoch": event.epoch, "step": event.step, "train_loss": event.train_loss, **event.metrics, "best": event.best}  # fmt: skip


def _in_losses(whole: tuple[float, ...], other: tuple[float, ...]) -> Iterator[str]:
    if len(whole) != len(other):
        yield f"the journal has {len(other)} losses, not {len(whole)}"
        return
    odd = [step for step, (a, b) in enumerate(zip(whole, other, strict=True)) if not _same_number(a, b)]
    if odd:
        step = odd[0]
        more = f" (and {len(odd) - 1} later ones)" if len(odd) > 1 else ""
        yield f"the loss of step {step}{more}: {other[step]!r}, not {whole[step]!r}"


def _in_tensors(whole: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> Iterator[str]:
    for words, names in (
        ("lacks", whole.keys() - other.keys()),
        ("has besides", other.keys() - whole.keys()),
    ):
        if names:
            yield f"it {words} {_named(sorted(names))}"
    odd = [name for name, tensor in whole.items() if name in other and not _same_bits(tensor, other[name])]
    if odd:
        first = odd[0]
        yield f"{_named(odd)} of {len(whole)} tensors: {first} by {_by(whole[first], other[first])}"


def _in_epochs(whole: tuple[Mapping[str, Any], ...], other: tuple[Mapping[str, Any], ...]) -> Iterator[str]:
    if len(whole) != len(other):
        yield f"the journal has {len(other)} epochs, not {len(whole)}"
        return
    for ours, theirs in zip(whole, other, strict=True):
        for key in ours:
            if key not in theirs or not _same_number(ours[key], theirs[key]):
                yield f"{key} of epoch {ours['epoch'] + 1}: {theirs.get(key)!r}, not {ours[key]!r}"
                return


def _in_state(whole: State, other: State) -> Iterator[str]:
    """Counters, early stopping, what is no tensor of optimizer and random states; not the lines of the journal,
    the time, and how often it was saved.
    """
    ours, theirs = (
        replace(state, records=0, seconds=0.0, files={}, settings=whole.settings) for state in (whole, other)
    )
    odd = [f.name for f in fields(State) if repr(getattr(ours, f.name)) != repr(getattr(theirs, f.name))]
    if odd:
        yield f"the checkpoint's state: {', '.join(odd)}"


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    ours, theirs = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(ours, theirs)


def _by(a: torch.Tensor, b: torch.Tensor) -> str:
    """The largest difference between two numbers of the tensors, or how their forms differ."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return f"its form, {tuple(b.shape)} {b.dtype}, not {tuple(a.shape)} {a.dtype}"
    return f"up to {(a.double() - b.double()).abs().max().item():.3g}"


def _same_number(a: Any, b: Any) -> bool:
    both_nan = isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b)
    return a == b or both_nan


def _named(names: list[str]) -> str:
    return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]
