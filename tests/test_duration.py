"""Durations: what is understood, what is refused and how, and the one rounding rule."""

from __future__ import annotations

from fractions import Fraction
from math import floor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lehr.duration import Duration, _decimal
from lehr.errors import DurationError
from strategies import durations


@pytest.mark.parametrize(
    ("written", "amount", "unit"),
    [
        ("5 epochs", 5, "epochs"),
        ("1 epoch", 1, "epochs"),
        ("0.5 epochs", Fraction(1, 2), "epochs"),
        (".5 epochs", Fraction(1, 2), "epochs"),
        ("400 steps", 400, "steps"),
        ("1 step", 1, "steps"),
        ("10_000 steps", 10_000, "steps"),
        ("1e3 steps", 1000, "steps"),
        ("1.5e1 steps", 15, "steps"),
        ("0 steps", 0, "steps"),
        ("+3 steps", 3, "steps"),
        ("10%", 10, "%"),
        ("2.5 %", Fraction(5, 2), "%"),
        ("100 percent", 100, "%"),
        ("  7EPOCHS ", 7, "epochs"),
    ],
)
def test_understood(written: str, amount: Fraction, unit: str) -> None:
    """Every way of writing a duration is read exactly, with no rounding through a float."""
    assert Duration.parse(written) == Duration(Fraction(amount), unit)


@pytest.mark.parametrize(
    ("written", "helpful"),
    [
        (5, '5 has no unit; write "5 epochs" or "5 steps", or a share such as "10%"'),
        (2.5, '2.5 has no unit; write "2.5 epochs"'),
        (1234567, 'write "1234567 epochs" or "1234567 steps"'),
        ("5", '\'5\' has no unit; write "5 epochs", "5 steps" or "5%"'),
        ("", '\'\' is not a duration; expected a number and a unit: "5 epochs", "400 steps" or "10%"'),
        ("soon", "'soon' is not a duration"),
        ("_ epochs", "'_ epochs' is not a duration"),
        ("5%%", "'5%%' is not a duration"),
        ("5 6 epochs", "is not a duration"),
        ("nan epochs", "is not a duration"),
        ("1e999999999 epochs", "is not a duration"),
        ("1" * 100 + " steps", "is not a duration"),
        (True, "True is not a duration"),
        (None, "None is not a duration"),
        (["5 epochs"], "is not a duration"),
        ("5 epoches", "unknown unit 'epoches'; did you mean \"epochs\""),
        ("5 minutes", "unknown unit 'minutes'. Expected epochs, steps or %"),
        ("-1 epochs", '"-1 epochs" is negative; a duration is 0 or more'),
        ("-10%", "is negative"),
        ("1.5 steps", "a step is one update and cannot be divided; write a whole number of steps"),
        ("1e-3 steps", "cannot be divided"),
        ("100.1%", "is more than the whole; a share lies between 0% and 100%"),
    ],
)
def test_refused(written: object, helpful: str) -> None:
    """A text that is no duration is refused with the place, what was written, and what to write instead."""
    with pytest.raises(DurationError) as caught:
        Duration.parse(written, where="stages.0.length")  # type: ignore[arg-type]
    assert str(caught.value).startswith("stages.0.length: ")
    assert helpful in str(caught.value)


@pytest.mark.parametrize(
    ("amount", "unit", "helpful"),
    [
        (-1, "epochs", '"-1 epochs" is negative; a duration is 0 or more'),
        (1.5, "steps", '"1.5 steps": a step is one update and cannot be divided'),
        (101, "%", '"101%" is more than the whole'),
        (5, "minutes", "unit='minutes'; expected one of 'epochs', 'steps', '%'"),
        (5, "epoch", "unit='epoch'; expected one of"),
        (float("nan"), "epochs", "amount=nan; expected a finite number"),
        (float("inf"), "epochs", "amount=inf; expected a finite number"),
        (True, "steps", "amount=True; expected a finite number"),
        ("5", "steps", "amount='5'; expected a finite number"),
    ],
)
def test_made_by_hand_is_checked_too(amount: object, unit: str, helpful: str) -> None:
    """The constructor refuses what the reader of texts refuses."""
    with pytest.raises(DurationError) as caught:
        Duration(amount, unit)  # type: ignore[arg-type]
    assert helpful in str(caught.value)


def test_made_by_hand_is_exact() -> None:
    """Any real number becomes the fraction that it prints as, so that what was made by hand reads back."""
    made = Duration(0.1, "epochs")  # type: ignore[arg-type]
    assert made == Duration.parse("0.1 epochs") == Duration.parse(str(made))
    assert isinstance(made.amount, Fraction)
    assert Duration(3, "steps") == Duration.parse("3 steps")  # type: ignore[arg-type]


def test_a_duration_passes_through() -> None:
    """Parsing a Duration gives that Duration."""
    said = Duration.parse("5 epochs")
    assert Duration.parse(said) is said


@given(durations())
def test_prints_what_reads_back(duration: Duration) -> None:
    """A duration's text reads back as an equal duration, and its repr says how to make it."""
    assert Duration.parse(str(duration)) == duration
    assert repr(duration) == f'Duration.parse("{duration}")'
    assert hash(Duration.parse(str(duration))) == hash(duration)


@given(st.decimals(0, 100, allow_nan=False, places=20))
def test_long_decimals_read_back(amount: object) -> None:
    """Twenty decimals survive: amounts are exact, never floats."""
    duration = Duration.parse(f"{amount:f}%")
    assert duration.amount == Fraction(str(amount))
    assert Duration.parse(str(duration)) == duration


@pytest.mark.parametrize(
    ("written", "printed"),
    [
        ("1 epochs", "1 epoch"),
        ("5 epoch", "5 epochs"),
        ("1.0 steps", "1 step"),
        ("0 step", "0 steps"),
        ("50.00%", "50%"),
    ],
)
def test_printed_form(written: str, printed: str) -> None:
    """Printing chooses the singular where there is one, and the shortest number."""
    assert str(Duration.parse(written)) == printed


def test_a_fraction_without_decimal_still_prints() -> None:
    """A third, which no decimal says exactly, prints as the nearest float instead of running on."""
    assert _decimal(Fraction(1, 3)) == str(1 / 3)


@given(durations(), st.integers(1, 10**7), st.integers(1, 10**5))
def test_rounding_rule(duration: Duration, whole: int, steps_per_epoch: int) -> None:
    """Exact, then rounded half up, at least one step unless it is 0; steps stay as they are."""
    got = duration.steps(whole=whole, steps_per_epoch=steps_per_epoch)
    if duration.unit == "steps":
        assert got == duration.amount
        return
    exact = duration.amount * (steps_per_epoch if duration.unit == "epochs" else Fraction(whole, 100))
    assert (got == 0) == (duration.amount == 0)
    if exact >= Fraction(1, 2):
        below = floor(exact)
        assert got == (below + 1 if exact - below >= Fraction(1, 2) else below)
    else:
        assert got == (1 if duration.amount else 0)


@pytest.mark.parametrize(
    ("written", "whole", "steps"),
    [
        ("10%", 25, 3),  # 2.5 rounds up, not to even
        ("10%", 35, 4),  # 3.5
        ("10%", 24, 2),
        ("0.1%", 10, 1),
        ("0%", 10, 0),
        ("29%", 100, 29),  # 0.29 * 100 is 28.999... in floats
        ("57%", 100, 57),
        ("100%", 7, 7),
    ],
)
def test_rounding_by_hand(written: str, whole: int, steps: int) -> None:
    """Half of a step rounds up, and a share that is exact in decimals is exact in steps."""
    assert Duration.parse(written).steps(whole=whole) == steps


def test_a_unit_needs_its_whole() -> None:
    """Epochs without steps per epoch, and a share without a whole, are refused with what to write."""
    with pytest.raises(DurationError, match=r'here: "2 epochs" needs steps_per_epoch.*or write steps'):
        Duration.parse("2 epochs").steps(whole=5, where="here")
    with pytest.raises(
        DurationError, match=r'here: "5%" is a share of a whole that is not known here; write epochs or steps'
    ):
        Duration.parse("5%").steps(steps_per_epoch=5, where="here")
    assert Duration.parse("5 steps").steps() == 5
