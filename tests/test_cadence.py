"""How often a run is saved: what is understood, what is refused and how, and when a checkpoint is due."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lehr.cadence import Cadence, Every, Moment, checkpoint_settings
from lehr.errors import DurationError, RequestError

WHOLE = st.builds(Every, st.integers(1, 10**6).map(Fraction), st.sampled_from(["steps", "epochs"]))
TIMES = st.builds(
    Every,
    st.integers(1, 10**7).map(lambda n: Fraction(n, 1000)),
    st.sampled_from(["seconds", "minutes", "hours"]),
)


@pytest.mark.parametrize(
    ("written", "amount", "unit", "printed"),
    [
        ("10 minutes", 10, "minutes", "10 minutes"),
        ("90 seconds", 90, "seconds", "90 seconds"),
        ("0.5 hours", Fraction(1, 2), "hours", "0.5 hours"),
        ("1 hours", 1, "hours", "1 hour"),
        ("500 steps", 500, "steps", "500 steps"),
        ("10_000 steps", 10_000, "steps", "10000 steps"),
        ("1 epoch", 1, "epochs", "1 epoch"),
        ("  3EPOCHS ", 3, "epochs", "3 epochs"),
    ],
)
def test_understood(written: str, amount: Fraction, unit: str, printed: str) -> None:
    """Every unit is read exactly, in the singular and the plural, and prints as it would be typed."""
    every = Every.parse(written)
    assert (every.amount, every.unit, str(every)) == (amount, unit, printed)


@given(WHOLE | TIMES)
def test_it_reads_what_it_prints(every: Every) -> None:
    """What is printed is read back as the same value, and a value that was read already stays itself."""
    assert Every.parse(str(every)) == every
    assert Every.parse(every) is every
    assert repr(every) == f'Every.parse("{every}")'


@pytest.mark.parametrize(
    ("written", "helpful"),
    [
        (10, '10 has no unit; write "10 minutes" or "10 steps" or "10 epochs"'),
        (2.5, '2.5 has no unit; write "2.5 minutes" or "2.5 hours"'),
        ("10", "'10' has no unit; write \"10 minutes\""),
        ("10 minuts", "unknown unit 'minuts'; did you mean \"minutes\"? Expected seconds, minutes, hours"),
        ("10 min", 'did you mean "minute"?'),
        ("10 m", "unknown unit 'm'. Expected seconds, minutes, hours, steps or epochs"),
        ("10%", "unknown unit '%'. Expected seconds"),
        ("2 days", "unknown unit 'days'. Expected"),
        ("0 steps", '"0 steps" never passes; write an amount above 0'),
        ("-5 minutes", '"-5 minutes" never passes'),
        ("2.5 steps", '"2.5 steps"; write whole steps, for example "1 step"'),
        ("0.5 epochs", 'write whole epochs, for example "1 epoch"'),
        ("often", "'often' does not say how often; expected a number and a unit"),
        ("", "does not say how often"),
        ("nan minutes", "does not say how often"),
        ("1e9 minutes", "does not say how often"),
        ("1" * 100 + " steps", "does not say how often"),
        (True, "True does not say how often"),
        (None, "None does not say how often"),
        (["10 minutes"], "does not say how often"),
    ],
)
def test_refused(written: object, helpful: str) -> None:
    """What does not say how often is refused with the place, what was written, and what to write instead."""
    with pytest.raises(DurationError) as caught:
        Every.parse(written, where="checkpoint")  # type: ignore[arg-type]
    assert str(caught.value).startswith("checkpoint: ")
    assert helpful in str(caught.value)
    assert len(str(caught.value)) < 300


@given(
    st.text(max_size=80) | st.from_regex(r"[-+0-9._]{1,5} ?(seconds|hours?|steps|epoch|%)", fullmatch=True)
)
def test_no_text_breaks_the_reader(text: str) -> None:
    """Any text is read, or refused as no duration; nothing else happens."""
    try:
        every = Every.parse(text)
    except DurationError:
        return
    assert every.amount > 0


def test_settings() -> None:
    """A text says how often and leaves the rest at its defaults; a table says each by its name."""
    assert checkpoint_settings("2 hours") == Cadence(Every.parse("2 hours"), keep=2, keep_best=1)
    assert checkpoint_settings({}) == Cadence() == checkpoint_settings("10 minutes")
    said = {"every": "1 epoch", "keep": 5, "keep_best": 3}
    assert checkpoint_settings(said) == Cadence(Every.parse("1 epoch"), keep=5, keep_best=3)


@pytest.mark.parametrize(
    ("said", "helpful"),
    [
        ({"evry": "10 minutes"}, "no such key 'evry'; did you mean \"every\"? Known: every, keep, keep_best"),
        ({3: 1}, "no such key 3. Known"),
        ({"k" * 1000: 1}, ". Known"),
        ({"keep": 0}, "keep: 0; expected a whole number, 1 or more"),
        ({"keep_best": -1}, "keep_best: -1; expected"),
        ({"keep": 1.0}, "keep: 1.0; expected"),
        ({"keep": True}, "keep: True; expected"),
        ({"keep": "2"}, "keep: '2'; expected"),
        ({"every": 10}, "every: 10 has no unit"),
        (600, "checkpoint: 600 has no unit"),
    ],
)
def test_settings_that_are_refused(said: object, helpful: str) -> None:
    """A wrong key or number is refused with its place below `checkpoint`."""
    with pytest.raises(RequestError) as caught:
        checkpoint_settings(said)  # type: ignore[arg-type]
    assert str(caught.value).startswith("checkpoint")
    assert helpful in str(caught.value)


@given(every=st.integers(1, 50), steps=st.integers(1, 300), stops=st.sets(st.integers(0, 300)))
def test_steps_do_not_depend_on_where_the_run_was_stopped(every: int, steps: int, stops: set[int]) -> None:
    """Checkpoints by steps are taken at the multiples, each once, wherever others were taken in between."""
    often = Every(Fraction(every), "steps")
    last, taken = Moment(0, 0, 0.0), []
    for step in range(1, steps + 1):
        now = Moment(step, 0, 0.0)
        if often.due(last=last, now=now):
            taken.append(step)
            last = now
            assert not often.due(last=last, now=now)
        elif step in stops:
            last = now
    assert taken == list(range(every, steps + 1, every))


def test_a_checkpoint_that_was_missed_is_due_at_once() -> None:
    """Where no checkpoint was taken when it was due, it is due at every moment after that."""
    last = Moment(400, 4, 0.0)
    assert Every.parse("500 steps").due(last=last, now=Moment(733, 7, 0.0))
    assert Every.parse("5 epochs").due(last=last, now=Moment(733, 7, 0.0))
    assert not Every.parse("5 epochs").due(last=Moment(733, 7, 0.0), now=Moment(980, 9, 0.0))


@given(st.integers(1, 6), st.integers(1, 40))
def test_epochs(every: int, epochs: int) -> None:
    """Checkpoints by epochs are taken when that many epochs have ended, counted from the run's start."""
    often = Every(Fraction(every), "epochs")
    due = [
        n
        for n in range(1, epochs + 1)
        if often.due(last=Moment(n * 10 - 1, n - 1, 0.0), now=Moment(n * 10, n, 0.0), epoch_ended=True)
    ]
    assert due == list(range(every, epochs + 1, every))


@given(TIMES, st.floats(0, 1e6), st.booleans())
def test_time(every: Every, passed: float, epoch_ended: bool) -> None:
    """Checkpoints by time are due when it has passed, and at the end of an epoch after a minute."""
    seconds = every.amount * {"seconds": 1, "minutes": 60, "hours": 3600}[every.unit]
    due = every.due(last=Moment(0, 0, 0.0), now=Moment(1, 1, passed), epoch_ended=epoch_ended)
    assert due == (Fraction(passed) >= seconds or (epoch_ended and passed >= 60))


@given(WHOLE | TIMES, st.floats(max_value=-1e-9) | st.just(math.nan), st.booleans())
def test_a_clock_that_goes_backwards(every: Every, seconds: float, epoch_ended: bool) -> None:
    """A clock that goes backwards, or gives no number, makes nothing due and breaks nothing; steps and epochs
    do not look at it.
    """
    last = Moment(10, 1, 0.0)
    assert not every.due(last=last, now=Moment(10, 1, seconds), epoch_ended=epoch_ended)
    still = Moment(10**7, 10**7, seconds)
    assert every.due(last=last, now=still) == (every.unit in ("steps", "epochs"))
