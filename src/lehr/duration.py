"""Lengths of time with a unit, and the one rule that turns them into whole steps. It knows nothing of
schedules or stages.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from math import floor
from numbers import Real
from typing import Literal, get_args

from lehr.errors import DurationError, nearest
from lehr.untrusted import brief

Unit = Literal["epochs", "steps", "%"]

_WRITTEN = re.compile(r"([+-]?(?:[0-9][0-9_]*)?\.?[0-9][0-9_]*(?:[eE][+-]?[0-9]{1,2})?)\s*(%|[A-Za-z]*)")
_LONGEST = (
    60  # characters; with the two digits of an exponent it keeps every amount small enough to write out
)
_UNITS: dict[str, Unit] = {
    "epochs": "epochs", "epoch": "epochs", "steps": "steps", "step": "steps", "%": "%", "percent": "%",
}  # fmt: skip


@dataclass(frozen=True)
class Duration:
    """A length of time: an exact amount and its unit.

    `"5 epochs"` (a fraction of an epoch is allowed), `"400 steps"` (whole), `"10%"` (of the thing that it
    is part of, 0 to 100).

    `amount` may be given as any finite real number, and is kept as the fraction that it prints as.

    Raises:
        DurationError: for a bare number, an unknown unit, a negative amount, part of a step, more than 100 %.

    Example:
        >>> Duration.parse("2.5%")
        Duration.parse("2.5%")
        >>> Duration.parse("2 epochs").steps(steps_per_epoch=500)
        1000
    """

    amount: Fraction
    unit: Unit

    def __post_init__(self) -> None:
        object.__setattr__(self, "amount", _exact(self.amount))
        if self.unit not in get_args(Unit):
            raise DurationError(f"unit={self.unit!r}; expected one of {', '.join(map(repr, get_args(Unit)))}")
        if self.amount < 0:
            raise DurationError(f'"{self}" is negative; a duration is 0 or more')
        if self.unit == "steps" and self.amount.denominator != 1:
            raise DurationError(
                f'"{self}": a step is one update and cannot be divided; write a whole number of steps'
            )
        if self.unit == "%" and self.amount > 100:
            raise DurationError(f'"{self}" is more than the whole; a share lies between 0% and 100%')

    @classmethod
    def parse(cls, text: str | Duration, *, where: str = "duration") -> Duration:
        """Read a duration as a person writes it; `where` names the place in the message of an error."""
        if isinstance(text, Duration):
            return text
        if isinstance(text, (int, float)) and not isinstance(text, bool):
            raise DurationError(
                f'{where}: {brief(text)} has no unit; write "{brief(text)} epochs" or "{brief(text)} steps", or a share such as "10%"'
            )
        found = _WRITTEN.fullmatch(text.strip()) if isinstance(text, str) and len(text) <= _LONGEST else None
        if not found:
            raise DurationError(
                f'{where}: {brief(text)} is not a duration; expected a number and a unit: "5 epochs", "400 steps" or "10%"'
            )
        number, unit = found.groups()
        if not unit:
            raise DurationError(
                f'{where}: {text!r} has no unit; write "{number} epochs", "{number} steps" or "{number}%"'
            )
        if unit.lower() not in _UNITS:
            raise DurationError(
                f"{where}: {text!r}: unknown unit {unit!r}{nearest(unit.lower(), _UNITS)} Expected epochs, steps or %"
            )
        try:
            return cls(Fraction(number.replace("_", "")), _UNITS[unit.lower()])
        except DurationError as error:
            raise DurationError(f"{where}: {error}") from None

    def steps(
        self, *, whole: int | None = None, steps_per_epoch: int | None = None, where: str = "duration"
    ) -> int:
        """The duration in whole steps: exact, then rounded half up, at least one step unless it is 0.

        Args:
            whole: the steps of the thing that a percentage is part of.
            steps_per_epoch: updates in one pass over the data.
            where: the place, for the message of an error.

        Raises:
            DurationError: where the unit needs a number that is not known there.
        """
        if self.unit == "steps":
            return int(self.amount)
        if self.unit == "epochs":
            if steps_per_epoch is None:
                raise DurationError(
                    f'{where}: "{self}" needs steps_per_epoch, which is not known here; give it, or write steps'
                )
            exact = self.amount * steps_per_epoch
        else:
            if whole is None:
                raise DurationError(
                    f'{where}: "{self}" is a share of a whole that is not known here; write epochs or steps'
                )
            exact = self.amount * whole / 100
        return max(1, floor(exact + Fraction(1, 2))) if self.amount else 0

    def __str__(self) -> str:
        number = str(self.amount.numerator) if self.amount.denominator == 1 else _decimal(self.amount)
        if self.unit == "%":
            return f"{number}%"
        return f"{number} {self.unit[:-1] if self.amount == 1 else self.unit}"

    def __repr__(self) -> str:
        return f'Duration.parse("{self}")'


def _exact(amount: object) -> Fraction:
    """A real number as the fraction that it prints as: 0.1 is a tenth."""
    try:
        if isinstance(amount, Real) and not isinstance(amount, bool):
            return amount if isinstance(amount, Fraction) else Fraction(str(amount))
    except ValueError:  # not a number, infinite, or of more digits than Python writes
        pass
    raise DurationError(f"amount={brief(amount)}; expected a finite number")


def _decimal(amount: Fraction) -> str:
    """A fraction as an exact decimal; every amount read from a text has one.

    >>> _decimal(Fraction(5, 2))
    '2.5'
    """
    digits = 0
    while (amount * 10**digits).denominator != 1:
        digits += 1
        if digits > 200:  # more than a text can hold: a fraction such as 1/3, made by hand
            return str(float(amount))
    whole = str(int(amount * 10**digits)).rjust(digits + 1, "0")
    return f"{whole[:-digits]}.{whole[-digits:]}"
