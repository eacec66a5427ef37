"""What joined parts, warm-ups, restarts and epochs promise, over random inputs."""

from __future__ import annotations

import math
from functools import reduce
from operator import rshift

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from closed_forms import EXACT, sgdr
from lehr.curves import Curve, Schedule
from lehr.duration import Duration
from lehr.errors import ScheduleError
from lehr.notation import read_schedule
from lehr.schedules import constant, cosine, hold, linear, restarts, warmup
from strategies import joins, percents, shapes, shares, warmups


@given(st.integers(1, 400), st.none() | shares, st.sampled_from(["linear", "quadratic"]), shapes())
def test_the_peak_comes_at_the_seam(
    length: int, start: float | None, curvature: str, after: Schedule
) -> None:
    """After W steps of warm-up the factor is exactly 1.0, or what the next part starts from, whatever the
    start.
    """
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
    np.testing.assert_allclose(
        (warmup("4 steps") >> constant()).over(steps=9)(np.arange(6)), [0.2, 0.4, 0.6, 0.8, 1, 1], atol=EXACT
    )


def test_zero_steps_of_warm_up() -> None:
    """With zero steps of warm-up the next part begins at once, and alone it is the peak."""
    for written in ("0 steps", "0%", "0 epochs"):
        joined = (warmup(written) >> cosine()).over(steps=10, steps_per_epoch=5)
        assert np.array_equal(joined(np.arange(12)), cosine().over(steps=10)(np.arange(12)))
        assert warmup(written).over(steps=10, steps_per_epoch=5)(0) == 1.0


@settings(max_examples=50)
@given(joins(), st.integers(1, 300), st.integers(1, 50))
def test_random_joins(schedule: Schedule, steps: int, steps_per_epoch: int) -> None:
    """Parts in shares of at most 100 % fit any number of steps; each sees its own local step; all contracts
    hold.
    """
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
    again = read_schedule(str(schedule))
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
    """Shares of at most 100 % together never take more steps than there are, however they round; more than
    that is refused.
    """
    said = [Duration.parse(length) for length in written]
    rounded = [length.steps(whole=steps) for length in said]
    schedule = reduce(rshift, map(hold, written))
    if sum(rounded) > steps and sum(length.amount for length in said) > 100:
        with pytest.raises(ScheduleError, match=r"its parts take \d+ steps, but there are only"):
            schedule.over(steps=steps)
        return
    got = [segment.stop - segment.start for segment in schedule.over(steps=steps).segments]
    whole = sum(length.amount for length in said) == 100
    assert sum(got) == (steps if whole else min(sum(rounded), steps))
    if sum(rounded) == steps or (sum(rounded) < steps and not whole):
        assert got == [n for n in rounded if n]


def test_the_last_share_gives_way() -> None:
    """Three thirds that round to more than the whole: the last is shorter, the first two are as they
    round.
    """
    curve = (warmup("50%") >> hold("25%") >> linear(length="25%")).over(steps=10)
    assert [segment.stop - segment.start for segment in curve.segments] == [5, 3, 2]


def test_the_last_share_takes_the_remainder() -> None:
    """Shares of 100 % together leave no step behind: what rounding left goes to the last, and no update has
    rate 0.
    """
    curve = (warmup("33%") >> hold("33%") >> linear(length="34%")).over(steps=10)
    assert [segment.stop - segment.start for segment in curve.segments] == [3, 3, 4]
    assert curve(9) == 0.25
    with_steps = (hold("5 steps") >> linear(length="50%") >> warmup("0%")).over(steps=10)
    assert with_steps(9) > 0
    assert with_steps(10) == 0
    less = (hold("33%") >> linear(length="33%")).over(steps=10)
    assert [segment.stop - segment.start for segment in less.segments] == [3, 3]


@given(
    st.one_of(
        joins(),
        st.builds(
            rshift,
            warmups(),
            st.sampled_from(["step", "epoch"]).flatmap(lambda per: shapes(None, per)),
        ),
        shapes("30%", "epoch").map(lambda part: part >> hold("0.5 epochs", per="epoch") >> constant()),
    ),
    st.integers(10, 300),
    st.integers(1, 6),
)
def test_lengths_in_whole_steps(schedule: Schedule, steps: int, steps_per_epoch: int) -> None:
    """`in_steps` gives the same factors to the bit, has no length in epochs or shares, is its own
    `in_steps`, and prints as what it reads from.
    """
    curve = schedule.over(steps=steps, steps_per_epoch=steps_per_epoch)
    resolved = curve.in_steps
    again = resolved.over(steps=steps, steps_per_epoch=steps_per_epoch)
    t = np.arange(steps + 3)
    assert np.array_equal(again(t), curve(t))
    assert all(part.length is not None and part.length.unit == "steps" for part in resolved.parts)
    assert again.in_steps == resolved == read_schedule(str(resolved))
    assert "%" not in str(resolved).replace('up="40%"', "")  # a share of each cycle of a restart stays


def test_hold_stays_where_the_part_before_ended() -> None:
    """`hold` keeps the level it finds: after a decay as after a warm-up, and the peak where it is first."""
    curve = (linear(0.3, length="5 steps") >> hold("5 steps") >> hold("5 steps")).over(steps=20)
    assert set(curve(np.arange(5, 25)).tolist()) == {0.3}
    assert hold("5 steps").over(steps=20)(3) == 1.0


@given(
    st.integers(1, 30),
    st.floats(1.0, 3.0),
    st.floats(0.0, 1.0),
    st.integers(1, 200),
    shares,
)
def test_restarts(first: int, grow: float, decay: float, steps: int, floor: float) -> None:
    """Each cycle is round(first * grow**i) long and starts at decay**i; the last is cut, and does not start
    again.
    """
    curve = restarts(f"{first} steps", grow, decay, cosine(floor)).over(steps=steps)
    expected = [sgdr(t, first, grow, decay, floor, steps) for t in range(steps + 1)]
    np.testing.assert_allclose(curve(np.arange(steps + 1)), expected, rtol=0, atol=EXACT)


def test_restarts_cut_short() -> None:
    """A last cycle that the end cuts stays at the value where it was cut; a full one stays at its floor."""
    cut = restarts("4 steps", 1).over(steps=6)
    assert cut(6) == cut(100) == pytest.approx(0.5)
    full = restarts("4 steps", 1).over(steps=8)
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
    """With per="epoch" a value holds through an epoch, with s and n counted in epochs, the last cut short or
    not.
    """
    epochs = math.ceil(steps / steps_per_epoch)
    by_epoch = cosine(0.1).over(steps=epochs)
    curve = cosine(0.1, per="epoch").over(steps=steps, steps_per_epoch=steps_per_epoch)
    t = np.arange(steps)
    assert np.array_equal(curve(t), by_epoch(t // steps_per_epoch))
    assert curve(steps) == pytest.approx(0.1)


def test_per_epoch_begins_with_the_part() -> None:
    """A part per epoch that begins within an epoch holds its first value to the end of that epoch."""
    curve = (warmup("3 steps") >> linear(per="epoch")).over(steps=20, steps_per_epoch=5)
    np.testing.assert_allclose(
        curve(np.arange(3, 21)), [1.0] * 2 + [0.75] * 5 + [0.5] * 5 + [0.25] * 5 + [0.0], atol=EXACT
    )


def test_every_part_takes_per() -> None:
    """`constant` and `hold` take `per` too: printed, read back, and without effect on what never changes."""
    schedule = linear(0.5, length="2 epochs") >> hold("2 epochs", per="epoch") >> constant(per="epoch")
    assert str(schedule).endswith('hold("2 epochs", per="epoch") >> constant(per="epoch")')
    assert read_schedule(str(schedule)) == schedule
    curve = schedule.over(steps=15, steps_per_epoch=3)
    assert curve(np.arange(6, 15)).tolist() == [0.5] * 6 + [1.0] * 3


def test_a_million_steps_at_once() -> None:
    """A three-part schedule over a million steps is computed as one array, equal to the bit to single
    calls.
    """
    curve = (warmup("5%") >> hold("10%") >> cosine(0.01)).over(steps=1_000_000)
    values = curve(np.arange(1_000_000))
    assert values.shape == (1_000_000,)
    sample = np.random.default_rng(1).integers(0, 1_000_000, 300)
    assert values[sample].tolist() == [curve(int(t)) for t in sample]


def test_many_short_cycles() -> None:
    """A hundred thousand restarts are one array as well; each of them starts at the peak."""
    values = restarts("2 steps", 1).over(steps=200_000)(np.arange(200_001))
    assert (values[:-1:2] == 1.0).all()
    assert values[-1] == 0.0
