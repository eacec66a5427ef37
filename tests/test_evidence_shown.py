"""What evidence decided, and whose losses they are, as a person sees it: lines, bars, pictures, TensorBoard."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from lehr.events import (
    ConditionMet,
    EpochEnded,
    Event,
    Progressed,
    RateReduced,
    RunStarted,
    StageEnded,
    StageStarted,
    StepsTaken,
)
from lehr.journal import Journal
from lehr.recipe import Recipe, Stage
from lehr.report.following import PlanPicture
from lehr.report.picture import draw_plan
from lehr.resolving import resolve
from lehr.schedules import constant
from plans import NET
from test_progress import Terminal, drawn

RUN = RunStarted("0.1.0", "5f0c", 400, 40, 320, 0, "cpu", "fp32", 2)
MET = ConditionMet(0, 25, "train_error < 0.8", 0.7912, 375, 38)
COOLED = RateReduced(1, 95, "valid_loss plateaus 3 epochs", 0.51234, 0.1)
WAITING = Recipe(
    [
        Stage("5 epochs", train="head", lr=0.01, until="train_error < 0.8", every="5 steps", schedule=constant()),
        Stage("4 epochs", train="all", lr=0.1, until="valid_loss plateaus 1 epoch", reduce=0.1, schedule=constant()),
    ],
    batch_size=32,
)  # fmt: skip


def test_the_lines() -> None:
    """The end of a stage on evidence is a line with condition, value and the new length of the run, and later epochs
    count up to that; a cooling is one with the factor; the `until` of a stage's end is not told twice.
    """
    epoch = EpochEnded(2, 0, 25, 2.1, {"train_error": 0.79}, {"head": 0.01}, 1.0, 100.0, False)
    events: list[Event] = [RUN, MET, epoch, StageEnded(0, 25, "until", None), COOLED]
    assert drawn(events, mode="lines", columns=200).splitlines()[1:] == [
        "stage 1 ends after step 25: train_error < 0.8 · train_error=0.7912 · 38 epochs, 375 steps in all",
        "epoch  3/38 · train_loss=2.100 train_error=0.7900 · lr head=1.0e-02 · 100 samples/s · 1.0 s",
        "stage 2 cools after step 95: valid_loss plateaus 3 epochs · valid_loss=0.5123 · rates times 0.1",
    ]


def test_the_bar_has_each_loss_by_its_name() -> None:
    """In a stage with objectives the bar and the epoch's line have each loss by its name, not their mean."""
    stage = StageStarted(0, "d: discriminator, g: generator", 0, 20, 0, 1, 9, 9, {"d/all": 1e-3})
    move = Progressed(10, 0, 0, 0, 20, 0.9, {"d/all": 1e-3}, 99.0, {"d": 0.693, "g": 1.204})
    shown = drawn([RUN, stage, move], columns=140)
    assert "d_loss=0.6930 g_loss=1.204" in shown
    assert " loss=" not in shown
    epoch = EpochEnded(
        0, 0, 20, 0.9, {"train_d_loss": 0.7, "train_g_loss": 1.2}, {"d/all": 1e-3}, 1.0, 99.0, False
    )
    later = Progressed(21, 0, 1, 20, 40, 0.9, {"d/all": 1e-3}, 99.0, {"d": 0.6, "g": 1.2})
    assert "train_d_loss" not in drawn([RUN, stage, epoch, later], columns=140).rpartition("epoch 2")[2]
    line = drawn([RUN, stage, epoch], columns=140, mode="lines").splitlines()[-1]
    assert "train_d_loss=0.7000 train_g_loss=1.200" in line
    assert "train_loss" not in line


@pytest.mark.parametrize("columns", [20, 40, 60, 80])
def test_on_a_narrow_terminal(columns: int) -> None:
    """Lines about evidence are folded to the terminal's width."""
    shown = drawn([RUN, MET, COOLED], columns=columns, mode="lines", stream=Terminal())
    assert max(map(len, shown.splitlines())) < columns


def test_the_picture_has_marks(tmp_path: Path) -> None:
    """A plan's picture says where a stage ends at the latest, and why; with decisions, where it ended and cooled."""
    plan = resolve(WAITING, NET, samples=320)
    draw_plan(plan, tmp_path / "plan.svg")
    text = (tmp_path / "plan.svg").read_text(encoding="utf-8")
    assert "when train_error &lt; 0.8, at the latest here" in text
    assert "rates x 0.1 when valid_loss plateaus 1 epoch, until here" in text
    picture = PlanPicture(plan, tmp_path / "now.svg", tmp_path / "journal.jsonl")
    picture(StageEnded(0, 25, "length", None))
    assert not (tmp_path / "now.svg").exists()  # nothing was decided
    picture(ConditionMet(0, 25, "train_error < 0.8", 0.79, 65, 7))
    picture(RateReduced(1, 45, "valid_loss plateaus 1 epoch", 0.5, 0.1))
    text = (tmp_path / "now.svg").read_text(encoding="utf-8")
    assert "train_error &lt; 0.8, at 25" in text
    assert "rates x 0.1: valid_loss plateaus 1 epoch, at 45" in text
    assert "train_error &lt; 0.8, at the latest" not in text


def test_the_picture_of_a_run_that_goes_on(tmp_path: Path) -> None:
    """A run that goes on draws what its journal says was decided before, together with what is decided now."""
    plan = resolve(WAITING, NET, samples=320)
    with Journal(tmp_path / "journal.jsonl") as journal:
        journal(StepsTaken(0, 1, (1.0,)))
        journal(ConditionMet(0, 25, "train_error < 0.8", 0.79, 65, 7))
    picture = PlanPicture(plan, tmp_path / "now.svg", tmp_path / "journal.jsonl")
    picture(RateReduced(1, 45, "valid_loss plateaus 1 epoch", 0.5, 0.1))
    assert "train_error &lt; 0.8, at 25" in (tmp_path / "now.svg").read_text(encoding="utf-8")


def test_tensorboard_has_marks_and_names(tmp_path: Path) -> None:
    """TensorBoard gets each objective's losses by its name, and a point where a stage ended or cooled on evidence."""
    pytest.importorskip("tensorboard")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own imports
        from lehr.run.tensorboard import tensorboard
        from test_tensorboard import read

        observer = tensorboard(tmp_path)
        for event in (StepsTaken(0, 3, (0.5, 1.5, 0.25), ("d", "g", "d")), MET, COOLED):
            observer(event)
        observer.close()
        found = read(tmp_path)
    assert found["train/d_loss"] == [(0, 0.5), (2, 0.25)]
    assert found["train/g_loss"] == [(1, 1.5)]
    assert found["stage/1: train_error < 0.8"] == [(25, pytest.approx(0.7912))]
    assert found["stage/2: valid_loss plateaus 3 epochs"] == [(95, pytest.approx(0.51234))]
