"""What happens in a run, as events; and the file that keeps them: one JSON object a line, only ever added to.

An event is a frozen value. The loop makes events and hands each to every observer; an observer may draw it
(`lehr.progress`), write it (`Journal`) or count it, and can change nothing. The format is described in
docs/journal.md, and a test holds that page equal to this file. This file must not know who makes the events,
what a tensor is, or how anything is shown.

Conventions: steps, epochs and stages count from 0; ranges are half-open; `step` on an event is the number of
updates done so far; seconds are seconds of wall time; a rate is the group's learning rate, without unit.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Final, TypeAlias

from lehr.errors import RequestError, RunError, nearest

VERSION: Final = 1
"""The version of the format that is written; every version up to it can be read."""

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

    Raises:
        ValueError: where the number of losses is not `stop - start`.
    """

    start: int
    stop: int
    losses: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.losses) != self.stop - self.start:
            raise ValueError(
                f"StepsTaken({self.start}, {self.stop}) carries {len(self.losses)} losses, "
                f"expected {self.stop - self.start}: one for each update"
            )


@dataclass(frozen=True)
class Progressed:
    """How far the epoch is: `step` done, of updates `epoch_start` to `epoch_stop - 1`. Passing: not written.

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


@dataclass(frozen=True)
class Validating:
    """How far the validation is: `done` of `total` samples. Passing, like `Progressed`: not written down."""

    done: int
    total: int


@dataclass(frozen=True)
class EpochEnded:
    """An epoch has ended, validation included; `step` updates are done.

    `train_loss` is the mean over the epoch's samples as they were trained on; `metrics` are those of the
    validation set, such as `valid_loss`; `lr` are the rates of the epoch's last update, of the groups that
    train; `seconds` is the whole epoch, `samples_per_second` its training alone; `best` says whether the
    monitored metric is the best so far.
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

    `reason` is "length" or "patience"; `restored_epoch` is the epoch whose weights were put back, or None.
    """

    stage: int
    step: int
    reason: str
    restored_epoch: int | None


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


Event: TypeAlias = (
    RunStarted
    | StageStarted
    | StepsTaken
    | Progressed
    | Validating
    | EpochEnded
    | StageEnded
    | Note
    | RunEnded
    | RunFailed
    | Interrupted
)
Observer: TypeAlias = Callable[[Event], None]

_WRITTEN: Final[dict[str, type[Event]]] = {
    "run_started": RunStarted,
    "stage_started": StageStarted,
    "steps_taken": StepsTaken,
    "epoch_ended": EpochEnded,
    "stage_ended": StageEnded,
    "note": Note,
    "run_ended": RunEnded,
    "run_failed": RunFailed,
    "interrupted": Interrupted,
}
_NAMES: Final = {kind: name for name, kind in _WRITTEN.items()}
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", re.ASCII)
_NON_FINITE: Final = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@dataclass(frozen=True)
class Record:
    """One line of a journal: the event, and when it was written.

    `time` is in seconds since 1970-01-01 UTC, and kept to the millisecond.
    """

    time: float
    event: Event


@dataclass(frozen=True)
class Records:
    """What a journal holds, oldest first; iterating goes over `records`.

    `torn` is what stands after the last whole line: a process that is killed while it writes leaves half a
    line, which is no event. It is "" in a journal that was closed well.
    """

    records: tuple[Record, ...]
    torn: str = ""

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)


class Journal:
    """An observer that writes each event as one line of `path`, at once; passing events are left out.

    Every line goes to the system in one piece and is not held back, so that a run that is killed loses at
    most the line it was writing. Use it as a context manager, or call `close`.

    Args:
        path: the file; it is made where it is missing, its folder is not.
        append: go on with a journal that is there. Half a last line is cut off then, and a `Note` says so.
        clock: gives the time of an event, in seconds since 1970-01-01 UTC.

    Raises:
        RequestError: where `path` cannot be opened, or holds something and `append` was not asked for.
        RunError: where a journal to go on with is damaged, or (from a call) where a line cannot be written.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "journal.jsonl"
        >>> with Journal(path, clock=lambda: 0.0) as journal:
        ...     journal(Note("hello"))
        >>> print(path.read_text(), end="")
        {"v":1,"event":"note","time":"1970-01-01T00:00:00.000Z","text":"hello"}
    """

    def __init__(
        self, path: str | Path, *, append: bool = False, clock: Callable[[], float] = time.time
    ) -> None:
        self.path = Path(path)
        self._clock = clock
        try:
            torn = self._check(append)
            # Unbuffered, so that one write() is one line: nothing waits in the process, and no line is
            # written in two halves.
            self._file = self.path.open("ab", buffering=0)
        except OSError as error:
            raise RequestError(
                f"{self.path}: the journal cannot be opened for writing ({error.strerror}); "
                "expected a file in a folder that exists and may be written to"
            ) from error
        if torn:
            self(Note(f"the journal ended in half a line of {len(torn)} characters, which was cut off"))

    def _check(self, append: bool) -> str:
        """Refuse a file that must not be written to; cut half a last line off, and return it."""
        if not self.path.is_file() or self.path.stat().st_size == 0:
            return ""
        if not append:
            raise RequestError(
                f"{self.path}: there is a journal here already, and a new run would be mixed into it; "
                "give another folder, or move this one away"
            )
        torn = read_journal(self.path).torn
        with self.path.open("rb+") as file:
            data = file.read()
            if torn:
                file.truncate(data.rfind(b"\n") + 1)
            elif not data.endswith(b"\n"):  # a whole event, of which only the line's end is missing
                file.write(b"\n")
        return torn

    def __call__(self, event: Event) -> None:
        """Write `event` down, unless it is a passing one."""
        if type(event) not in _NAMES:
            return
        line = (format_line(Record(self._clock(), event)) + "\n").encode("ascii")
        written = 0
        try:
            while written < len(line):  # a full disk may take a part of a line before it refuses
                written += self._file.write(line[written:])
        except OSError as error:
            with suppress(OSError):  # so that a later event, the failure itself, does not follow half a line
                self._file.truncate(self._file.tell() - written)
            raise RunError(
                f"{self.path}: the journal could not be written ({error.strerror}); the run is stopped, "
                "because what it does would not be known; make room or mend the disk, then start again"
            ) from error

    def close(self) -> None:
        """Close the file; calling it again does nothing."""
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_journal(path: str | Path) -> Records:
    """Everything that the journal at `path` holds.

    Half a last line is left out and told in `Records.torn`. A last line of which only the line's end is
    missing counts as whole.

    Raises:
        RequestError: where the file cannot be read.
        RunError: for a damaged line, an unknown event or a newer version, with file and line.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise RequestError(
            f"{path}: this journal cannot be read ({error.strerror}); expected the journal.jsonl of a run"
        ) from error
    last = lines.pop()
    records = [_parse(line, f"{path}:{number}") for number, line in enumerate(lines, 1)]
    if not last:
        return Records(tuple(records))
    try:
        json.loads(last)
    except (ValueError, RecursionError):
        return Records(tuple(records), torn=last.decode("utf-8", "backslashreplace"))
    return Records((*records, _parse(last, f"{path}:{len(lines) + 1}")))


def format_line(record: Record) -> str:
    r"""`record` as a line of a journal, without the line's end: strict JSON in ASCII.

    Numbers are written so that they are read back to the bit; NaN and the infinities, which JSON does not
    have, as texts.

    Raises:
        TypeError: where a field holds something that is not of its type, a tensor for example.

    Example:
        >>> format_line(Record(1.5, StepsTaken(0, 2, (2.302, math.nan))))
        '{"v":1,"event":"steps_taken","time":"1970-01-01T00:00:01.500Z","start":0,"stop":2,"losses":[2.302,"nan"]}'
    """
    event = record.event
    moment = datetime.fromtimestamp(round(record.time, 3), timezone.utc)
    line: dict[str, object] = {
        "v": VERSION,
        "event": _NAMES[type(event)],
        "time": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
    }
    for name, annotation in _annotations(type(event)).items():
        line[name] = _encode(getattr(event, name), annotation, f"{type(event).__name__}.{name}")
    return json.dumps(line, separators=(",", ":"), allow_nan=False)


def parse_line(line: str, *, where: str = "journal") -> Record:
    """The record that `line` holds: the inverse of `format_line`.

    Raises:
        RunError: for anything else than a line of a journal; the message begins with `where`.

    Example:
        >>> parse_line('{"v":1,"event":"interrupted","time":"1970-01-01T00:00:01.500Z","step":7}')
        Record(time=1.5, event=Interrupted(step=7))
    """
    return _parse(line.encode("utf-8", "surrogatepass"), where)


def _parse(line: bytes, where: str) -> Record:
    try:
        found = json.loads(line, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise RunError(
            f"{where}: not a line of a journal ({error}); expected one JSON object. "
            "The file is damaged or was edited: remove this line to read the rest"
        ) from error
    if not isinstance(found, dict):
        raise RunError(f"{where}: expected a JSON object, found {type(found).__name__}; remove this line")
    version = found.pop("v", None)
    if type(version) is not int or version < 1:
        raise RunError(
            f'{where}: "v" is {version!r}; expected the version of the format, for example {VERSION}'
        )
    if version > VERSION:
        raise RunError(
            f"{where}: written in version {version} of the format, and this lehr reads up to {VERSION}; "
            "update it with: pip install --upgrade lehr"
        )
    name, moment = found.pop("event", None), found.pop("time", None)
    if not isinstance(name, str) or name not in _WRITTEN:
        raise RunError(
            f"{where}: unknown event {name!r}{nearest(str(name), _WRITTEN)} Known are: {', '.join(_WRITTEN)}"
        )
    if not isinstance(moment, str) or not _TIME.fullmatch(moment):
        raise RunError(f'{where}: "time" is {moment!r}; expected for example "2026-11-23T13:00:00.123Z"')
    try:
        seconds = datetime.fromisoformat(moment.replace("Z", "+00:00")).timestamp()
        return Record(seconds, _event(_WRITTEN[name], _annotations(_WRITTEN[name]), found))
    except (TypeError, ValueError, OverflowError) as error:
        raise RunError(f"{where}: {name}: {error}") from error


def _event(kind: Callable[..., Event], wanted: dict[str, str], found: dict[str, object]) -> Event:
    """The event that `kind` makes of the fields `found`; they must be those `wanted`, name -> annotation."""
    if found.keys() != wanted.keys():
        missing = ", ".join(sorted(wanted.keys() - found.keys())) or "none"
        unknown = ", ".join(sorted(found.keys() - wanted.keys())) or "none"
        raise ValueError(
            f"expected the fields {', '.join(wanted)}; missing are: {missing}; unknown are: {unknown}"
        )
    return kind(**{name: _decode(found[name], annotation, name) for name, annotation in wanted.items()})


def _annotations(kind: type[Event]) -> dict[str, str]:
    """The fields of an event: name -> text of the annotation, by which a value is written and read."""
    return {field.name: str(field.type) for field in fields(kind)}


def _encode(value: object, annotation: str, where: str) -> object:
    """`value` as JSON, by the text of its field's annotation."""
    if annotation == "float" and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value) if math.isfinite(value) else str(float(value))
    if annotation == "tuple[float, ...]" and isinstance(value, tuple):
        return [_encode(item, "float", where) for item in value]
    if annotation == "Mapping[str, float]" and isinstance(value, Mapping):
        return {
            _encode(key, "str", where): _encode(item, "float", f"{where}[{key!r}]")
            for key, item in value.items()
        }
    if _is_plain(value, annotation):
        return value
    raise TypeError(
        f"{where} is {value!r}, a {type(value).__name__}; expected {annotation} (for a tensor: .item())"
    )


def _decode(value: object, annotation: str, where: str) -> object:
    """The inverse of `_encode`."""
    if annotation == "float" and isinstance(value, str) and value in _NON_FINITE:
        return _NON_FINITE[value]
    if annotation == "float" and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if annotation == "tuple[float, ...]" and isinstance(value, list):
        return tuple(_decode(item, "float", where) for item in value)
    if annotation == "Mapping[str, float]" and isinstance(value, dict):
        return {key: _decode(item, "float", f"{where}[{key!r}]") for key, item in value.items()}
    if _is_plain(value, annotation):
        return value
    raise ValueError(f"{where} is {value!r}; expected {annotation}")


def _is_plain(value: object, annotation: str) -> bool:
    """Whether `value` is written as it is; types are exact, since to Python a bool is an int."""
    if annotation == "int | None":
        return value is None or type(value) is int
    return type(value).__name__ == annotation and isinstance(value, int | str)


def _refuse_constant(text: str) -> float:
    raise ValueError(f'{text} is not JSON; expected "nan", "inf" or "-inf" in quotes')
