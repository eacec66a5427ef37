"""How often a run is saved: "10 minutes", "500 steps" or "2 epochs", and whether that has passed.

Pure: the clock is a number that is passed in. It must not know what a checkpoint holds or who writes it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Literal, get_args

from lehr.errors import DurationError, RequestError, nearest
from lehr.untrusted import brief

Unit = Literal["seconds", "minutes", "hours", "steps", "epochs"]

_WRITTEN = re.compile(r"([+-]?(?:[0-9][0-9_]*)?\.?[0-9][0-9_]*)\s*(%|[A-Za-z]*)")
_LONGEST = 60  # characters
_SECONDS = {"seconds": 1, "minutes": 60, "hours": 3600}
_UNITS: dict[str, Unit] = {word: unit for unit in get_args(Unit) for word in (unit, unit[:-1])}
_EXPECTED = "seconds, minutes, hours, steps or epochs"
_WORTH_KEEPING = 60.0
"""Seconds of work after which the end of an epoch is worth a checkpoint, where they are taken by time."""


@dataclass(frozen=True)
class Moment:
    """A point of a run between two updates: how many updates and epochs are done, and the time in seconds.

    `seconds` is read from a clock that only goes forward (`time.monotonic()`); only differences count.
    """

    step: int
    epochs: int
    seconds: float


@dataclass(frozen=True)
class Every:
    """How often: an exact amount above 0 and its unit. Steps and epochs are whole.

    Raises:
        DurationError: for a bare number, an unknown unit, 0 or less, part of a step or of an epoch.

    Example:
        >>> Every.parse("90 seconds")
        Every.parse("90 seconds")
        >>> print(Every.parse("1 hours"))
        1 hour
    """

    amount: Fraction
    unit: Unit

    def __post_init__(self) -> None:
        if self.amount <= 0:
            raise DurationError(f'"{self}" never passes; write an amount above 0, for example "10 minutes"')
        if self.unit not in _SECONDS and self.amount.denominator != 1:
            raise DurationError(f'"{self}"; write whole {self.unit}, for example "1 {self.unit[:-1]}"')

    @classmethod
    def parse(cls, text: str | Every, *, where: str = "every") -> Every:
        """Read what a person writes; `where` names the place in the message of an error."""
        if isinstance(text, Every):
            return text
        if isinstance(text, (int, float)) and not isinstance(text, bool):
            raise DurationError(f"{where}: {brief(text)} has no unit; {_ways(brief(text))}")
        found = _WRITTEN.fullmatch(text.strip()) if isinstance(text, str) and len(text) <= _LONGEST else None
        if not found:
            raise DurationError(
                f"{where}: {brief(text)} does not say how often; expected a number and a unit: "
                '"10 minutes", "500 steps" or "1 epoch"'
            )
        number, unit = found.groups()
        if not unit:
            raise DurationError(f"{where}: {text!r} has no unit; {_ways(number)}")
        if unit.lower() not in _UNITS:
            hint = nearest(unit.lower(), _UNITS, n=1)
            raise DurationError(f"{where}: {text!r}: unknown unit {unit!r}{hint} Expected {_EXPECTED}")
        try:
            return cls(Fraction(number.replace("_", "")), _UNITS[unit.lower()])
        except DurationError as error:
            raise DurationError(f"{where}: {error}") from None

    @property
    def seconds(self) -> Fraction:
        """The time that it is, where it is one; 0 where steps or epochs are counted."""
        return self.amount * _SECONDS.get(self.unit, 0)

    def due(self, *, last: Moment, now: Moment, epoch_ended: bool = False) -> bool:
        """Whether a checkpoint is due `now`, where the `last` one was taken (or the process began).

        Steps and epochs are counted from the start of the run: `"500 steps"` is due at 500, 1000, and so on,
        wherever the run was stopped in between; one that was missed is due at once. Time is counted from the
        last checkpoint; besides, the end of an epoch is due once a minute has passed. A clock that went
        backwards makes nothing due.

        Example:
            >>> often, start = Every.parse("500 steps"), Moment(480, 3, 0.0)
            >>> [often.due(last=start, now=Moment(step, 3, 1e6)) for step in (480, 499, 500)]
            [False, False, True]
        """
        if self.unit == "steps":
            return now.step // self.amount > last.step // self.amount
        if self.unit == "epochs":
            return now.epochs // self.amount > last.epochs // self.amount
        passed = now.seconds - last.seconds
        return passed >= self.seconds or (epoch_ended and passed >= _WORTH_KEEPING)

    def __str__(self) -> str:
        whole = self.amount.denominator == 1
        number = str(self.amount.numerator) if whole else f"{float(self.amount):.15g}"
        return f"{number} {self.unit[:-1] if self.amount == 1 else self.unit}"

    def __repr__(self) -> str:
        return f'Every.parse("{self}")'


@dataclass(frozen=True)
class Cadence:
    """How often a run is saved, and how much of it is kept: the `keep` last checkpoints (1 or more) and the
    weights of the `keep_best` best epochs (1 or more).
    """

    every: Every = Every(Fraction(10), "minutes")
    keep: int = 2
    keep_best: int = 1


def checkpoint_settings(said: str | Mapping[str, object], *, where: str = "checkpoint") -> Cadence:
    """What a person said about checkpoints: how often, or a table with `every`, `keep` and `keep_best`, in
    which what is left out has its default.

    Raises:
        DurationError: for an `every` that does not say how often.
        RequestError: for an unknown key, or a number that is not whole or below 1.

    Example:
        >>> checkpoint_settings({"every": "2 epochs", "keep": 3})
        Cadence(every=Every.parse("2 epochs"), keep=3, keep_best=1)
    """
    if not isinstance(said, Mapping):
        return Cadence(Every.parse(said, where=where))
    known = [f.name for f in fields(Cadence)]
    for key in said:
        if key not in known:
            hint = nearest(key if isinstance(key, str) else "", known)
            raise RequestError(f"{where}: no such key {brief(key)}{hint} Known: {', '.join(known)}")
    every = Every.parse(said["every"], where=f"{where}.every") if "every" in said else Cadence.every  # type: ignore[arg-type]  # refuses everything but text
    return Cadence(every, *(_count(said, key, where) for key in ("keep", "keep_best")))


def _count(said: Mapping[str, object], key: str, where: str) -> int:
    value = said.get(key, getattr(Cadence, key))
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    raise RequestError(f"{where}.{key}: {brief(value)}; expected a whole number, 1 or more")


def _ways(number: str) -> str:
    """How a bare number can be written; one that is too long to show is not repeated."""
    number = number if len(number) <= 20 else "10"
    units = ("minutes", "steps", "epochs") if number.isdecimal() else ("minutes", "hours")
    return "write " + " or ".join(f'"{number} {unit}"' for unit in units)
