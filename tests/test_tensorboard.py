"""TensorBoard: what is written there is what the events said."""

from __future__ import annotations

import sys
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest

from lehr.errors import RequestError
from lehr.events import EpochEnded, Interrupted, Note, Progressed, Resumed, RunEnded, RunFailed, StepsTaken
from lehr.run.tensorboard import tensorboard


@pytest.fixture
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard is there, and each of its files is made in a second of its own.

    It names files by the second and reads them in the order of their names.
    """
    writer = pytest.importorskip("tensorboard.summary.writer.event_file_writer")
    seconds = count(1795438800)
    monkeypatch.setattr(writer, "time", SimpleNamespace(time=lambda: float(next(seconds))))


def read(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The points that TensorBoard shows of a folder, by tag."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def epoch(number: int, loss: float) -> EpochEnded:
    """The end of an epoch of two steps."""
    return EpochEnded(number, 0, 2 * number + 2, loss, {"valid_loss": loss}, {"head": 0.5}, 1.0, 9.0, True)


@pytest.mark.usefixtures("_installed")
def test_the_numbers_are_read_back(tmp_path: Path) -> None:
    """Losses are there by step, rates and metrics by an epoch's last step, as float32."""
    observer = tensorboard(tmp_path / "runs" / "tb")
    observer(StepsTaken(0, 2, (2.5, 2.25)))
    observer(Progressed(2, 0, 0, 0, 3, 2.25, {"head": 1e-3}, 10.0))
    observer(Note("nothing to draw"))
    observer(StepsTaken(2, 3, (2.0,)))
    lr = {"head": 0.5, "backbone": 0.125}
    observer(EpochEnded(0, 0, 3, 2.25, {"valid_loss": 1.5, "valid_accuracy": 0.75}, lr, 1.0, 9.0, True))
    observer(RunEnded(3, "length", 0, {}, 1.0))
    observer.close()
    assert read(tmp_path / "runs" / "tb") == {
        "train/loss": [(0, 2.5), (1, 2.25), (2, 2.0)],
        "lr/head": [(2, 0.5)],
        "lr/backbone": [(2, 0.125)],
        "epoch/train_loss": [(2, 2.25)],
        "epoch/valid_loss": [(2, 1.5)],
        "epoch/valid_accuracy": [(2, 0.75)],
    }


@pytest.mark.usefixtures("_installed")
@pytest.mark.parametrize("same_observer", [True, False])
@pytest.mark.parametrize("step", range(7))
def test_a_resumed_run_has_no_point_twice(step: int, same_observer: bool, tmp_path: Path) -> None:
    """Wherever a run goes on, what was lost is replaced, what counted stays, and every point is there once."""
    told = [
        event
        for number in range(3)
        for event in (
            StepsTaken(2 * number, 2 * number + 2, (2.0 * number, 2.0 * number + 1)),
            epoch(number, 1.0 * number),
        )
    ]
    first = tensorboard(tmp_path)
    for event in told:
        first(event)
    first(Interrupted(6))
    second = first if same_observer else tensorboard(tmp_path)
    second(Resumed(step, 0, step // 2, 9))
    for at in range(step, 6):
        second(StepsTaken(at, at + 1, (at + 0.5,)))
        if at % 2:
            second(epoch(at // 2, at // 2 + 0.5))
    second(RunEnded(6, "length", 0, {}, 1.0))
    points = read(tmp_path)
    if step == 6:  # nothing was left to write, nor to hide
        assert points["train/loss"] == [(at, float(at)) for at in range(6)]
        return
    assert points["train/loss"] == [(at, at + (0.5 if at >= step else 0.0)) for at in range(6)]
    ends = [(2 * number + 1, number + (0.5 if 2 * number + 1 >= step else 0.0)) for number in range(3)]
    assert points["epoch/train_loss"] == ends
    assert points["epoch/valid_loss"] == ends
    assert points["lr/head"] == [(1, 0.5), (3, 0.5), (5, 0.5)]


@pytest.mark.usefixtures("_installed")
def test_a_run_that_goes_on_with_its_validation_has_no_point_twice(tmp_path: Path) -> None:
    """Where an epoch's steps count and its validation is done again, the steps stay and the epoch is replaced."""
    first = tensorboard(tmp_path)
    for event in (StepsTaken(0, 2, (0.0, 1.0)), epoch(0, 0.25), StepsTaken(2, 3, (2.0,))):
        first(event)
    first.close()
    second = tensorboard(tmp_path)
    for again in (Resumed(2, 0, 0, 3), epoch(0, 0.75), StepsTaken(2, 4, (2.5, 3.5))):
        second(again)
    second.close()
    points = read(tmp_path)
    assert points["train/loss"] == [(0, 0.0), (1, 1.0), (2, 2.5), (3, 3.5)]
    assert points["epoch/train_loss"] == [(1, 0.75)]
    assert points["lr/head"] == [(1, 0.5)]


@pytest.mark.usefixtures("_installed")
def test_a_run_may_be_resumed_into_an_empty_folder(tmp_path: Path) -> None:
    """An observer that was not there before the run was resumed shows what it saw."""
    observer = tensorboard(tmp_path)
    observer(Resumed(2, 0, 0, 3))
    observer(epoch(0, 0.75))
    observer.close()
    assert read(tmp_path)["epoch/train_loss"] == [(1, 0.75)]


@pytest.mark.usefixtures("_installed")
def test_a_failed_run_is_on_the_disk(tmp_path: Path) -> None:
    """After a failure the losses up to it can be read, though nobody closed the observer."""
    observer = tensorboard(tmp_path)
    observer(StepsTaken(0, 1, (2.5,)))
    observer(RunFailed(1, 0, "too bad"))
    assert read(tmp_path)["train/loss"] == [(0, 2.5)]


def test_without_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the extra is not installed, the message says what to type."""
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(RequestError, match=r'pip install "lehr\[tensorboard\]"'):
        tensorboard(tmp_path)


@pytest.mark.usefixtures("_installed")
def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    """A place where no folder can be is refused before the run begins."""
    (tmp_path / "file").touch()
    with pytest.raises(
        RequestError, match=r"file: the folder for TensorBoard cannot be made \(File exists\)"
    ):
        tensorboard(tmp_path / "file")
