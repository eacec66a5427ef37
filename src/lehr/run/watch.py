"""What the loop tells: losses on their way from the device to the observers, and the events of a run.

Losses are read back when a bar would be drawn anew, or when a line of the journal is full, not every step: a
read makes a GPU wait. This file must not know how an update is made.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

import torch

from lehr.errors import NonFiniteError, RunError
from lehr.journal import (
    LOSSES_PER_EVENT,
    EpochEnded,
    Event,
    Interrupted,
    Journal,
    Observer,
    Progressed,
    RunFailed,
    StageStarted,
    StepsTaken,
)  # fmt: skip
from lehr.planning import Plan, PlannedStage
from lehr.run.folder import RunFolder

Tell = Callable[[Event], None]
Clock = Callable[[], float]
REFRESH = 0.1
"""Seconds between two looks at the losses."""


class EpochWatch:
    """Counts one epoch: takes each step's loss as it is, on its device, and tells of it in time.

    `train_loss` is the mean over the epoch's samples; `seconds` runs from the making of the watch until it is
    read. As a context, it tells of the steps that were done also where the epoch breaks off.
    """

    def __init__(
        self,
        plan: Plan,
        stage: PlannedStage,
        epoch: tuple[int, int, int],
        tell: Tell,
        clock: Clock = time.perf_counter,
    ) -> None:
        self._plan, self._stage, self._tell, self._clock = plan, stage, tell, clock
        self.epoch, self.start, self.stop = epoch
        self._began = clock()
        self._next_look = self._began + REFRESH
        self._waiting: list[torch.Tensor] = []
        self._losses: list[float] = []
        self._sizes: list[int] = []
        self._sum, self._samples, self._told = 0.0, 0, self.start
        self.samples_per_second = 0.0

    def __enter__(self) -> EpochWatch:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            with suppress(NonFiniteError, RuntimeError):  # the device itself may have failed
                self._read()
            self._flush()

    def add(self, loss: torch.Tensor, samples: int) -> None:
        """Take the loss of the next step, the mean over `samples`."""
        self._waiting.append(loss)
        self._sizes.append(samples)
        full = len(self._waiting) + len(self._losses) >= LOSSES_PER_EVENT
        due = self._clock() >= self._next_look
        if full or due:
            self._read()
        if full:
            self._flush()
        if due:
            self._tell(self._progress())
            self._next_look = self._clock() + REFRESH

    def finish(self) -> dict[str, float]:
        """The epoch's own row: its training loss and speed.

        Raises:
            RunError: where there were fewer batches than the plan has steps.
        """
        self._read()
        done = self._told + len(self._losses)
        if done < self.stop:
            raise RunError(
                f"epoch {self.epoch + 1} gave batches for {done - self.start} steps, "
                f"not the {self.stop - self.start} planned; "
                "a DataLoader must give len(loader) batches in every epoch"
            )
        self._tell(self._progress())
        self._flush()
        self.samples_per_second = self._samples / max(self._clock() - self._began, 1e-9)
        return {"train_loss": self._sum / self._samples}

    @property
    def seconds(self) -> float:
        """Since the epoch began."""
        return self._clock() - self._began

    def _read(self) -> None:
        """Bring the losses that wait on the device here, all in one go."""
        if not self._waiting:
            return
        losses = torch.stack(self._waiting).tolist()
        self._waiting.clear()
        for loss in losses:
            step = self._told + len(self._losses)
            if not math.isfinite(loss):
                raise NonFiniteError(non_finite(f"the loss is {loss}", step, self._plan))
            self._losses.append(loss)
        for loss, size in zip(losses, self._sizes, strict=True):
            self._sum += loss * size
            self._samples += size
        self._sizes.clear()

    def _flush(self) -> None:
        if self._losses:
            stop = self._told + len(self._losses)
            self._tell(StepsTaken(self._told, stop, tuple(self._losses)))
            self._told = stop
            self._losses.clear()

    def _progress(self) -> Progressed:
        done = self._told + len(self._losses)
        rates = self._plan[max(done - 1, self.start)].lr
        return Progressed(
            step=done, stage=self._stage.index,
            epoch=self.epoch, epoch_start=self.start, epoch_stop=self.stop,
            loss=self._sum / max(self._samples, 1), lr=trained(rates, self._stage),
            samples_per_second=self._samples / max(self._clock() - self._began, 1e-9),
        )  # fmt: skip


def non_finite(what: str, step: int, plan: Plan) -> str:
    """What went wrong at `step`, at which rates, and what to try."""
    stage = plan.stage_at(step)
    rates = ", ".join(f"{group} {rate:.3g}" for group, rate in trained(plan[step].lr, stage).items())
    tries = ["a lower lr", "a longer warm-up"]
    if plan.clip_norm == math.inf:
        tries.append("clip_norm = 1.0")
    return (
        f"{what} at step {step} (stage {stage.index + 1}, {stage.label!r}; rates: {rates}); "
        f"try {', '.join(tries)}, precision fp32, and look at the inputs for NaN"
    )


def trained(rates: Mapping[str, float], stage: PlannedStage) -> dict[str, float]:
    """The rates of the groups that `stage` trains, also where a schedule has taken them to 0."""
    return {group: rate for group, rate in rates.items() if stage.peak_lr[group]}


@contextmanager
def telling(folder: RunFolder | None, observers: Sequence[Observer]) -> Iterator[Tell]:
    """A function that hands events to the journal and to every observer; what stops the run is told as well.

    An observer that raises is warned about once and then left out: observers can change nothing, not even by
    failing.
    """
    journal = Journal(folder.journal) if folder else None
    listening = list(observers)
    at = [0, 0]  # step, stage

    def tell(event: Event) -> None:
        if isinstance(event, StepsTaken):
            at[0] = event.stop
        elif isinstance(event, (Progressed, EpochEnded)):
            at[:] = event.step, event.stage
        elif isinstance(event, StageStarted):
            at[:] = event.start, event.stage
        if journal:
            journal(event)
        for observer in tuple(listening):
            try:
                observer(event)
            except Exception as error:
                listening.remove(observer)
                warnings.warn(
                    f"the observer {observer!r} raised {error!r} and is left out from here on",
                    RuntimeWarning,
                    stacklevel=2,
                )

    try:
        yield tell
    except KeyboardInterrupt:
        tell(Interrupted(at[0]))
        raise
    except BaseException as error:
        tell(RunFailed(at[0], at[1], f"{type(error).__name__}: {error}"))
        raise
    finally:
        if journal:
            journal.close()
