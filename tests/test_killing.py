"""A run that is stopped and resumed ends with the bits of the run that was never stopped."""

from __future__ import annotations

import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import lehr
from killing import Whole, differences, outcome, trial, warm_up, whole
from lehr.events import ConditionMet, Interrupted, RateReduced, RunEnded, StepsTaken
from lehr.journal import effective, read_journal
from lehr.run.checkpoint import CheckpointFolder
from nursery import Nursery, nursery
from variants import STEPS, Case, Stop, check, never_stopped, run, stopped

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="processes are copied")
_ONCE, _TWICE, _TERM = ("SIGINT",), ("SIGINT", "SIGINT"), ("SIGTERM",)
_LAST = 6 * STEPS - 1


@pytest.fixture(scope="module")
def place() -> Nursery:
    return nursery(warm_up)


@pytest.fixture(scope="module")
def reference(place: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return whole(place, tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def usual(place: Nursery, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return never_stopped(place, tmp_path_factory.mktemp("usual"), Case())


@pytest.mark.parametrize("number", range(10))
def test_killed_at_random_moments(place: Nursery, reference: Whole, tmp_path: Path, number: int) -> None:
    """A run that is killed one to three times, each time with another number of workers, ends with the same bits."""
    done = trial(place, tmp_path, number, reference)
    assert done.problem == ""
    assert done.different == ()
    assert done.places


def test_a_killed_run_leaves_no_processes(place: Nursery, reference: Whole, tmp_path: Path) -> None:
    """The processes that load samples end by themselves when the run that began them is killed."""
    trial(place, tmp_path, 5, reference)  # with workers when it is killed
    assert place.left(wait=60.0) == 0


@pytest.mark.parametrize(
    "stop",
    [
        Stop("training", 0),  # before the first update
        Stop("training", 1),  # within the first window: it is done again
        Stop("training", 2 * STEPS + 3),
        Stop("training", 2 * _LAST),  # the last update
        Stop("validation", 0),
        Stop("validation", 11),  # the last validation
        Stop("RunStarted"),
        *(Stop("StageStarted", n) for n in range(3)),
        *(Stop("EpochEnded", n) for n in (0, 1, 5)),
        *(Stop("FreezeAudited", n) for n in range(3)),
        *(Stop("StageEnded", n) for n in range(3)),
        Stop("RunEnded"),
    ],
    ids=lambda stop: f"{stop.at}-{stop.nth}",
)
def test_death_at_a_place(place: Nursery, usual: dict[str, str], tmp_path: Path, stop: Stop) -> None:
    """A run that dies at the given place ends with the same bits."""
    assert differences(usual, stopped(place, tmp_path / "stopped", Case(), stop)) == []


@pytest.mark.parametrize(
    ("stop", "steps"),
    [
        (Stop("RunStarted", 0, _ONCE), 1),
        (Stop("training", 0, _ONCE), 1),
        (Stop("training", 3, _TERM), 2),  # within a window
        (Stop("training", 2 * STEPS - 1, _ONCE), STEPS),  # the last update of an epoch
        (Stop("training", 2 * _LAST, _ONCE), _LAST + 1),
        (Stop("validation", 0, _ONCE), STEPS),
        (Stop("validation", 11, _TERM), _LAST + 1),
        (Stop("EpochEnded", 0, _ONCE), STEPS + 1),
        (Stop("FreezeAudited", 0, _ONCE), 2 * STEPS + 1),
        (Stop("StageEnded", 1, _TERM), 4 * STEPS + 1),
        (Stop("StageStarted", 2, _ONCE), 4 * STEPS + 1),
    ],
    ids=lambda said: f"{said.at}-{said.nth}-{said.how[0]}" if isinstance(said, Stop) else "",
)
def test_a_signal_at_a_place(
    place: Nursery, usual: dict[str, str], tmp_path: Path, stop: Stop, steps: int
) -> None:
    """Ctrl-C and SIGTERM finish the step and save it: nothing is done twice, and the bits are the same."""
    case, out = Case(more={"checkpoint": "1 hour"}), tmp_path / "stopped"
    ended = place.run(partial(run, case, out, stop))
    assert ended.code == 128 + signal.Signals[stop.how[0]], ended.said
    found = CheckpointFolder(out / "checkpoints").newest()
    assert found
    assert found.snapshot.state.at.step == steps
    expected = {**usual, "state": ""}
    assert differences(expected, {**stopped(place, out, case), "state": ""}) == []
    records = read_journal(out / "journal.jsonl")
    assert [r.event for r in records if isinstance(r.event, Interrupted)] == [Interrupted(steps)]
    lost = [r for r in records if isinstance(r.event, StepsTaken) and r not in effective(records.records)]
    assert lost == []


def test_a_second_ctrl_c(place: Nursery, usual: dict[str, str], tmp_path: Path) -> None:
    """A second Ctrl-C leaves at once, within the step, and the run can be gone on with all the same."""
    stop = Stop("training", 4 * STEPS + 3, _TWICE)
    assert differences(usual, stopped(place, tmp_path / "stopped", Case(), stop)) == []


def test_a_signal_after_the_last_step(place: Nursery, usual: dict[str, str], tmp_path: Path) -> None:
    """A Ctrl-C when all is done stops nothing any more."""
    ended = place.run(partial(run, Case(), tmp_path / "stopped", Stop("StageEnded", 2, _ONCE)))
    assert ended.code == 0, ended.said
    assert differences(usual, outcome(tmp_path / "stopped")) == []


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("generator", [False, True], ids=["global", "own"])
def test_a_loader_of_ones_own(place: Nursery, tmp_path: Path, generator: bool, workers: int) -> None:
    """A shuffled DataLoader with random samples goes on within an epoch, whatever generator it draws from."""
    case = Case(loader=True, generator=generator, workers=workers)
    stops = (
        Stop("training", 2 * STEPS + 3),
        Stop("training", 4, _ONCE),
        Stop("validation", 3),
        Stop("EpochEnded"),
    )
    check(place, tmp_path, case, *stops)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_loss_with_a_memory(place: Nursery, tmp_path: Path, precision: str) -> None:
    """A loss that is a module with a buffer, and draws from `random` and numpy, goes on as it was, in any precision."""
    case = Case(own_loss=True, more={"precision": precision})
    check(place, tmp_path, case, Stop("training", 2 * STEPS + 3), Stop("training", 4, _ONCE))


@pytest.mark.parametrize(
    "optimizer",
    [
        {"name": "sgd"},
        {"name": "sgd", "momentum": 0.9, "nesterov": True},
        {"name": "adam", "amsgrad": True},
        {"name": "adamw", "foreach": True},
        {"name": "rmsprop", "momentum": 0.5, "centered": True},
        *(
            {"name": n}
            for n in ("adagrad", "adadelta", "adafactor", "nadam", "radam", "adamax", "rprop", "asgd")
        ),
    ],
    ids=lambda said: "-".join(map(str, said.values())),
)
def test_every_optimizer(place: Nursery, tmp_path: Path, optimizer: dict[str, Any]) -> None:
    """What an optimizer remembers of each parameter comes back to the bit."""
    if not hasattr(torch.optim, "Adafactor") and optimizer["name"] == "adafactor":
        pytest.skip("this torch has no Adafactor")
    case = Case(recipe={"optimizer": optimizer, "weight_decay": 0.0})
    check(place, tmp_path, case, Stop("training", 6 * STEPS + 3))


_RESTORING = tuple(
    lehr.Stage(length, train=train, lr=lr, restore_best=True)
    for length, train, lr in (
        ("4 epochs", "head", 1e-2),
        ("4 epochs", ["head", "1"], 1e-1),
        ("9 epochs", "all", 0.5),
    )
)


@pytest.mark.parametrize("nth", [1, 4, 10, 11])
def test_patience_and_the_best(place: Nursery, tmp_path: Path, nth: int) -> None:
    """Counters of patience, the best of each stage and the few best of the run go on; the run ends as early."""
    case = Case(
        recipe={"patience": "2 epochs", "monitor": "valid_loss", "ema": None}, stages=_RESTORING,
        more={"checkpoint": {"every": "1 step", "keep_best": 3}},
    )  # fmt: skip
    check(place, tmp_path, case, Stop("EpochEnded", nth))
    events = [record.event for record in read_journal(tmp_path / "whole" / "journal.jsonl")]
    assert [event.reason for event in events if isinstance(event, RunEnded)] == ["patience"]


_DECIDING = (
    lehr.Stage("6 epochs", train="head", lr=1e-2, until="train_loss < 99", every="4 steps"),
    lehr.Stage("4 epochs", train="all", lr=0.5, until="train_loss plateaus 2 steps", every="2 steps", reduce={"by": 0.1, "times": 1}),
    lehr.Stage("1 epoch", train="head", lr=1e-2),
)  # fmt: skip


@pytest.fixture(scope="module")
def deciding(place: Nursery, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("deciding")
    ended = never_stopped(place, folder, Case(stages=_DECIDING))
    events = [record.event for record in read_journal(folder / "whole" / "journal.jsonl")]
    assert next((e.stage, e.step) for e in events if isinstance(e, ConditionMet)) == (0, 4)
    assert [e.stage for e in events if isinstance(e, RateReduced)] == [1]
    return ended


@pytest.mark.parametrize(
    "stop",
    [
        *(Stop("training", n) for n in (5, 6, 7, 8)),  # the windows of steps 2 to 4, in the last of which the gate opens
        *(Stop("ConditionMet", n) for n in (0, 1)),
        Stop("RateReduced"),
        Stop("EpochEnded", 1),
        Stop("StageEnded"),
        Stop("training", 6, _ONCE),
        Stop("ConditionMet", 0, _ONCE),
        Stop("RateReduced", 0, _TERM),
    ],
    ids=lambda stop: f"{stop.at}-{stop.nth}-{stop.how[0]}",
)  # fmt: skip
@pytest.mark.parametrize("often", ["1 step", "3 steps", "1 hour"])
def test_death_beside_a_decision(
    place: Nursery, deciding: dict[str, str], tmp_path: Path, stop: Stop, often: str
) -> None:
    """A run that dies, or is stopped, just before or after its gate opens or its rates are reduced, decides the same once
    more, and ends with the same bits, from whichever checkpoint it goes on.
    """
    case = Case(stages=_DECIDING, more={"checkpoint": often})
    expected = {**deciding, "state": ""}
    assert differences(expected, {**stopped(place, tmp_path / "stopped", case, stop), "state": ""}) == []


_TURNS = (
    lehr.Stage(
        "3 epochs",
        objectives=[
            lehr.Objective("a", train="head", lr=1e-2, repeat=2),
            lehr.Objective("b", train=["0", "1"], lr=1e-2, every=2, optimizer="sgd"),
        ],
        until="train_a_loss < 99",
        every="5 steps",
    ),
    lehr.Stage("1 epoch", objectives=[lehr.Objective("b", train=["0", "1"], lr=1e-2, optimizer="sgd")]),
)


@pytest.mark.parametrize("loader", [False, True], ids=["samples", "loader"])
def test_turns(place: Nursery, tmp_path: Path, loader: bool) -> None:
    """Objectives go on after death in any turn, and after Ctrl-C, from the last batch on which all had theirs; over a
    shuffled loader of one's own with random samples as well.
    """
    case = Case(stages=_TURNS, loader=loader)
    check(
        place,
        tmp_path,
        case,
        Stop("training", 3),
        Stop("training", 5, _ONCE),
        Stop("EpochEnded"),
        Stop("training", 1),
    )


def test_rounds_that_are_nobodys(place: Nursery, tmp_path: Path) -> None:
    """Over a shuffled loader of one's own with random samples, a run goes on to the same bits from beside a batch on which
    no objective has its turn: such a batch is drawn when its time comes, not before.
    """
    turns = [
        lehr.Objective("a", train="head", lr=1e-2, every=3),
        lehr.Objective("b", train=["0", "1"], lr=1e-2, every=2),
    ]
    case = Case(stages=(lehr.Stage("4 epochs", objectives=turns),), loader=True, recipe={"accumulate": 1})
    for nth in (0, 1, 2, 3):
        folder = tmp_path / str(nth)
        folder.mkdir()
        check(place, folder, case, Stop("training", nth, _ONCE), Stop("training", 1, _ONCE))
