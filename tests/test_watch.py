"""What is told while it runs: each step's loss once, in order, in time, and also when an epoch breaks off."""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import lehr
from lehr.errors import FeedError, NonFiniteError, RunError
from lehr.events import Event, Interrupted, Note, Progressed, RunFailed, StepsTaken
from lehr.journal import Journal, read_journal
from lehr.line_file import LineFile
from lehr.planning import Plan
from lehr.recipe import Recipe, Stage
from lehr.run.state import SoFar
from lehr.run.watch import EpochWatch, non_finite, telling, trained

FROM_WORKER = (
    "Caught DataError in DataLoader worker process 0.\nTraceback ...\nlehr.errors.DataError: a.png: gone"
)


class Clock:
    """Seconds that pass only when they are told to."""

    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


def plan(steps: int = 250) -> Plan:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    recipe = Recipe([Stage(f"{steps} steps", train="1", lr=0.5, schedule=lehr.linear())], batch_size=2)
    return lehr.plan(recipe, net, samples=2 * steps)


def watching(steps: int = 250) -> tuple[EpochWatch, list[Event], Clock]:
    told: list[Event] = []
    clock, planned = Clock(), plan(steps)
    return EpochWatch(planned, planned.stages[0], (0, 0, steps), told.append, clock), told, clock


def taken(told: list[Event]) -> list[StepsTaken]:
    return [event for event in told if isinstance(event, StepsTaken)]


def test_every_loss_is_told_once_and_in_order() -> None:
    """`StepsTaken` carries every loss of the epoch exactly once, a hundred at a time."""
    watch, told, _ = watching()
    losses = torch.randn(250).tolist()
    for loss in losses:
        watch.add(torch.tensor(loss), 2)
    row = watch.finish()
    assert [(event.start, event.stop) for event in taken(told)] == [(0, 100), (100, 200), (200, 250)]
    assert [loss for event in taken(told) for loss in event.losses] == losses
    assert row["train_loss"] == pytest.approx(sum(losses) / 250, rel=1e-12, abs=1e-12)


def test_the_mean_counts_samples() -> None:
    """`train_loss` weighs each step by its samples."""
    watch, _, _ = watching(2)
    watch.add(torch.tensor(1.0), 3)
    watch.add(torch.tensor(5.0), 1)
    assert watch.finish() == {"train_loss": 2.0}


def test_losses_are_read_back_when_a_bar_would_move_and_not_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a loss makes a device wait: between two refreshes none is read, and a refresh reads all that
    wait at once."""
    reads = []
    stack = torch.stack
    monkeypatch.setattr(torch, "stack", lambda tensors: reads.append(len(tensors)) or stack(tensors))
    watch, told, clock = watching(60)
    for step in range(60):
        clock.now += 1 / 256
        watch.add(torch.tensor(float(step)), 2)
    watch.finish()
    assert reads == [26, 26, 8]
    progress = [event for event in told if isinstance(event, Progressed)]
    assert [event.step for event in progress] == [26, 52, 60]
    assert progress[0].loss == 12.5, "the mean so far"
    assert progress[0].samples_per_second == 2 * 256
    assert progress[0].lr == {"1": plan(60).lr("1")[25]}
    assert (progress[1].epoch_start, progress[1].epoch_stop) == (0, 60)
    assert watch.samples_per_second == 2 * 256
    assert watch.seconds == 60 / 256


def test_the_newest_loss_is_left_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refresh reads those before it, so that a device has a step to go on with; in the end all are read, each in its place."""
    monkeypatch.setattr("lehr.run.watch._is_here", lambda _: False)
    watch, told, clock = watching(60)
    for step in range(60):
        clock.now += 1 / 256
        watch.add(torch.tensor(float(step)), 1 + step % 2)
    assert [event.step for event in told if isinstance(event, Progressed)] == [25, 51]
    expected = sum(step * (1 + step % 2) for step in range(60)) / 90
    assert watch.finish() == {"train_loss": expected}
    assert [loss for event in told if isinstance(event, StepsTaken) for loss in event.losses] == list(
        range(60)
    )


def test_too_few_batches_are_an_error() -> None:
    """An epoch that gave fewer batches than planned says how many, counted from one for people."""
    watch, _, _ = watching(5)
    watch.add(torch.tensor(1.0), 2)
    with pytest.raises(
        RunError, match=r"epoch 1 gave batches for 1 steps, not the 5 planned; a DataLoader must give"
    ):
        watch.finish()


def test_a_loss_that_is_not_finite_names_its_own_step() -> None:
    """However late it is read, the error names the step, and the steps before it are told."""
    watch, told, _ = watching(20)

    def run() -> None:
        with watch:
            for step in range(10):
                watch.add(torch.tensor(math.inf if step == 3 else 1.0), 2)
            watch.finish()

    with pytest.raises(NonFiniteError, match=r"the loss is inf at step 3 \(stage 1, '1'; rates: .*\)"):
        run()
    assert taken(told) == [StepsTaken(0, 3, (1.0, 1.0, 1.0))]


@pytest.mark.parametrize("broken", [KeyboardInterrupt, ValueError])
def test_an_epoch_that_breaks_off_tells_of_what_was_done(broken: type[BaseException]) -> None:
    """Steps that were done are told, and the error goes on its way."""
    watch, told, _ = watching(20)

    def run() -> None:
        with watch:
            for step in range(7):
                watch.add(torch.tensor(float(step)), 2)
            raise broken

    with pytest.raises(broken):
        run()
    assert taken(told) == [StepsTaken(0, 7, tuple(float(step) for step in range(7)))]


def test_the_message_of_a_non_finite_loss() -> None:
    """It says at which step, stage and rates, and what to try; clipping only where there is none."""
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    stages = [Stage("3 steps", train="1", lr=0.5), Stage("3 steps", train="all", lr={"1": 0.25, "0": 1e-3})]
    for clip in (None, 1.0):
        recipe = Recipe(stages, schedule=lehr.constant(), clip_norm=clip)
        message = non_finite("the loss is nan", 4, lehr.plan(recipe, net, samples=96))
        assert message.startswith("the loss is nan at step 4 (stage 2, 'all'; rates: ")
        assert "0.25" in message
        assert "0.001" in message
        assert ("clip_norm = 1.0" in message) == (clip is None)
    plan = lehr.plan(Recipe(stages, schedule=lehr.linear(0, length="1 step")), net, samples=96)
    assert trained(plan[2].lr, plan.stages[0]) == {"1": 0.0}  # at rate 0, but it trains; "0" is frozen


def test_an_observer_that_raises_is_left_out() -> None:
    """It is warned about once and then not called; the others hear everything."""
    heard: list[Event] = []
    calls = []

    def bad(event: Event) -> None:
        calls.append(event)
        raise ValueError("mine")

    with telling(None, [bad, heard.append]) as tell:
        with pytest.warns(
            RuntimeWarning, match=r"the observer .*bad.* raised ValueError\('mine'\) and is left out"
        ):
            tell(Note("one"))
        tell(Note("two"))
    assert calls == [Note("one")]
    assert heard == [Note("one"), Note("two")]


@pytest.mark.parametrize(
    ("error", "last"),
    [
        (KeyboardInterrupt(), Interrupted(7)),
        (ValueError("boom"), RunFailed(7, 0, "ValueError: boom")),
        (SystemExit(3), RunFailed(7, 0, "SystemExit: 3")),
        (SystemExit(143), Interrupted(7)),
        (KeyError(), RunFailed(7, 0, "KeyError: KeyError")),
        (FeedError(FROM_WORKER), RunFailed(7, 0, "FeedError: a.png: gone")),
    ],
    ids=["interrupt", "error", "exit", "terminated", "without words", "from a worker"],
)
def test_what_stops_a_run_is_told_last(tmp_path: Path, error: BaseException, last: Event) -> None:
    """The journal ends with how many updates were done and why it stopped, in plain words, and is closed."""
    journal = Journal(tmp_path / "journal.jsonl")

    def stopped(fail: Callable[[], None]) -> None:
        with telling(journal, ()) as tell:
            tell(StepsTaken(0, 7, (1.0,) * 7))
            fail()

    def fail() -> None:
        raise error

    with pytest.raises(type(error)):
        stopped(fail)
    assert read_journal(journal.path).records[-1].event == last
    with pytest.raises(ValueError, match="is closed"):
        journal(Note("too late"))


def test_a_run_that_goes_on_fails_where_it_is() -> None:
    """What fails before anything was told has the step and the stage that the run goes on from."""
    heard: list[Event] = []

    def failing() -> None:
        with telling(None, [heard.append], 40, 2):
            raise ValueError("boom")

    with pytest.raises(ValueError, match="boom"):
        failing()
    assert heard == [RunFailed(40, 2, "ValueError: boom")]


def test_a_journal_that_cannot_be_written_is_told_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is full stops nothing: observers hear of it once, and everything else as always."""
    heard: list[Event] = []
    journal = Journal(tmp_path / "journal.jsonl")
    write = LineFile._write
    full = True

    def limited(lines: LineFile, line: bytes) -> None:
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(lines, line)

    monkeypatch.setattr(LineFile, "_write", limited)
    events = [StepsTaken(step, step + 1, (1.0,)) for step in range(4)]
    with telling(journal, [heard.append]) as tell:
        for event in events[:3]:
            tell(event)
        full = False
        tell(events[3])
    (note,) = [event for event in heard if isinstance(event, Note)]
    assert "No space left" in note.text
    assert note.text.endswith("; training goes on, and what the journal lacks is tried again")
    assert [event for event in heard if event != note] == events
    assert [r.event for r in read_journal(journal.path)] == [events[0], note, *events[1:]]
    assert journal.problem == ""


def test_an_epoch_that_is_gone_on_with_has_counted_what_was_done() -> None:
    """The mean of an epoch in two parts is that of the whole, and each step is told once, under its number."""
    losses = torch.randn(30).tolist()
    whole, _, _ = watching(30)
    for loss in losses:
        whole.add(torch.tensor(loss), 2)
    first, told, clock = watching(30)
    for loss in losses[:11]:
        first.add(torch.tensor(loss), 2)
    clock.now += 4.0
    so_far = first.so_far()
    assert (so_far.samples, so_far.seconds) == (22, 4.0)
    planned = plan(30)
    second = EpochWatch(
        planned, planned.stages[0], (0, 0, 30), told.append, clock, at=11, so_far=so_far
    )  # fmt: skip
    clock.now += 2.0
    for loss in losses[11:]:
        second.add(torch.tensor(loss), 2)
    assert second.finish() == whole.finish()
    assert [(event.start, event.stop) for event in taken(told)] == [(0, 11), (11, 30)]
    assert [loss for event in taken(told) for loss in event.losses] == losses
    assert second.seconds == 6.0
    assert second.samples_per_second == 2 * 19 / 2.0, "of this process's own time"


def test_an_epoch_whose_steps_were_all_done_has_nothing_to_tell() -> None:
    """Where only the validation was missing, the epoch's row is that of the steps before."""
    told: list[Event] = []
    planned = plan(30)
    counted = SoFar(loss_sum=30.0, samples=60, seconds=3.0)
    with EpochWatch(
        planned, planned.stages[0], (0, 0, 30), told.append, Clock(), at=30, so_far=counted
    ) as watch:
        assert watch.finish() == {"train_loss": 0.5}
    assert taken(told) == []
