"""What happens in a run, as events: frozen values, and nothing else.

The loop makes events and hands each to every observer; an observer may draw it (`lehr.progress`), write it
(`lehr.journal`) or count it, and can change nothing. docs/journal.md describes them, and a test holds that
page equal to this file. This file must not know who makes the events, what a tensor is, or how anything is
written or shown.

Conventions: steps, epochs and stages count from 0; ranges are half-open; `step` on an event is the number of
updates done so far; seconds are seconds of wall time; a rate is the group's learning rate, without unit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, TypeAlias

LOSSES_PER_EVENT: Final = 100
"""How many losses one `StepsTaken` carries at most: a short line, and little to lose when a run is killed."""


@dataclass(frozen=True)
class RunStarted:
    """A run begins: what runs, how long, on how much data, where.

    `samples_valid` is 0 without a validation set; `stages` counts the stages of the plan.
    """

    lehr: str
    plan_hash: str
    total_steps: int
    total_epochs: int
    samples_train: int
    samples_valid: int
    device: str
    precision: str
    stages: int


@dataclass(frozen=True)
class StageStarted:
    """Stage `stage`, called `label`, begins: updates `start` to `stop - 1`, `epochs` epochs.

    `trained_parameters` and `total_parameters` count scalars; `peak_lr` is the highest rate of each group
    that trains.
    """

    stage: int
    label: str
    start: int
    stop: int
    first_epoch: int
    epochs: int
    trained_parameters: int
    total_parameters: int
    peak_lr: Mapping[str, float]


@dataclass(frozen=True)
class StepsTaken:
    """The losses of the updates `start` to `stop - 1`, one each, in order.

    `objectives` says whose update each was; it is empty in an ordinary stage.

    Raises:
        ValueError: where the number of losses is not `stop - start`, or of objectives neither that nor 0.
    """

    start: int
    stop: int
    losses: tuple[float, ...]
    objectives: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.losses) != self.stop - self.start:
            raise ValueError(
                f"StepsTaken({self.start}, {self.stop}) carries {len(self.losses)} losses, "
                f"expected {self.stop - self.start}: one for each update"
            )
        if len(self.objectives) not in (0, len(self.losses)):
            raise ValueError(
                f"StepsTaken({self.start}, {self.stop}) carries {len(self.objectives)} objectives, "
                f"expected {len(self.losses)} or none"
            )


@dataclass(frozen=True)
class Progressed:
    """How far the epoch is: `step` done, of updates `epoch_start` to `epoch_stop - 1`. Passing: not written.

    `loss` is the epoch's mean so far; `losses` has that of each objective, where there are several.

    It exists so that a bar can move, about ten times a second and never once a step. Everything in it can be
    had from the plan and the events that are written; in the journal it would only be noise that depends on
    the speed of the machine.
    """

    step: int
    stage: int
    epoch: int
    epoch_start: int
    epoch_stop: int
    loss: float
    lr: Mapping[str, float]
    samples_per_second: float
    losses: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Validating:
    """How far the validation is: `done` of `total` samples. Passing, like `Progressed`: not written down."""

    done: int
    total: int


@dataclass(frozen=True)
class EpochEnded:
    """An epoch has ended, validation included; `step` updates are done.

    `train_loss` is the mean over the epoch's samples as they were trained on, over all objectives where there
    are several; `metrics` are those of the validation set, such as `valid_loss`, the loss of each objective, such
    as `train_d_loss`, and the metric of the training that the stage's `until` waits for; `lr` are the rates of the
    epoch's last update (of each objective's last), of the groups that train; `seconds` is the whole epoch,
    `samples_per_second` its training alone; `best` says whether the monitored metric is the best so far.
    """

    epoch: int
    stage: int
    step: int
    train_loss: float
    metrics: Mapping[str, float]
    lr: Mapping[str, float]
    seconds: float
    samples_per_second: float
    best: bool


@dataclass(frozen=True)
class StageEnded:
    """A stage has ended.

    `reason` is "length", "patience", or "until" where `ConditionMet` came before; `restored_epoch` is the epoch
    whose weights were put back, or None.
    """

    stage: int
    step: int
    reason: str
    restored_epoch: int | None


@dataclass(frozen=True)
class ConditionMet:
    """What stage `stage` waited for has been measured after `step` updates: `condition`, at `value`; the stage ends.

    What follows begins at once, so that the run has `total_steps` and `total_epochs` from here on.
    """

    stage: int
    step: int
    condition: str
    value: float
    total_steps: int
    total_epochs: int


@dataclass(frozen=True)
class RateReduced:
    """The plateau of `condition` was seen after `step` updates, at `value`: from here on the rates of stage `stage` are
    `factor` times what its schedule says.
    """

    stage: int
    step: int
    condition: str
    value: float
    factor: float


@dataclass(frozen=True)
class Note:
    """Something the person should know, in plain words."""

    text: str


@dataclass(frozen=True)
class RunEnded:
    """The run is done.

    `reason` is that of the last `StageEnded`; `metrics` are those of the best epoch, of the last one where
    none was the best.
    """

    step: int
    reason: str
    best_epoch: int | None
    metrics: Mapping[str, float]
    seconds: float


@dataclass(frozen=True)
class RunFailed:
    """The run failed at update `step` of stage `stage`; `error` is the message that was raised."""

    step: int
    stage: int
    error: str


@dataclass(frozen=True)
class Interrupted:
    """The person stopped the run after `step` updates."""

    step: int


@dataclass(frozen=True)
class Resumed:
    """A run that had stopped goes on after `step` updates, in epoch `epoch` of stage `stage`.

    Of the records before this one only the first `records` count; the others tell of steps that were lost,
    and that are done again (`lehr.journal.effective`). `RunStarted` and `StageStarted` follow once more: the
    machine and the versions may be others now.
    """

    step: int
    stage: int
    epoch: int
    records: int


@dataclass(frozen=True)
class CheckpointWritten:
    """A checkpoint of `step` updates is on the disk, in `bytes` bytes.

    Training stood still for `stall` seconds while its tensors were copied; writing took `seconds`, beside it.
    """

    step: int
    bytes: int
    stall: float
    seconds: float


@dataclass(frozen=True)
class CheckpointFailed:
    """A checkpoint of `step` updates could not be written; `error` says why, in words.

    Training goes on, and the next try comes after `retry` seconds; 0 where the run ends or stops and there is none.
    """

    step: int
    error: str
    retry: float


@dataclass(frozen=True)
class FreezeAudited:
    """At the end of stage `stage`, what it froze has the bits that it had at its start.

    `parameters` and `buffers` count the frozen tensors, whose hash together is `digest`, in hex.
    """

    stage: int
    step: int
    parameters: int
    buffers: int
    digest: str


@dataclass(frozen=True)
class PrefixCached:
    """What of the model does not train in stage `stage` is computed once for each sample of `data` ("train" or "valid").

    The model is cut after `after`, as the self-check has allowed; before it lies `share` of the arithmetic of a forward
    pass. A sample takes `bytes` bytes, and `rows` of the `wanted` rows (samples times views) are kept in `place`. `route`
    is how the model was read ("fx" or "export"); `folded` says that the prefix is computed in a faster form, or a few samples at
    a time, and may round differently.
    """

    stage: int
    step: int
    data: str
    after: str
    share: float
    bytes: int
    rows: int
    wanted: int
    place: str
    route: str
    folded: bool


@dataclass(frozen=True)
class CacheClosed:
    """The cache of stage `stage` is dropped: it has computed the features of `computed` samples of `data`, and read them
    `read` times, which has saved about `saved` seconds.
    """

    stage: int
    step: int
    data: str
    computed: int
    read: int
    saved: float


Event: TypeAlias = (
    RunStarted
    | StageStarted
    | StepsTaken
    | Progressed
    | Validating
    | EpochEnded
    | StageEnded
    | ConditionMet
    | RateReduced
    | Note
    | RunEnded
    | RunFailed
    | Interrupted
    | Resumed
    | CheckpointWritten
    | CheckpointFailed
    | FreezeAudited
    | PrefixCached
    | CacheClosed
)
Observer: TypeAlias = Callable[[Event], None]
"""What is called with every event."""


@dataclass(frozen=True)
class Record:
    """An event, and when it happened: one line of a journal.

    `time` is in seconds since 1970-01-01 UTC, and kept to the millisecond. Clocks are set back now and then,
    so the times of a journal need not rise.
    """

    time: float
    event: Event
