"""Schedules: closed forms, golden numbers, the contract that every schedule keeps, and what joins promise."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from functools import reduce
from operator import rshift
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import joins, percents, shapes, shares, warmups

from lehr.duration import Duration
from lehr.errors import DurationError, ScheduleError
from lehr.schedules import (
    Curve, Schedule, constant, cosine, exponential, hold, linear, one_cycle, polynomial, restarts, step_decay, warmup,
)  # fmt: skip

GOLDEN = Path(__file__).parent / "golden"
EXACT = 1e-12  # how far float64 may be from the closed form: a few roundings of numbers near 1


# ------------------------------------------------------------------------------------ closed forms, by Python's math alone


def _half_cosine(a: float, b: float, x: float) -> float:
    return a + (b - a) * (1 - math.cos(math.pi * x)) / 2


def _sgdr(t: int, first: int, grow: float, decay: float, floor: float, n: int) -> float:
    """Walk the cycles one by one, as a person would."""
    start, i = 0, 0
    length = first
    while start + length < min(t + 1, n):
        start += length
        i += 1
        length = max(1, math.floor(first * grow**i + 0.5))
    return decay**i * (floor + (1 - floor) * (1 + math.cos(math.pi * (t - start) / length)) / 2)


N = 40
FORMS: list[tuple[Schedule, Callable[[int], float]]] = [
    (constant(), lambda s: 1.0),
    (cosine(), lambda s: 0.5 + 0.5 * math.cos(math.pi * s / N)),
    (cosine(0.01), lambda s: 0.01 + (1 - 0.01) / 2 * (1 + math.cos(math.pi * s / N))),
    (cosine(1.0), lambda s: 1.0),
    (linear(), lambda s: (N - s) / N),
    (linear(0.25), lambda s: 1 - 0.75 * s / N),
    (polynomial(3, 0.1), lambda s: 0.1 + 0.9 * ((N - s) / N) ** 3),
    (polynomial(0.5), lambda s: math.sqrt((N - s) / N)),
    (exponential(1e-3), lambda s: math.exp(math.log(1e-3) * s / N)),
    (step_decay(["10 steps", "25%", "30 steps"], by=0.3), lambda s: 1.0 if s < 10 else 0.09 if s < 30 else 0.027),
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
    (restarts("10 steps"), lambda s: _sgdr(s, 10, 1, 1, 0, N)),
    (restarts("6 steps", grow=2, decay=0.5), lambda s: _sgdr(s, 6, 2, 0.5, 0, N)),
    (restarts("5 steps", 1.5, 0.9, cosine(0.2)), lambda s: _sgdr(s, 5, 1.5, 0.9, 0.2, N)),
    (restarts("50%", decay=0.0), lambda s: _sgdr(s, 20, 1, 0, 0, N)),
    (restarts("10 steps", shape=linear(0.5)), lambda s: 0.5 if s == N else 1 - 0.05 * (s % 10)),
    (
        restarts("20 steps", shape=one_cycle("50%", start=0.0, end=0.0, curve="linear")),
        lambda s: 1 - abs(s % 20 - 10) / 10,  # a share in a cycle's shape is a share of the cycle
    ),
    (restarts("20 steps", decay=0.5, shape=step_decay(["50%"])), lambda s: [1, 0.1, 0.5, 0.05, 0.05][s // 10]),
    (warmup("40 steps"), lambda s: 1 / 41 + (1 - 1 / 41) * s / N),
    (warmup("40 steps", 0.1, "quadratic"), lambda s: 0.1 + 0.9 * (s / N) ** 2),
    (
        warmup("8 steps", 0.0) >> hold("25%") >> linear(0.1),
        lambda s: s / 8 if s < 8 else 1.0 if s < 18 else 1 - 0.9 * (s - 18) / 22,
    ),
    (warmup("50%") >> cosine(), lambda s: (s + 1) / 21 if s <= 20 else 0.5 + 0.5 * math.cos(math.pi * (s - 20) / 20)),
    (linear(0.5, length="10 steps") >> hold("10 steps") >> cosine(), lambda s: (1 - s / 20 if s < 10 else 0.5 if s < 20
                                                                                 else _half_cosine(1, 0, (s - 20) / 20))),
    (cosine(per="epoch"), lambda s: 0.5 + 0.5 * math.cos(math.pi * (s // 10) / 4)),
    (warmup("2 epochs", 0.2, per="epoch") >> cosine(), lambda s: 0.2 + 0.4 * (s // 10) if s < 20
     else 0.5 + 0.5 * math.cos(math.pi * (s - 20) / 20)),
    (step_decay(["1 epoch", "3 epochs"], per="epoch"), lambda s: [1.0, 0.1, 0.1, 0.01, 0.01][s // 10]),
    (restarts("2 epochs", decay=0.5, per="epoch"), lambda s: [1.0, 0.5, 0.5, 0.25, 0.0][s // 10]),
]  # fmt: skip
IDS = [str(schedule) for schedule, _ in FORMS]


@pytest.mark.parametrize(("schedule", "form"), FORMS, ids=IDS)
def test_closed_form(schedule: Schedule, form: Callable[[int], float]) -> None:
    """Every schedule equals its formula in float64 to 1e-12, at every step from the first to the end, and stays there."""
    curve = schedule.over(steps=N, steps_per_epoch=10)
    expected = [form(s) for s in range(N + 1)]
    np.testing.assert_allclose(curve(np.arange(N + 1)), expected, rtol=0, atol=EXACT)
    assert curve(10 * N) == curve(N)


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("schedule_*.txt")), ids=lambda path: path.stem)
def test_golden_numbers(path: Path) -> None:
    """The numbers in tests/golden are what the schedules give: a change of them is a change for every user."""
    said, over, *rows = path.read_text().splitlines()
    steps, steps_per_epoch = (int(word) for word in over.split()[1::2])
    curve = Schedule.parse(said).over(steps=steps, steps_per_epoch=steps_per_epoch)
    golden = {int(step): float(value) for step, value in (row.split() for row in rows)}
    assert len(golden) >= 5
    for step, value in golden.items():
        assert curve(step) == pytest.approx(value, rel=0, abs=EXACT)


def test_there_are_golden_numbers() -> None:
    """The golden files are found, so that the test over them cannot pass by being empty."""
    assert len(list(GOLDEN.glob("schedule_*.txt"))) >= 4


# ------------------------------------------------------------------------------------ the contract


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
        """numpy's integers, lists and empty arrays are steps too; a single step gives a float, many give float64."""
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
        """Its text is what one would type: it reads back equal, with an equal hash, and prints the same again."""
        again = Schedule.parse(str(schedule))
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
    constant(), cosine(0.1), linear(), polynomial(2), exponential(0.1), step_decay(["50%"]), one_cycle(), restarts("10%"),
    warmup("5%"), warmup("5%") >> cosine(), warmup("5%") >> hold("75%") >> linear(0), cosine(per="epoch"), hold("50%"),
]  # fmt: skip


@pytest.mark.parametrize("schedule", RELATIVE, ids=str)
@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_very_short(schedule: Schedule, steps: int) -> None:
    """A schedule in shares fits any number of steps, one step included."""
    values = schedule.over(steps=steps, steps_per_epoch=3)(np.arange(steps + 2))
    assert np.isfinite(values).all()
    assert values[-1] == values[-2]


# ------------------------------------------------------------------------------------ warm-up and joins


@given(st.integers(1, 400), st.none() | shares, st.sampled_from(["linear", "quadratic"]), shapes())
def test_the_peak_comes_at_the_seam(length: int, start: float | None, curvature: str, after: Schedule) -> None:
    """After W steps of warm-up the factor is exactly 1.0, or what the next part starts from, whatever the start."""
    curve = (warmup(f"{length} steps", start, curvature) >> after).over(steps=length + 100)  # type: ignore[arg-type]
    assert curve(0) == pytest.approx(1 / (length + 1) if start is None else start, abs=1e-15)
    assert curve.segments[0].end == 1.0
    assert curve(length) == after.over(steps=100)(0)
    rising = curve(np.arange(length))
    assert (np.diff(rising) >= 0).all()
    assert (rising <= 1).all()


@given(warmups())
def test_a_warm_up_alone_ends_at_the_peak(schedule: Schedule) -> None:
    """A warm-up with nothing after it stays at the peak; zero steps of warm-up is no warm-up."""
    curve = schedule.over(steps=1000)
    assert curve(1000) == 1.0
    if schedule.parts[0].length is not None and not schedule.parts[0].length.amount:
        assert curve(0) == 1.0


def test_no_update_is_wasted_by_default() -> None:
    """The default start is 1 / (W + 1): W equal stairs, the first above 0, the peak at the seam."""
    np.testing.assert_allclose((warmup("4 steps") >> constant()).over(steps=9)(np.arange(6)), [0.2, 0.4, 0.6, 0.8, 1, 1], atol=EXACT)


def test_zero_steps_of_warm_up() -> None:
    """With zero steps of warm-up the next part begins at once, and alone it is the peak."""
    for written in ("0 steps", "0%", "0 epochs"):
        joined = (warmup(written) >> cosine()).over(steps=10, steps_per_epoch=5)
        assert np.array_equal(joined(np.arange(12)), cosine().over(steps=10)(np.arange(12)))
        assert warmup(written).over(steps=10, steps_per_epoch=5)(0) == 1.0


@settings(max_examples=50)
@given(joins(), st.integers(1, 300), st.integers(1, 50))
def test_random_joins(schedule: Schedule, steps: int, steps_per_epoch: int) -> None:
    """Parts in shares of at most 100 % fit any number of steps; each sees its own local step; all contracts hold."""
    curve = schedule.over(steps=steps, steps_per_epoch=steps_per_epoch)
    t = np.arange(steps + 3)
    values = curve(t)
    assert ((values >= 0) & (values <= 1)).all()
    assert (values[steps:] == curve.end).all()
    assert np.array_equal(curve(t[::-1]), values[::-1])
    sample = np.unique(np.linspace(0, steps + 2, 6).astype(int))
    assert [curve(int(k)) for k in sample] == values[sample].tolist()
    _segments_tile(curve, steps)
    for segment in curve.segments:
        alone = segment.part.shape.values(np.arange(segment.n, dtype=float), segment.n, segment._unit)
        assert np.array_equal(values[segment.start : segment.stop], alone)
    again = Schedule.parse(str(schedule))
    assert again == schedule
    assert np.array_equal(again.over(steps=steps, steps_per_epoch=steps_per_epoch)(t), values)


def _segments_tile(curve: Curve, steps: int) -> None:
    """Segments follow each other from 0 without gap or overlap; an open part takes what is left."""
    at = 0
    for segment in curve.segments:
        assert segment.start == at
        assert segment.stop > segment.start
        at = segment.stop
    assert at <= steps
    if any(part.length is None for part in curve.schedule.parts):
        assert at == steps


@given(st.lists(percents, min_size=1, max_size=6), st.integers(1, 500))
def test_rounded_shares_never_overflow(written: list[str], steps: int) -> None:
    """Shares of at most 100 % together never take more steps than there are, however they round; more than that is refused."""
    said = [Duration.parse(length) for length in written]
    rounded = [length.steps(whole=steps) for length in said]
    schedule = reduce(rshift, map(hold, written))
    if sum(rounded) > steps and sum(length.amount for length in said) > 100:
        with pytest.raises(ScheduleError, match=r"its parts take \d+ steps, but there are only"):
            schedule.over(steps=steps)
        return
    got = [segment.stop - segment.start for segment in schedule.over(steps=steps).segments]
    assert sum(got) == min(sum(rounded), steps)
    if sum(rounded) <= steps:
        assert got == [n for n in rounded if n]


def test_the_last_share_gives_way() -> None:
    """Three thirds that round to more than the whole: the last is shorter, the first two are as they round."""
    curve = (warmup("50%") >> hold("25%") >> linear(length="25%")).over(steps=10)
    assert [segment.stop - segment.start for segment in curve.segments] == [5, 3, 2]


def test_hold_stays_where_the_part_before_ended() -> None:
    """`hold` keeps the level it finds: after a decay as after a warm-up, and the peak where it is first."""
    curve = (linear(0.3, length="5 steps") >> hold("5 steps") >> hold("5 steps")).over(steps=20)
    assert set(curve(np.arange(5, 25)).tolist()) == {0.3}
    assert hold("5 steps").over(steps=20)(3) == 1.0


@given(
    st.integers(1, 30), st.floats(1.0, 3.0), st.floats(0.0, 1.0), st.integers(1, 200), shares,
)  # fmt: skip
def test_restarts(first: int, grow: float, decay: float, steps: int, floor: float) -> None:
    """Each cycle is round(first * grow**i) long and starts at decay**i; the last is cut, and does not start again."""
    curve = restarts(f"{first} steps", grow, decay, cosine(floor)).over(steps=steps)
    expected = [_sgdr(t, first, grow, decay, floor, steps) for t in range(steps + 1)]
    np.testing.assert_allclose(curve(np.arange(steps + 1)), expected, rtol=0, atol=EXACT)


def test_restarts_cut_short() -> None:
    """A last cycle that the end cuts stays at the value where it was cut; a full one stays at its floor."""
    cut = restarts("4 steps").over(steps=6)
    assert cut(6) == cut(100) == pytest.approx(0.5)
    full = restarts("4 steps").over(steps=8)
    assert full(8) == full(100) == 0.0
    assert full(4) == 1.0


def test_quadratic_warm_up_starts_gently() -> None:
    """The quadratic curve lies below the linear one between the same ends, and both end at the peak."""
    t = np.arange(20)
    flat = (warmup("20 steps", 0.1, "quadratic") >> constant()).over(steps=30)
    line = (warmup("20 steps", 0.1) >> constant()).over(steps=30)
    assert flat(0) == line(0) == 0.1
    assert (flat(t[1:]) < line(t[1:])).all()
    assert flat(20) == line(20) == 1.0


@given(st.integers(1, 60), st.integers(1, 20))
def test_per_epoch_holds_through_each_epoch(steps: int, steps_per_epoch: int) -> None:
    """With per="epoch" a value holds through an epoch, with s and n counted in epochs, the last cut short or not."""
    epochs = math.ceil(steps / steps_per_epoch)
    by_epoch = cosine(0.1).over(steps=epochs)
    curve = cosine(0.1, per="epoch").over(steps=steps, steps_per_epoch=steps_per_epoch)
    t = np.arange(steps)
    assert np.array_equal(curve(t), by_epoch(t // steps_per_epoch))
    assert curve(steps) == pytest.approx(0.1)


def test_per_epoch_begins_with_the_part() -> None:
    """A part per epoch that begins within an epoch holds its first value to the end of that epoch."""
    curve = (warmup("3 steps") >> linear(per="epoch")).over(steps=20, steps_per_epoch=5)
    np.testing.assert_allclose(curve(np.arange(3, 21)), [1.0] * 2 + [0.75] * 5 + [0.5] * 5 + [0.25] * 5 + [0.0], atol=EXACT)


def test_a_million_steps_at_once() -> None:
    """A three-part schedule over a million steps is computed as one array, equal to the bit to single calls."""
    curve = (warmup("5%") >> hold("10%") >> cosine(0.01)).over(steps=1_000_000)
    values = curve(np.arange(1_000_000))
    assert values.shape == (1_000_000,)
    sample = np.random.default_rng(1).integers(0, 1_000_000, 300)
    assert values[sample].tolist() == [curve(int(t)) for t in sample]


def test_many_short_cycles() -> None:
    """A hundred thousand restarts are one array as well; each of them starts at the peak."""
    values = restarts("2 steps").over(steps=200_000)(np.arange(200_001))
    assert (values[:-1:2] == 1.0).all()
    assert values[-1] == 0.0


# ------------------------------------------------------------------------------------ what is refused


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
        (lambda: step_decay([]), 'at=[] drops nowhere; write where, for example at=["30 epochs", "60 epochs"]'),
        (lambda: step_decay("30 epochs"), "at='30 epochs'; expected a list of durations"),
        (lambda: step_decay(5), "at=5; expected a list of durations"),
        (lambda: step_decay([5]), "step_decay(at=...): 5 has no unit"),
        (lambda: step_decay(["5%"], by=2), "step_decay: by=2"),
        (lambda: one_cycle(start=3), "one_cycle: start=3"),
        (lambda: one_cycle(curve="exp"), "one_cycle: curve='exp'; expected 'cosine' or 'linear'"),
        (lambda: restarts("5 steps", grow=0.5), "restarts: grow=0.5; expected 1 or more (2 doubles each cycle)"),
        (lambda: restarts("5 steps", grow="2"), "restarts: grow='2'"),
        (lambda: restarts("5 steps", decay=1.1), "restarts: decay=1.1"),
        (lambda: restarts("5 steps", shape="cosine"), "restarts: shape='cosine'; expected a schedule, for example shape=cosine(0.01)"),
        (lambda: restarts("5 steps", shape=cosine() >> hold("5%")), "expected one part without length= and per="),
        (lambda: restarts("5 steps", shape=restarts("2 steps")), "does not come down; use cosine(), linear() or the like"),
        (lambda: cosine(per="batch"), 'cosine: per=\'batch\'; expected "step" or "epoch"'),
        (lambda: cosine() >> linear(), 'cosine() and linear() both take what the others leave; give all but one a length, '
                                       'for example cosine(length="50%")'),
        (lambda: cosine(0.1) >> linear(), 'for example cosine(floor=0.1, length="50%")'),
        (lambda: cosine().over(steps=0), "over steps=0; expected a whole number of at least 1"),
        (lambda: cosine().over(steps=2.5), "over steps=2.5; expected a whole number"),
        (lambda: cosine().over(steps=5, steps_per_epoch=0), "over steps_per_epoch=0"),
        (lambda: cosine().over(steps=5)(-1), "called with -1; expected a step, a whole number from 0 on"),
        (lambda: cosine().over(steps=5)(1.0), "called with 1.0; expected a step"),
        (lambda: cosine().over(steps=5)(True), "called with True"),
        (lambda: cosine().over(steps=5)(np.array([0, -3])), "expected a step, a whole number from 0 on"),
        (lambda: (hold("5 steps") >> cosine()).over(steps=4), "its parts take 5 steps, but there are only 4; shorten them, or write "
                                                              "shares (%)"),
        (lambda: (hold("50%") >> hold("60%")).over(steps=10), "its parts take 11 steps, but there are only 10"),
        (lambda: cosine(per="epoch").over(steps=5), 'per="epoch" needs steps_per_epoch, which is not known here; give it to over(...)'),
        (lambda: hold("1 epoch").over(steps=5), 'hold("1 epoch"): "1 epoch" needs steps_per_epoch'),
        (lambda: one_cycle("6 steps").over(steps=5), 'one_cycle: up="6 steps" is longer than the 5 it is part of'),
        (lambda: restarts("0 steps").over(steps=5), 'restarts: first="0 steps" is no step; the first cycle needs at least one'),
        (lambda: step_decay(["1 epoch"]).over(steps=5), '"1 epoch" needs steps_per_epoch'),
        (lambda: step_decay(["5 steps"], per="epoch").over(steps=9, steps_per_epoch=3), '"5 steps" is counted in steps, the part in '
                                                                                       'epochs; write epochs'),
    ],
)  # fmt: skip
def test_refused(make: Callable[[], object], helpful: str) -> None:
    """A schedule that cannot be is refused where it is made or laid over its steps, never at some later step."""
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
    assert Schedule.parse(str(exponential(np.float64(0.1)))) == exponential(0.1)


def test_readable() -> None:
    """A schedule prints as what a person would type."""
    assert str(warmup("5%") >> cosine(floor=0.01)) == 'warmup("5%") >> cosine(floor=0.01)'
    assert str(warmup("500 steps", 0.1, "quadratic")) == 'warmup("500 steps", start=0.1, curve="quadratic")'
    assert str(restarts("10 epochs", grow=2, shape=linear(0.1))) == 'restarts(first="10 epochs", grow=2, shape=linear(floor=0.1))'
    assert str(step_decay(["30 epochs", "1 epoch"])) == 'step_decay(at=["30 epochs", "1 epoch"])'
    assert str(cosine(length="3 epochs", per="epoch")) == 'cosine(length="3 epochs", per="epoch")'
