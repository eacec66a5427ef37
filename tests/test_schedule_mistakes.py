"""Schedules that cannot be, refused in words; and how schedules print."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from lehr.errors import DurationError, ScheduleError
from lehr.notation import read_schedule
from lehr.schedules import (
    cosine,
    exponential,
    hold,
    linear,
    one_cycle,
    polynomial,
    restarts,
    step_decay,
    warmup,
)


@pytest.mark.parametrize(
    ("make", "helpful"),
    [
        (lambda: cosine(1.5), "cosine: floor=1.5; expected a share of the peak rate, from 0 to 1"),
        (lambda: cosine(-0.1), "floor=-0.1"),
        (lambda: cosine(math.nan), "floor=nan"),
        (lambda: cosine(True), "floor=True"),
        (lambda: linear("0.1"), "linear: floor='0.1'"),
        (lambda: polynomial(0), "polynomial: power=0; expected a number above 0 (1 is linear)"),
        (lambda: polynomial("2"), "power='2'; expected a number"),
        (lambda: polynomial(math.inf), "power=inf"),
        (lambda: polynomial(True), "power=True"),
        (lambda: exponential(0), "never reached by a constant ratio; write a small number, say 0.001"),
        (lambda: warmup("5%", 2), "warmup: start=2"),
        (lambda: warmup("5%", curve="cubic"), "warmup: curve='cubic'; expected 'linear' or 'quadratic'"),
        (lambda: warmup(None), 'warmup: needs a length, for example warmup("5%")'),
        (lambda: warmup(5), 'warmup(length): 5 has no unit; write "5 epochs"'),
        (lambda: hold(None), 'hold: needs a length, for example hold("5%")'),
        (
            lambda: step_decay([]),
            'at=[] drops nowhere; write where, for example at=["30 epochs", "60 epochs"]',
        ),
        (lambda: step_decay("30 epochs"), "at='30 epochs'; expected a list of durations"),
        (lambda: step_decay(5), "at=5; expected a list of durations"),
        (lambda: step_decay([5]), "step_decay(at=...): 5 has no unit"),
        (lambda: step_decay(["5%"], by=2), "step_decay: by=2"),
        (lambda: one_cycle(start=3), "one_cycle: start=3"),
        (lambda: one_cycle(curve="exp"), "one_cycle: curve='exp'; expected 'cosine' or 'linear'"),
        (
            lambda: restarts("5 steps", grow=0.5),
            "restarts: grow=0.5; expected 1 or more (2 doubles each cycle)",
        ),
        (lambda: restarts("5 steps", grow="2"), "restarts: grow='2'"),
        (lambda: restarts("5 steps", decay=1.1), "restarts: decay=1.1"),
        (
            lambda: restarts("5 steps", shape="cosine"),
            "restarts: shape='cosine'; expected a schedule, for example shape=cosine(0.01)",
        ),
        (
            lambda: restarts("5 steps", shape=cosine() >> hold("5%")),
            "expected one part without length= and per=",
        ),
        (
            lambda: restarts("5 steps", shape=restarts("2 steps")),
            "does not come down; use cosine(), linear() or the like",
        ),
        (lambda: cosine(per="batch"), 'cosine: per=\'batch\'; expected "step" or "epoch"'),
        (
            lambda: cosine() >> linear(),
            "cosine() and linear() both take what the others leave; give all but one a length, "
            'for example cosine(length="50%")',
        ),
        (lambda: cosine(0.1) >> linear(), 'for example cosine(floor=0.1, length="50%")'),
        (lambda: cosine().over(steps=0), "over steps=0; expected a whole number of at least 1"),
        (lambda: cosine().over(steps=2.5), "over steps=2.5; expected a whole number"),
        (lambda: cosine().over(steps=5, steps_per_epoch=0), "over steps_per_epoch=0"),
        (lambda: cosine().over(steps=5)(-1), "called with -1; expected a step, a whole number from 0 on"),
        (lambda: cosine().over(steps=5)(1.0), "called with 1.0; expected a step"),
        (lambda: cosine().over(steps=5)(True), "called with True"),
        (lambda: cosine().over(steps=5)(np.array([0, -3])), "expected a step, a whole number from 0 on"),
        (
            lambda: (hold("5 steps") >> cosine()).over(steps=4),
            "its parts take 5 steps, but there are only 4; shorten them, or write shares (%)",
        ),
        (
            lambda: (hold("50%") >> hold("60%")).over(steps=10),
            "its parts take 11 steps, but there are only 10",
        ),
        (
            lambda: cosine(per="epoch").over(steps=5),
            'per="epoch" needs steps_per_epoch, which is not known here; give it to over(...)',
        ),
        (lambda: hold("1 epoch").over(steps=5), 'hold("1 epoch"): "1 epoch" needs steps_per_epoch'),
        (
            lambda: one_cycle("6 steps").over(steps=5),
            'one_cycle: up="6 steps" is longer than the 5 it is part of',
        ),
        (
            lambda: restarts("0 steps").over(steps=5),
            'restarts: first="0 steps" is no step; the first cycle needs at least one',
        ),
        (
            lambda: restarts("4 steps", grow=2, shape=one_cycle("5 steps")).over(steps=20),
            'one_cycle: up="5 steps" is longer than the 4 it is part of',
        ),
        (
            lambda: restarts("9 steps", 1, shape=step_decay(["1 epoch"])).over(steps=20),
            '"1 epoch" needs steps_per_epoch',
        ),
        (lambda: hold("1 epoch", per="week"), 'hold: per=\'week\'; expected "step" or "epoch"'),
        (lambda: step_decay(["1 epoch"]).over(steps=5), '"1 epoch" needs steps_per_epoch'),
        (
            lambda: step_decay(["5 steps"], per="epoch").over(steps=9, steps_per_epoch=3),
            '"5 steps" is counted in steps, the part in epochs; write epochs',
        ),
    ],
)
def test_refused(make: Callable[[], object], helpful: str) -> None:
    """A schedule that cannot be is refused where it is made or laid over its steps, never at some later
    step.
    """
    with pytest.raises((ScheduleError, DurationError)) as caught:
        make()
    assert helpful in str(caught.value)


def test_only_schedules_join() -> None:
    """Joining a schedule with something else is a TypeError, as for every operator."""
    with pytest.raises(TypeError):
        cosine() >> 5  # type: ignore[operator]


def test_equal_numbers_print_equally() -> None:
    """2 and 2.0 are equal, so they print alike; a numpy float prints as Python's."""
    assert str(polynomial(2.0)) == str(polynomial(2)) == "polynomial(power=2)"
    assert str(cosine(np.float64(0.1))) == "cosine(floor=0.1)"
    assert read_schedule(str(exponential(np.float64(0.1)))) == exponential(0.1)


def test_readable() -> None:
    """A schedule prints as what a person would type."""
    assert str(warmup("5%") >> cosine(floor=0.01)) == 'warmup("5%") >> cosine(floor=0.01)'
    assert str(warmup("500 steps", 0.1, "quadratic")) == 'warmup("500 steps", start=0.1, curve="quadratic")'
    assert (
        str(restarts("10 epochs", grow=3, shape=linear(0.1)))
        == 'restarts(first="10 epochs", grow=3, shape=linear(floor=0.1))'
    )
    assert str(step_decay(["30 epochs", "1 epoch"])) == 'step_decay(at=["30 epochs", "1 epoch"])'
    assert str(cosine(length="3 epochs", per="epoch")) == 'cosine(length="3 epochs", per="epoch")'


def test_restarts_without_end_are_refused() -> None:
    """Ten million cycles of a step each would take a minute to lay out: a million is the most."""
    with pytest.raises(ScheduleError, match="more than 1,000,000 cycles"):
        restarts("1 step", grow=1).over(steps=10_000_000)(0)
    assert restarts("1 step", grow=2).over(steps=10_000_000)(0) == 1.0
