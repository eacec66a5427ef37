"""An observer that writes a run's losses, rates and metrics where TensorBoard reads them.

TensorBoard is an extra: `pip install "lehr[tensorboard]"`. This file must not know how the events come about;
the journal holds all that is written here, and more.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lehr.errors import RequestError
from lehr.events import (
    ConditionMet,
    EpochEnded,
    Event,
    Interrupted,
    RateReduced,
    Resumed,
    RunEnded,
    RunFailed,
    StepsTaken,
)

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def tensorboard(folder: str | Path) -> TensorBoard:
    """An observer that writes event files for TensorBoard into `folder`, which is made where it is missing.

    What is written: `train/loss` (`train/d_loss` of an objective `d`) for every step, at the step's 0-based number; what
    was measured where a stage ended or cooled on evidence, as `stage/1: train_error < 0.8`; `lr/<group>` and
    `epoch/<metric>` (`epoch/train_loss` among them) for every epoch, at the number of its last step. The file
    is closed when the run ends, fails or is interrupted. Where a run is resumed, what an earlier process wrote
    of the steps that are done again is hidden: no point is shown twice.

    Raises:
        RequestError: where TensorBoard is not installed, or `folder` cannot be made.
    """
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise RequestError(
            f"writing for TensorBoard needs the package tensorboard, which cannot be imported ({error}); "
            'install it with: pip install "lehr[tensorboard]"'
        ) from error
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(
            f"{folder}: the folder for TensorBoard cannot be made ({error.strerror}); "
            "expected a folder, or a place where one can be made"
        ) from error
    return TensorBoard(Path(folder))


class TensorBoard:
    """What `tensorboard` makes: call it with events; `close` finishes the file."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # Made with the first number: only then is it known from which step on old ones must be hidden.
        self._writer: SummaryWriter | None = None
        self._resumed: int | None = None

    def __call__(self, event: Event) -> None:
        """Write the numbers of `event`, if it has any."""
        match event:
            case Resumed():
                self.close()
                self._resumed = event.step
            case StepsTaken():
                whose = event.objectives or ("",) * len(event.losses)
                for step, loss, name in zip(range(event.start, event.stop), event.losses, whose, strict=True):
                    self._scalar(f"train/{name}_loss" if name else "train/loss", loss, step)
            case ConditionMet() | RateReduced():
                self._scalar(f"stage/{event.stage + 1}: {event.condition}", event.value, event.step)
            case EpochEnded():
                self._epoch(event)
            case RunEnded() | RunFailed() | Interrupted():
                self.close()
            case _:
                pass

    def close(self) -> None:
        """Finish the file; calling it again does nothing."""
        if self._writer:
            self._writer.close()
        self._writer = None

    def _epoch(self, event: EpochEnded) -> None:
        last = event.step - 1
        if self._resumed == event.step:
            # The run went on after this epoch's last step. The step is the earlier process's and stays; the
            # epoch's numbers at the same place may be, too, and go. TensorBoard hides either both or none.
            losses = _losses_at(self._folder, last)
            self._resumed = last
            for loss in losses:
                self._scalar("train/loss", loss, last)
        for group, rate in event.lr.items():
            self._scalar(f"lr/{group}", rate, last)
        for name, value in {"train_loss": event.train_loss, **event.metrics}.items():
            self._scalar(f"epoch/{name}", value, last)
        if self._writer:
            self._writer.flush()

    def _scalar(self, tag: str, value: float, step: int) -> None:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder), purge_step=self._resumed)
            self._resumed = None
        self._writer.add_scalar(tag, value, step)


def _losses_at(folder: Path, step: int) -> list[float]:
    """The loss of `step` that stands in `folder`, at most one."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    if "train/loss" not in events.Tags()["scalars"]:
        return []
    return [point.value for point in events.Scalars("train/loss") if point.step == step][-1:]
