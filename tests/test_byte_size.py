"""Amounts of memory with a unit become whole bytes, by one rule."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lehr.byte_size import MOST_BYTES, byte_size
from lehr.errors import RecipeError

UNITS = {
    "byte": 1, "bytes": 1, "kB": 1000, "MB": 1000**2, "GB": 1000**3, "TB": 1000**4,
    "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3, "TiB": 1024**4,
}  # fmt: skip


@given(
    st.integers(1, 10**6), st.integers(0, 6), st.sampled_from(sorted(UNITS)), st.sampled_from(["", " ", "  "])
)
def test_an_amount_is_exact_and_rounded_half_up(digits: int, point: int, unit: str, gap: str) -> None:
    """Any decimal number of any unit, in any case, is that fraction of bytes, rounded half up, and at least one."""
    number = f"{digits:07d}"
    text = f"{number[: 7 - point]}.{number[7 - point :]}" if point else number
    exact = Fraction(digits, 10**point) * UNITS[unit]
    wanted = max(1, (2 * exact.numerator + exact.denominator) // (2 * exact.denominator))
    assert byte_size(f"{text}{gap}{unit}") == byte_size(f" {text}{gap}{unit.upper()} ") == wanted


def test_half_a_byte_is_one() -> None:
    """What is less than a byte is one; halves go up."""
    assert [byte_size(f"{n} bytes") for n in ("0.1", "0.5", "1.49", "1.5", "2.5")] == [1, 1, 1, 2, 3]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (4, '4 has no unit; write "4 GiB" or "4 MiB"'),
        ("4", '\'4\' has no unit; write "4 GiB"'),
        (0.5, '0.5 has no unit; write "0.5 GiB"'),
        ("9" * 30, 'has no unit; write "4 GiB"'),
        ("4 Gi", 'unknown unit \'Gi\'; did you mean "GiB"\\? Expected bytes, KiB'),
        ("4 gibs", 'did you mean "GiB"'),
        ("4 megabytes", "unknown unit 'megabytes'"),
        ("4 epochs", "unknown unit 'epochs'"),
        ("0 GiB", "'0 GiB' is nothing at all"),
        ("-1 GiB", "is nothing at all; write an amount above 0"),
        ("5000000 TiB", "is more than any disk has; write 4,194,304 \"TiB\" at most"),
        ("", "'' is no amount of memory"),
        ("GiB", 'expected a number and a unit, such as "4 GiB"'),
        ("1e3 MB", "is no amount of memory"),
        (True, "True is no amount of memory"),
        (None, "None is no amount of memory"),
        ("1" * 100 + " MB", "is no amount of memory"),
    ],
)  # fmt: skip
def test_what_is_no_amount_is_refused(said: object, message: str) -> None:
    """A bare number, an unknown unit, nothing, too much and no text at all: each says what to write, and where it stood."""
    with pytest.raises(RecipeError, match=f"^here: .*{message}"):
        byte_size(said, where="here")  # type: ignore[arg-type]


def test_the_most_is_allowed() -> None:
    """The limit itself is an amount."""
    assert byte_size(f"{MOST_BYTES} bytes") == MOST_BYTES
