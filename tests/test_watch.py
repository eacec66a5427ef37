"""What is told while it runs: each step's loss once, in order, in time, and also when an epoch breaks off."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import lehr
from lehr.errors import NonFiniteError, RunError
from lehr.journal import Event, Interrupted, Note, Progressed, RunFailed, StepsTaken, read_journal
from lehr.planning import Plan
from lehr.recipe import Recipe, Stage
from lehr.run.folder import RunFolder
from lehr.run.watch import EpochWatch, non_finite, telling, trained


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
    ],
    ids=["interrupt", "error", "exit"],
)
def test_what_stops_a_run_is_told_last(tmp_path: Path, error: BaseException, last: Event) -> None:
    """The journal ends with how many updates were done and why it stopped, and is closed."""
    folder = RunFolder.create(tmp_path / "run")

    def stopped(fail: Callable[[], None]) -> None:
        with telling(folder, ()) as tell:
            tell(StepsTaken(0, 7, (1.0,) * 7))
            fail()

    def fail() -> None:
        raise error

    with pytest.raises(type(error)):
        stopped(fail)
    assert read_journal(folder.journal).records[-1].event == last
