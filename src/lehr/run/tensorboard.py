"""An observer that writes a run's losses, rates and metrics where TensorBoard reads them.

TensorBoard is an extra: `pip install "lehr[tensorboard]"`. This file must not know how the events come about;
the journal holds all that is written here, and more.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lehr.errors import RequestError
from lehr.journal import EpochEnded, Event, Interrupted, RunEnded, RunFailed, StepsTaken

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def tensorboard(folder: str | Path) -> TensorBoard:
    """An observer that writes event files for TensorBoard into `folder`, which is made where it is missing.

    What is written: `train/loss` for every step, at the step's 0-based number; `lr/<group>` and
    `epoch/<metric>` (`epoch/train_loss` among them) for every epoch, at the number of updates done so far.
    The file is closed when the run ends, fails or is interrupted.

    Raises:
        RequestError: where TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise RequestError(
            f"writing for TensorBoard needs the package tensorboard, which cannot be imported ({error}); "
            'install it with: pip install "lehr[tensorboard]"'
        ) from error
    return TensorBoard(SummaryWriter(str(folder)))


class TensorBoard:
    """What `tensorboard` makes: call it with events; `close` finishes the file."""

    def __init__(self, writer: SummaryWriter) -> None:
        self._writer = writer

    def __call__(self, event: Event) -> None:
        """Write the numbers of `event`, if it has any."""
        match event:
            case StepsTaken():
                for step, loss in zip(range(event.start, event.stop), event.losses, strict=True):
                    self._scalar("train/loss", loss, step)
            case EpochEnded():
                for group, rate in event.lr.items():
                    self._scalar(f"lr/{group}", rate, event.step)
                for name, value in {"train_loss": event.train_loss, **event.metrics}.items():
                    self._scalar(f"epoch/{name}", value, event.step)
                self._writer.flush()
            case RunEnded() | RunFailed() | Interrupted():
                self.close()
            case _:
                pass

    def close(self) -> None:
        """Finish the file; calling it again does nothing."""
        self._writer.close()

    def _scalar(self, tag: str, value: float, step: int) -> None:
        self._writer.add_scalar(tag, value, step)
