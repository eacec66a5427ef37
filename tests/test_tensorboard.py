"""TensorBoard: what is written there is what the events said."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lehr.errors import RequestError
from lehr.journal import EpochEnded, Note, Progressed, RunEnded, RunFailed, StepsTaken
from lehr.run.tensorboard import tensorboard


def test_the_numbers_are_read_back(tmp_path: Path) -> None:
    """Losses are there by step, rates and metrics by epoch, as float32."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    observer = tensorboard(tmp_path / "tb")
    observer(StepsTaken(0, 2, (2.5, 2.25)))
    observer(Progressed(2, 0, 0, 0, 3, 2.25, {"head": 1e-3}, 10.0))
    observer(Note("nothing to draw"))
    observer(StepsTaken(2, 3, (2.0,)))
    lr = {"head": 0.5, "backbone": 0.125}
    observer(EpochEnded(0, 0, 3, 2.25, {"valid_loss": 1.5, "valid_accuracy": 0.75}, lr, 1.0, 9.0, True))
    observer(RunEnded(3, "length", 0, {}, 1.0))
    observer.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    read = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert read == {
        "train/loss": [(0, 2.5), (1, 2.25), (2, 2.0)],
        "lr/head": [(3, 0.5)],
        "lr/backbone": [(3, 0.125)],
        "epoch/train_loss": [(3, 2.25)],
        "epoch/valid_loss": [(3, 1.5)],
        "epoch/valid_accuracy": [(3, 0.75)],
    }


def test_a_failed_run_is_on_the_disk(tmp_path: Path) -> None:
    """After a failure the losses up to it can be read, though nobody closed the observer."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    observer = tensorboard(tmp_path)
    observer(StepsTaken(0, 1, (2.5,)))
    observer(RunFailed(1, 0, "too bad"))
    events = accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    assert [e.value for e in events.Scalars("train/loss")] == [2.5]


def test_without_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the extra is not installed, the message says what to type."""
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(RequestError, match=r'pip install "lehr\[tensorboard\]"'):
        tensorboard(tmp_path)
