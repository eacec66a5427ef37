"""Schedules: closed forms, golden numbers, the contract that every schedule keeps, and what joins promise."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from pathlib import Path

import numpy as np
import pytest

from closed_forms import EXACT, sgdr
from lehr.curves import Schedule
from lehr.notation import read_schedule
from lehr.schedules import (
    constant,
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

GOLDEN = Path(__file__).parent / "golden"


# ---------------------------------------------------------------- closed forms, by Python's math alone


def _half_cosine(a: float, b: float, x: float) -> float:
    return a + (b - a) * (1 - math.cos(math.pi * x)) / 2


N = 40
FORMS: list[tuple[Schedule, Callable[[int], float]]] = [
    (constant(), lambda _: 1.0),
    (cosine(), lambda s: 0.5 + 0.5 * math.cos(math.pi * s / N)),
    (cosine(0.01), lambda s: 0.01 + (1 - 0.01) / 2 * (1 + math.cos(math.pi * s / N))),
    (cosine(1.0), lambda _: 1.0),
    (linear(), lambda s: (N - s) / N),
    (linear(0.25), lambda s: 1 - 0.75 * s / N),
    (polynomial(3, 0.1), lambda s: 0.1 + 0.9 * ((N - s) / N) ** 3),
    (polynomial(0.5), lambda s: math.sqrt((N - s) / N)),
    (exponential(1e-3), lambda s: math.exp(math.log(1e-3) * s / N)),
    (
        step_decay(["10 steps", "25%", "30 steps"], by=0.3),
        lambda s: 1.0 if s < 10 else 0.09 if s < 30 else 0.027,
    ),
    (step_decay(["30 steps", "5 steps"], by=0.0), lambda s: 1.0 if s < 5 else 0.0),
    (
        one_cycle(),
        lambda s: _half_cosine(0.04, 1, s / 12) if s < 12 else _half_cosine(1, 4e-6, (s - 12) / 28),
    ),
    (
        one_cycle("10 steps", start=0.5, end=0.1, curve="linear"),
        lambda s: 0.5 + 0.05 * s if s < 10 else 1 - 0.9 * (s - 10) / 30,
    ),
    (one_cycle("0%", end=0.0), lambda s: _half_cosine(1, 0, s / N)),
    (one_cycle("100%", start=0.0), lambda s: _half_cosine(0, 1, s / N)),
    (restarts("10 steps", 1), lambda s: sgdr(s, 10, 1, 1, 0, N)),
    (restarts("6 steps", decay=0.5), lambda s: sgdr(s, 6, 2, 0.5, 0, N)),
    (restarts("5 steps", 1.5, 0.9, cosine(0.2)), lambda s: sgdr(s, 5, 1.5, 0.9, 0.2, N)),
    (restarts("50%", 1, decay=0.0), lambda s: sgdr(s, 20, 1, 0, 0, N)),
    (restarts("10 steps", 1, shape=linear(0.5)), lambda s: 0.5 if s == N else 1 - 0.05 * (s % 10)),
    (
        restarts("20 steps", 1, shape=one_cycle("50%", start=0.0, end=0.0, curve="linear")),
        lambda s: 1 - abs(s % 20 - 10) / 10,  # a share in a cycle's shape is a share of the cycle
    ),
    (
        restarts("20 steps", 1, decay=0.5, shape=step_decay(["50%"])),
        lambda s: [1, 0.1, 0.5, 0.05, 0.05][s // 10],
    ),
    (warmup("40 steps"), lambda s: 1 / 41 + (1 - 1 / 41) * s / N),
    (warmup("40 steps", 0.1, "quadratic"), lambda s: 0.1 + 0.9 * (s / N) ** 2),
    (
        warmup("8 steps", 0.0) >> hold("25%") >> linear(0.1),
        lambda s: s / 8 if s < 8 else 1.0 if s < 18 else 1 - 0.9 * (s - 18) / 22,
    ),
    (
        warmup("50%") >> cosine(),
        lambda s: (s + 1) / 21 if s <= 20 else 0.5 + 0.5 * math.cos(math.pi * (s - 20) / 20),
    ),
    (
        linear(0.5, length="10 steps") >> hold("10 steps") >> cosine(),
        lambda s: 1 - s / 20 if s < 10 else 0.5 if s < 20 else _half_cosine(1, 0, (s - 20) / 20),
    ),
    (cosine(per="epoch"), lambda s: 0.5 + 0.5 * math.cos(math.pi * (s // 10) / 4)),
    (
        warmup("2 epochs", 0.2, per="epoch") >> cosine(),
        lambda s: 0.2 + 0.4 * (s // 10) if s < 20 else 0.5 + 0.5 * math.cos(math.pi * (s - 20) / 20),
    ),
    (step_decay(["1 epoch", "3 epochs"], per="epoch"), lambda s: [1.0, 0.1, 0.1, 0.01, 0.01][s // 10]),
    (restarts("2 epochs", 1, decay=0.5, per="epoch"), lambda s: [1.0, 0.5, 0.5, 0.25, 0.0][s // 10]),
]
IDS = [str(schedule) for schedule, _ in FORMS]


@pytest.mark.parametrize(("schedule", "form"), FORMS, ids=IDS)
def test_closed_form(schedule: Schedule, form: Callable[[int], float]) -> None:
    """Every schedule equals its formula in float64 to 1e-12, at every step from the first to the end, and
    stays there.
    """
    curve = schedule.over(steps=N, steps_per_epoch=10)
    expected = [form(s) for s in range(N + 1)]
    np.testing.assert_allclose(curve(np.arange(N + 1)), expected, rtol=0, atol=EXACT)
    assert curve(10 * N) == curve(N)


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("schedule_*.txt")), ids=lambda path: path.stem)
def test_golden_numbers(path: Path) -> None:
    """The numbers in tests/golden are what the schedules give: a change of them is a change for every
    user.
    """
    said, over, *rows = path.read_text().splitlines()
    steps, steps_per_epoch = (int(word) for word in over.split()[1::2])
    curve = read_schedule(said).over(steps=steps, steps_per_epoch=steps_per_epoch)
    golden = {int(step): float(value) for step, value in (row.split() for row in rows)}
    assert len(golden) >= 5
    for step, value in golden.items():
        assert curve(step) == pytest.approx(value, rel=0, abs=EXACT)


def test_there_are_golden_numbers() -> None:
    """The golden files are found, so that the test over them cannot pass by being empty."""
    assert len(list(GOLDEN.glob("schedule_*.txt"))) >= 4


# ---------------------------------------------------------------- the contract


@pytest.mark.parametrize("schedule", [schedule for schedule, _ in FORMS], ids=IDS)
class TestContract:
    """What every schedule keeps; a schedule joins by a line in FORMS."""

    def test_int_and_array_agree(self, schedule: Schedule) -> None:
        """An int and an array give the same bits, for any order of the array, past the end too."""
        curve = schedule.over(steps=N, steps_per_epoch=10)
        order = np.random.default_rng(0).permutation(np.arange(3 * N))
        one_by_one = np.array([curve(int(t)) for t in order])
        assert np.array_equal(curve(order), one_by_one)
        assert np.array_equal(curve(np.sort(order))[order], one_by_one)
        assert np.array_equal(curve(order[::2]), one_by_one[::2])
        assert np.array_equal(curve(order.reshape(3, N).T), one_by_one.reshape(3, N).T)

    def test_every_kind_of_integer(self, schedule: Schedule) -> None:
        """numpy's integers, lists and empty arrays are steps too; a single step gives a float, many give
        float64.
        """
        curve = schedule.over(steps=N, steps_per_epoch=10)
        assert isinstance(curve(3), float)
        assert curve(np.int32(3)) == curve(np.uint8(3)) == curve(3)
        assert np.array_equal(curve([3, 1]), [curve(3), curve(1)])  # type: ignore[call-overload]
        assert curve(np.array([], dtype=int)).shape == (0,)
        assert curve(np.arange(N)).dtype == np.float64

    def test_stays_after_its_end(self, schedule: Schedule) -> None:
        """From `steps` on it stays where it ended: it never rises again."""
        curve = schedule.over(steps=N, steps_per_epoch=10)
        assert set(curve(np.arange(N, 5 * N)).tolist()) == {curve.end}
        assert curve(10**12) == curve.end

    def test_values_are_shares(self, schedule: Schedule) -> None:
        """Every factor lies in [0, 1]."""
        values = schedule.over(steps=N, steps_per_epoch=10)(np.arange(2 * N))
        assert values.min() >= 0
        assert values.max() <= 1

    def test_prints_what_reads_back(self, schedule: Schedule) -> None:
        """Its text is what one would type: it reads back equal, with an equal hash, and prints the same
        again.
        """
        again = read_schedule(str(schedule))
        assert again == schedule
        assert hash(again) == hash(schedule)
        assert str(again) == str(schedule) == repr(schedule)

    def test_is_a_value(self, schedule: Schedule) -> None:
        """It cannot be changed, and two curves over the same length are equal and give equal bits."""
        with pytest.raises(FrozenInstanceError):
            schedule.parts = ()  # type: ignore[misc]
        one, two = (schedule.over(steps=N, steps_per_epoch=10) for _ in range(2))
        assert one == two
        assert hash(one) == hash(two)
        assert one != schedule.over(steps=N + 1, steps_per_epoch=10)
        assert np.array_equal(one(np.arange(N)), two(np.arange(N)))

    def test_over_one_long_epoch(self, schedule: Schedule) -> None:
        """It can run over forty epochs of one step as well as over four of ten, where its lengths fit."""
        curve = schedule.over(steps=N, steps_per_epoch=1)
        assert curve(0) == curve(np.arange(1))[0]


RELATIVE = [
    constant(),
    cosine(0.1),
    linear(),
    polynomial(2),
    exponential(0.1),
    step_decay(["50%"]),
    one_cycle(),
    restarts("10%", 1),
    warmup("5%"),
    warmup("5%") >> cosine(),
    warmup("5%") >> hold("75%") >> linear(0),
    cosine(per="epoch"),
    hold("50%"),
]


@pytest.mark.parametrize("schedule", RELATIVE, ids=str)
@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_very_short(schedule: Schedule, steps: int) -> None:
    """A schedule in shares fits any number of steps, one step included."""
    values = schedule.over(steps=steps, steps_per_epoch=3)(np.arange(steps + 2))
    assert np.isfinite(values).all()
    assert values[-1] == values[-2]
