"""What the loop tells: losses on their way from the device to the observers, and the events of a run.

Losses are read back when a bar would be drawn anew, or when a line of the journal is full, not every step, and the newest
is left on a GPU, which goes on with that step meanwhile. This file must not know how an update is made.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

import torch

from lehr.errors import NonFiniteError, RunError, plain_words
from lehr.events import (
    LOSSES_PER_EVENT,
    EpochEnded,
    Event,
    Interrupted,
    Note,
    Observer,
    Progressed,
    RunFailed,
    StageStarted,
    StepsTaken,
)
from lehr.journal import Journal
from lehr.planned_stage import PlannedStage
from lehr.planning import Plan
from lehr.run.state import SoFar, Tally
from lehr.run.stopping import was_asked

Tell = Callable[[Event], None]
Clock = Callable[[], float]
REFRESH = 0.1
"""Seconds between two looks at the losses."""
_NOTHING = SoFar()


class EpochWatch:
    """Counts one epoch: takes each step's loss as it is, on its device, and tells of it in time.

    `train_loss` is the mean over the epoch's samples; `seconds` runs from the making of the watch until it is
    read. As a context, it tells of the steps that were done also where the epoch breaks off. An epoch that is
    gone on with after `at` updates of the run has counted `so_far`.
    """

    def __init__(
        self,
        plan: Plan,
        stage: PlannedStage,
        epoch: tuple[int, int, int],
        tell: Tell,
        clock: Clock = time.perf_counter,
        *,
        at: int | None = None,
        so_far: SoFar = _NOTHING,
    ) -> None:
        self._plan, self._stage, self._tell, self._clock = plan, stage, tell, clock
        self.epoch, self.start, self.stop = epoch
        self._began, self._before = clock(), so_far
        self._next_look = self._began + REFRESH
        self._waiting: list[torch.Tensor] = []
        self._losses: list[float] = []
        self._sizes: list[int] = []
        self._sum, self._samples = so_far.loss_sum, so_far.samples
        self._by = dict(so_far.objectives)  # of each objective, where there are several
        self._told = self.start if at is None else at
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
            self._read(but=0 if full or _is_here(loss) else 1)
        if full:
            self._flush()
        if due:
            self._tell(self._progress())
            self._next_look = self._clock() + REFRESH

    def follow(self, plan: Plan, stage: PlannedStage) -> None:
        """Go on by a plan with one more decision, which may end the stage here."""
        self._plan, self._stage, self.stop = plan, stage, min(self.stop, stage.stop)

    def tell_all(self) -> None:
        """Tell of all steps that are done.

        Raises:
            NonFiniteError: for a loss that is not finite.
        """
        self._read()
        self._flush()

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
        self.samples_per_second = self._speed()
        return {
            "train_loss": self._sum / self._samples,
            **{f"train_{n}_loss": v for n, v in self._means().items()},
        }

    def so_far(self) -> SoFar:
        """What the epoch has counted; the losses of all its steps are told (`tell_all`)."""
        self.tell_all()
        return SoFar(self._sum, self._samples, self.seconds, dict(self._by))

    @property
    def seconds(self) -> float:
        """Since the epoch began; while it stood still between two processes no time passes."""
        return self._before.seconds + self._clock() - self._began

    def _speed(self) -> float:
        """Samples a second; those of a batch that several objectives train on are counted once."""
        shared = self._stage.rounds_per_epoch / self._stage.steps_per_epoch
        return shared * (self._samples - self._before.samples) / max(self._clock() - self._began, 1e-9)

    def _means(self) -> dict[str, float]:
        """The mean loss of each objective so far; nothing in an ordinary stage."""
        return {name: tally.total / tally.samples for name, tally in self._by.items()}

    def _objective(self, step: int) -> str:
        return self._stage.turns[self._stage.turn_at(step)].objective

    def _read(self, but: int = 0) -> None:
        """Bring the losses that wait on the device here, all in one go; of the newest so many wait on."""
        count = len(self._waiting) - but
        if count < 1:
            return
        losses = torch.stack(self._waiting[:count]).tolist()
        del self._waiting[:count]
        for loss in losses:
            step = self._told + len(self._losses)
            if not math.isfinite(loss):
                raise NonFiniteError(non_finite(f"the loss is {loss}", step, self._plan))
            self._losses.append(loss)
        first = self._told + len(self._losses) - len(losses)
        for step, (loss, size) in enumerate(zip(losses, self._sizes, strict=False), start=first):
            self._sum += loss * size
            self._samples += size
            if name := self._objective(step):
                tally = self._by.get(name, Tally())
                self._by[name] = Tally(tally.total + loss * size, tally.samples + size)
        del self._sizes[:count]

    def _flush(self) -> None:
        if self._losses:
            stop = self._told + len(self._losses)
            whose = [self._objective(step) for step in range(self._told, stop)]
            self._tell(StepsTaken(self._told, stop, tuple(self._losses), tuple(whose) if any(whose) else ()))
            self._told = stop
            self._losses.clear()

    def _progress(self) -> Progressed:
        done = self._told + len(self._losses)
        return Progressed(
            step=done, stage=self._stage.index,
            epoch=self.epoch, epoch_start=self.start, epoch_stop=self.stop,
            loss=self._sum / max(self._samples, 1), lr=last_rates(self._plan, self._stage, max(done, self.start + 1)),
            samples_per_second=self._speed(), losses=self._means(),
        )  # fmt: skip


def _is_here(loss: torch.Tensor) -> bool:
    """Whether reading it waits for nothing."""
    return loss.device.type == "cpu"


def non_finite(what: str, step: int, plan: Plan) -> str:
    """What went wrong at `step`, at which rates, and what to try."""
    stage, at = plan.stage_at(step), plan[step]
    rates = ", ".join(f"{group} {rate:.3g}" for group, rate in trained(at.lr, stage).items())
    tries = ["a lower lr", "a longer warm-up"]
    if plan.objectives[at.objective].clip_norm == math.inf:
        tries.append("clip_norm = 1.0")
    return (
        f"{what} at step {step} (stage {stage.index + 1}, {stage.label!r}; rates: {rates}); "
        f"try {', '.join(tries)}, precision fp32, and look at the inputs for NaN"
    )


def last_rates(plan: Plan, stage: PlannedStage, step: int) -> dict[str, float]:
    """The rates of the last updates before `step`: of each objective's last turn, where it has had one in this stage."""
    rates: dict[str, float] = {}
    for objective in {turn.objective: None for turn in stage.turns}:
        back = range(step - 1, stage.start - 1, -1)
        at = next((t for t in back if stage.turns[stage.turn_at(t)].objective == objective), None)
        rates |= {} if at is None else trained(plan[at].lr, stage)
    return rates


def trained(rates: Mapping[str, float], stage: PlannedStage) -> dict[str, float]:
    """The rates of the groups that `stage` trains, also where a schedule has taken them to 0."""
    return {group: rate for group, rate in rates.items() if stage.peak_lr[group]}


@contextmanager
def telling(
    journal: Journal | None, observers: Sequence[Observer], step: int = 0, stage: int = 0
) -> Iterator[Tell]:
    """A function that hands events to the journal and to every observer; what stops the run is told as well.

    An observer that raises is warned about once and then left out: observers can change nothing, not even by
    failing. A journal that cannot be written is told of once, and goes on trying.
    """
    listening = list(observers)
    warned = False

    def tell(event: Event) -> None:
        nonlocal step, stage, warned
        if isinstance(event, StepsTaken):
            step = event.stop
        elif isinstance(event, (Progressed, EpochEnded)):
            step, stage = event.step, event.stage
        elif isinstance(event, StageStarted):
            stage = event.stage
        if journal:
            journal(event)
        if journal and journal.problem and not warned:
            warned = True
            tell(Note(f"{journal.problem}; training goes on, and what the journal lacks is tried again"))
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
    except BaseException as error:
        said = f"{type(error).__name__}: {plain_words(error)}"
        tell(Interrupted(step) if was_asked(error) else RunFailed(step, stage, said))
        raise
    finally:
        if journal:
            journal.close()
