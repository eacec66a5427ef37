"""An event as one line of strict JSON, and back: the format of journal.jsonl, which docs/journal.md describes.

Everything that is not exactly as described is refused: a reader that guesses would show numbers that nobody
wrote. This file must not know what a file is.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from datetime import datetime, timezone
from typing import Final

from lehr.errors import RunError, nearest
from lehr.events import (
    CacheClosed,
    CheckpointFailed,
    CheckpointWritten,
    ConditionMet,
    EpochEnded,
    Event,
    FreezeAudited,
    Interrupted,
    Note,
    PrefixCached,
    RateReduced,
    Record,
    Resumed,
    RunEnded,
    RunFailed,
    RunStarted,
    StageEnded,
    StageStarted,
    StepsTaken,
)

VERSION: Final = 4
"""The version of the format that is written; every version up to it can be read."""

WRITTEN: Final[Mapping[str, type[Event]]] = {
    "run_started": RunStarted,
    "stage_started": StageStarted,
    "steps_taken": StepsTaken,
    "epoch_ended": EpochEnded,
    "stage_ended": StageEnded,
    "condition_met": ConditionMet,
    "rate_reduced": RateReduced,
    "note": Note,
    "run_ended": RunEnded,
    "run_failed": RunFailed,
    "interrupted": Interrupted,
    "resumed": Resumed,
    "checkpoint_written": CheckpointWritten,
    "checkpoint_failed": CheckpointFailed,
    "freeze_audited": FreezeAudited,
    "prefix_cached": PrefixCached,
    "cache_closed": CacheClosed,
}
"""The events that are written down, by the names that they have there; the others are passing."""

_NAMES: Final = {kind: name for name, kind in WRITTEN.items()}
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", re.ASCII)
_NON_FINITE: Final = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_LONGEST = 400
"""Characters of a message: what stands in a damaged line may be of any length."""


def is_written(event: Event) -> bool:
    """Whether `event` is written down; one that only moves a bar is not.

    >>> is_written(Note("hello"))
    True
    """
    return type(event) in _NAMES


def format_line(record: Record) -> str:
    r"""`record` as a line of a journal, without the line's end: strict JSON in ASCII.

    Numbers are written so that they are read back to the bit; NaN and the infinities, which JSON does not
    have, as texts.

    Raises:
        TypeError: where a field holds something that is not of its type, a tensor for example.

    Example:
        >>> format_line(Record(1.5, StepsTaken(0, 2, (2.302, math.nan))))
        '{"v":4,"event":"steps_taken","time":"1970-01-01T00:00:01.500Z","start":0,"stop":2,"losses":[2.302,"nan"]}'
    """
    event = record.event
    moment = datetime.fromtimestamp(round(record.time, 3), timezone.utc)
    line: dict[str, object] = {
        "v": VERSION,
        "event": _NAMES[type(event)],
        "time": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
    }
    optional = _optional(type(event))
    for name, annotation in _annotations(type(event)).items():
        if name in optional and getattr(event, name) == optional[name]:
            continue
        line[name] = _encode(getattr(event, name), annotation, f"{type(event).__name__}.{name}")
    return json.dumps(line, separators=(",", ":"), allow_nan=False)


def parse_line(line: str | bytes, *, where: str = "journal") -> Record:
    """The record that `line` holds, of this version of the format or an older one.

    Raises:
        RunError: for anything else than a line of a journal; the message begins with `where`.

    Example:
        >>> parse_line('{"v":1,"event":"interrupted","time":"1970-01-01T00:00:01.500Z","step":7}')
        Record(time=1.5, event=Interrupted(step=7))
    """
    try:
        return _record(line if isinstance(line, bytes) else line.encode("utf-8", "surrogatepass"))
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        words = str(error)
        cut = words if len(words) <= _LONGEST else words[:_LONGEST] + "..."
        raise RunError(f"{where}: {cut}") from error


def _record(line: bytes) -> Record:
    """The record in a line; what is wrong with it is raised as a plain `ValueError`, for `parse_line` to place."""
    try:
        found = json.loads(line, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"not a line of a journal ({error}); expected one JSON object. "
            "The file is damaged or was edited: remove this line to read the rest"
        ) from error
    if not isinstance(found, dict):
        raise ValueError(f"expected a JSON object, found {type(found).__name__}; remove this line")
    version = found.pop("v", None)
    if type(version) is not int or version < 1:
        raise ValueError(f'"v" is {version!r}; expected the version of the format, for example {VERSION}')
    if version > VERSION:
        raise ValueError(
            f"written in version {version} of the format, and this lehr reads up to {VERSION}; "
            "update it with: pip install --upgrade lehr"
        )
    name, moment = found.pop("event", None), found.pop("time", None)
    if not isinstance(name, str) or name not in WRITTEN:
        raise ValueError(
            f"unknown event {name!r}{nearest(str(name), WRITTEN)} Known are: {', '.join(WRITTEN)}"
        )
    if not isinstance(moment, str) or not _TIME.fullmatch(moment):
        raise ValueError(f'"time" is {moment!r}; expected for example "2026-11-23T13:00:00.123Z"')
    kind = WRITTEN[name]
    try:
        seconds = datetime.fromisoformat(moment.replace("Z", "+00:00")).timestamp()
        return Record(seconds, _event(kind, _annotations(kind), found))
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name}: {error}") from error


def _event(kind: Callable[..., Event], wanted: dict[str, str], found: dict[str, object]) -> Event:
    """The event that `kind` makes of the fields `found`; they must be those `wanted`, name -> annotation."""
    absent = wanted.keys() - found.keys()
    if absent - _optional(kind).keys() or not found.keys() <= wanted.keys():
        missing = ", ".join(sorted(absent - _optional(kind).keys())) or "none"
        unknown = ", ".join(sorted(found.keys() - wanted.keys())) or "none"
        raise ValueError(
            f"expected the fields {', '.join(wanted)}; missing are: {missing}; unknown are: {unknown}"
        )
    return kind(**{name: _decode(found[name], wanted[name], name) for name in found})


def _annotations(kind: type[Event]) -> dict[str, str]:
    """The fields of an event: name -> text of the annotation, by which a value is written and read."""
    return {field.name: str(field.type) for field in fields(kind)}


def _optional(kind: Callable[..., Event]) -> dict[str, object]:
    """The fields that may be left out, with what they then are."""
    return {f.name: f.default for f in fields(kind) if f.default is not MISSING}  # type: ignore[arg-type]  # an event


def _encode(value: object, annotation: str, where: str) -> object:
    """`value` as JSON, by the text of its field's annotation."""
    if annotation == "float" and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value) if math.isfinite(value) else str(float(value))
    if annotation == "tuple[float, ...]" and isinstance(value, tuple):
        return [_encode(item, "float", where) for item in value]
    if annotation == "tuple[str, ...]" and isinstance(value, tuple):
        return [_encode(item, "str", where) for item in value]
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
    if annotation == "tuple[str, ...]" and isinstance(value, list):
        return tuple(_decode(item, "str", where) for item in value)
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
