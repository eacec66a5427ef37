"""Amounts of memory with a unit, "4 GiB", and the one rule that turns them into whole bytes. Pure.

It must not know what the memory is for.
"""

from __future__ import annotations

import re
from fractions import Fraction
from math import floor

from lehr.errors import RecipeError, nearest
from lehr.untrusted import brief

_WRITTEN = re.compile(r"([+-]?(?:[0-9][0-9_]*)?\.?[0-9][0-9_]*)\s*([A-Za-z]*)")
_LONGEST = 60  # characters
_BINARY = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_DECIMAL = {"kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}  # IEC 80000-13: kilo is 1000, kibi is 1024
_FACTORS = {word.lower(): by for word, by in (_BINARY | _DECIMAL | {"byte": 1, "bytes": 1}).items()}
_SPELT = {word.lower(): word for word in (*_BINARY, *_DECIMAL, "bytes")}
_EXPECTED = "bytes, KiB, MiB, GiB, TiB (or kB, MB, GB, TB, of 1000 each)"
MOST_BYTES = 2**62
"""More than any disk has; so sums stay numbers of 64 bits."""


def byte_size(text: str, *, where: str = "size") -> int:
    """An amount of memory in whole bytes: exact, then rounded half up, at least one.

    Args:
        text: a number and a unit, in any case; part of a unit is allowed.
        where: the place, for the message of an error.

    Raises:
        RecipeError: for a bare number, an unknown unit, 0 or less, or more than any disk has.

    Example:
        >>> byte_size("4 GiB"), byte_size("1.5 kB"), byte_size("392KiB")
        (4294967296, 1500, 401408)
    """
    if isinstance(text, (int, float)) and not isinstance(text, bool):
        raise RecipeError(f"{where}: {brief(text)} has no unit; {_ways(brief(text))}")
    found = _WRITTEN.fullmatch(text.strip()) if isinstance(text, str) and len(text) <= _LONGEST else None
    if not found:
        raise RecipeError(
            f'{where}: {brief(text)} is no amount of memory; expected a number and a unit, such as "4 GiB"'
        )
    number, unit = found.groups()
    if not unit:
        raise RecipeError(f"{where}: {text!r} has no unit; {_ways(number)}")
    if unit.lower() not in _FACTORS:
        near = nearest(unit.lower(), _SPELT, n=1)
        for word, spelt in _SPELT.items():
            near = near.replace(f'"{word}"', f'"{spelt}"')
        raise RecipeError(f"{where}: {text!r}: unknown unit {unit!r}{near} Expected {_EXPECTED}")
    exact = Fraction(number.replace("_", "")) * _FACTORS[unit.lower()]
    if exact <= 0:
        raise RecipeError(f'{where}: {text!r} is nothing at all; write an amount above 0, such as "4 GiB"')
    if exact > MOST_BYTES:
        raise RecipeError(
            f'{where}: {text!r} is more than any disk has; write {MOST_BYTES // 2**40:,} "TiB" at most'
        )
    return max(1, floor(exact + Fraction(1, 2)))


def _ways(number: str) -> str:
    """How a bare number can be written; one that is too long to show is not repeated."""
    number = number if len(number) <= 20 else "4"
    return f'write "{number} GiB" or "{number} MiB"'
