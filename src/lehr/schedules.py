"""Schedules as frozen values: how large a share of its peak rate does a group get at a step?

A `Schedule` is a sequence of parts; a part is a shape (`shapes.py`), a length, and whether it is counted in steps or in epochs.
`a >> b` joins. `over(...)` resolves the lengths to whole steps and gives a `Curve`, which is called with a step, or an array of steps.

    (warmup("5%") >> cosine(floor=0.01)).over(steps=10_000)(0)

A schedule prints as what you would type, and `Schedule.parse` (`notation.py`) reads that back. Math only: this file must not
know what a stage, a group or a rate is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from fractions import Fraction
from functools import cached_property
from typing import Literal, overload

import numpy as np

from lehr import shapes
from lehr.duration import Duration
from lehr.errors import ScheduleError
from lehr.shapes import Anneal, Array, Curvature, Shape

Per = Literal["step", "epoch"]


@dataclass(frozen=True)
class Part:
    """A shape, how long it lasts (None: what the other parts leave), and what it is counted in."""

    shape: Shape
    length: Duration | None = None
    per: Per = "step"

    def __post_init__(self) -> None:
        if self.per not in ("step", "epoch"):
            raise ScheduleError(f'{self.shape.name}: per={self.per!r}; expected "step" or "epoch"')

    def __str__(self) -> str:
        length_first = isinstance(self.shape, (shapes.Warmup, shapes.Hold))
        said = [f'"{self.length}"'] if length_first else []
        said += list(_settings(self.shape))
        if self.length is not None and not length_first:
            said.append(f'length="{self.length}"')
        if self.per != "step":
            said.append(f'per="{self.per}"')
        return f"{self.shape.name}({', '.join(said)})"


@dataclass(frozen=True)
class Schedule:
    """Parts, one after another; each sees its own local step. Made by `cosine(...)` and its like, joined with `>>`."""

    parts: tuple[Part, ...]

    def __rshift__(self, after: Schedule) -> Schedule:
        if not isinstance(after, Schedule):
            return NotImplemented
        joined = Schedule(self.parts + after.parts)
        open_ended = [str(part) for part in joined.parts if part.length is None]
        if len(open_ended) > 1:
            raise ScheduleError(
                f"{joined}: {open_ended[0]} and {open_ended[1]} both take what the others leave; "
                f'give all but one a length, for example {open_ended[0][:-1].rstrip("(") + ("(" if open_ended[0].endswith("()") else ", ")}length="50%")'
            )
        return joined

    @classmethod
    def parse(cls, written: str, *, where: str = "schedule") -> Schedule:
        """Read a schedule as it prints: `Schedule.parse(str(schedule)) == schedule`. Nothing in the text is run."""
        from lehr.notation import read_schedule

        return read_schedule(written, where=where)

    def over(self, *, steps: int, steps_per_epoch: int | None = None) -> Curve:
        """The schedule over `steps` updates, of which `steps_per_epoch` make an epoch.

        Raises:
            ScheduleError: where the parts take more than `steps`, or a length needs `steps_per_epoch` and there is none.

        Example:
            >>> curve = (warmup("10%") >> cosine()).over(steps=100)
            >>> curve(10), curve(100), curve(1000)
            (1.0, 0.0, 0.0)
        """
        return Curve(self, steps, steps_per_epoch)

    def __str__(self) -> str:
        return " >> ".join(str(part) for part in self.parts)

    __repr__ = __str__


@dataclass(frozen=True)
class Segment:
    """A part with its place: steps `start` to `stop` (half-open), counted in `n` positions."""

    part: Part
    start: int
    stop: int
    n: int
    steps_per_epoch: int | None

    def values(self, steps: Array) -> Array:
        """Factors at global `steps`, all within the segment."""
        position = steps - self.start
        if self.part.per == "epoch":
            per = float(self.steps_per_epoch or 1)
            position = np.floor(steps / per) - np.floor(self.start / per)
        return self.part.shape.values(position, self.n, self._unit)

    @property
    def end(self) -> float:
        """Where the segment ends: the value of its shape at position n."""
        return float(self.part.shape.values(np.array([float(self.n)]), self.n, self._unit)[0])

    def _unit(self, length: Duration, whole: int) -> int:
        if self.part.per == "epoch":
            if length.unit == "steps":
                raise ScheduleError(f'{self.part}: "{length}" is counted in steps, the part in epochs; write epochs')
            return length.steps(whole=whole, steps_per_epoch=1, where=str(self.part))
        return length.steps(whole=whole, steps_per_epoch=self.steps_per_epoch, where=str(self.part))


@dataclass(frozen=True)
class Curve:
    """A schedule over a known number of steps: call it with a step or an integer array of steps.

    `curve(t)` is the factor that update t (0-based) uses, in float64, by the closed form; the same for an int and for an array.
    From `steps` on it stays where the last part ended: it never rises again.

    Raises:
        ScheduleError: for a step below 0 or a position that is no whole number.
    """

    schedule: Schedule
    steps: int
    steps_per_epoch: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("steps", self.steps), ("steps_per_epoch", self.steps_per_epoch)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1):
                raise ScheduleError(f"{self.schedule}: over {name}={value!r}; expected a whole number of at least 1")
        self.segments  # noqa: B018 - resolve now, so that what cannot be is refused here and not at the first call

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """The parts that got at least one step, with their places."""
        lengths = _lengths(self.schedule, self.steps, self.steps_per_epoch)
        segments: list[Segment] = []
        start = 0
        for part, length in zip(self.schedule.parts, lengths, strict=True):
            if length:
                if isinstance(part.shape, shapes.Hold):
                    part = replace(part, shape=shapes.Hold(segments[-1].end if segments else 1.0))  # noqa: PLW2901
                stop = start + length
                segments.append(Segment(part, start, stop, _positions(part, start, stop, self.steps_per_epoch), self.steps_per_epoch))
                start = stop
        for segment in segments:
            segment.end  # noqa: B018 - a duration inside a shape that cannot be resolved is refused here
        return tuple(segments)

    @overload
    def __call__(self, step: int) -> float: ...
    @overload
    def __call__(self, step: np.ndarray) -> Array: ...
    def __call__(self, step: int | np.ndarray) -> float | Array:
        steps = np.asarray(step)
        if steps.dtype.kind not in "iu" or (steps.size and steps.min() < 0):
            raise ScheduleError(f"{self.schedule}: called with {step!r}; expected a step, a whole number from 0 on")
        flat = steps.reshape(-1).astype(np.float64)
        out = np.full_like(flat, self.end)
        ascending = bool(np.all(flat[:-1] <= flat[1:]))
        for segment in self.segments:
            here: slice | np.ndarray = (
                slice(*np.searchsorted(flat, (segment.start, segment.stop)))  # ten times as fast as a mask
                if ascending
                else (flat >= segment.start) & (flat < segment.stop)
            )
            out[here] = segment.values(flat[here])
        return out.reshape(steps.shape) if steps.ndim or isinstance(step, np.ndarray) else float(out[0])

    @property
    def end(self) -> float:
        """The factor at every step from `steps` on; 1 where no part got a step, such as a warm-up of zero steps."""
        return self.segments[-1].end if self.segments else 1.0


def _lengths(schedule: Schedule, steps: int, steps_per_epoch: int | None) -> list[int]:
    """Whole steps of each part: durations by their rounding rule, an open part gets what is left."""
    said = [part.length for part in schedule.parts]
    lengths = [
        0 if d is None else d.steps(whole=steps, steps_per_epoch=steps_per_epoch, where=str(part))
        for part, d in zip(schedule.parts, said, strict=True)
    ]
    over = sum(lengths) - steps
    if over > 0:
        shares = sum((d.amount for d in said if d is not None and d.unit == "%"), Fraction(0))
        fixed = sum(n for n, d in zip(lengths, said, strict=True) if d is not None and d.unit != "%")
        if fixed + shares * steps / 100 > steps:
            raise ScheduleError(
                f"{schedule}: its parts take {sum(lengths)} steps, but there are only {steps}; shorten them, or write shares (%)"
            )
        # The shares fit, only their rounding does not: the last ones give way.
        for index in reversed(range(len(lengths))):
            duration = said[index]
            if duration is not None and duration.unit == "%":
                cut = min(over, lengths[index])
                lengths[index] -= cut
                over -= cut
    elif None in said:
        lengths[said.index(None)] = -over
    return lengths


def _positions(part: Part, start: int, stop: int, steps_per_epoch: int | None) -> int:
    """The n of a part: its steps, or the number of epochs that it touches."""
    if part.per == "step":
        return stop - start
    if steps_per_epoch is None:
        raise ScheduleError(f'{part}: per="epoch" needs steps_per_epoch, which is not known here; give it to over(...)')
    return -(-stop // steps_per_epoch) - start // steps_per_epoch


def _settings(shape: Shape) -> Iterator[str]:
    """The settings of a shape that are not its defaults, as keywords."""
    for f in fields(shape):  # type: ignore[arg-type]  # every shape is a dataclass; the protocol cannot say so
        value = getattr(shape, f.name)
        if isinstance(shape, shapes.Hold) or (f.default is not MISSING and value == f.default):
            continue
        yield f"{f.name}={_written(value)}"


def _written(value: object) -> str:
    if isinstance(value, (Duration, str)):
        return f'"{value}"'
    if isinstance(value, tuple):
        return f"[{', '.join(_written(item) for item in value)}]"
    if isinstance(value, (int, float)):
        # Equal numbers print equally (2.0 as 2), and numpy's as Python's.
        return repr(int(value) if float(value).is_integer() and abs(value) < 2**53 else float(value))
    return str(Part(value))  # type: ignore[arg-type]  # a shape


# ---------------------------------------------------------------------------------------------- constructors


def cosine(floor: float = 0.0, *, length: str | None = None, per: Per = "step") -> Schedule:
    """Cosine annealing: floor + (1 - floor) * (1 + cos(pi * s / n)) / 2.

    From 1 at s = 0 to `floor` at s = n, and `floor` ever after. With lr = peak * factor and lr_min = peak * floor this is
    lr_min + (lr_max - lr_min) / 2 * (1 + cos(pi T / T_max)), eq. 5 of Loshchilov & Hutter, "SGDR", 2017, and equals torch's
    `CosineAnnealingLR(T_max=n, eta_min=peak * floor)` at steps 0 to n; torch's rises again after n, this does not.

    Args:
        floor: the last factor, a share of the peak from 0 to 1.
        length: a duration; what the other parts leave, where it is not given.
        per: `"epoch"` holds each value through an epoch, with s and n counted in epochs.

    Example:
        >>> cosine().over(steps=4)(np.arange(6))
        array([1.        , 0.85355339, 0.5       , 0.14644661, 0.        ,
               0.        ])
    """
    return _single(shapes.Cosine(floor), length, per)


def warmup(length: str, start: float | None = None, curve: Curvature = "linear", *, per: Per = "step") -> Schedule:
    """Warm-up over W steps: a + (1 - a) * (s / W)**p, with p = 1 (`"linear"`) or 2 (`"quadratic"`).

    `start` is a; it defaults to 1 / (W + 1), so that the first update is never wasted at rate 0 and the peak comes exactly at the
    seam, s = W. With `start` given it equals torch's `LinearLR(start_factor=a, total_iters=W)`. Zero steps is no warm-up.

    Example:
        >>> (warmup("3 steps") >> constant()).over(steps=5)(np.arange(5))
        array([0.25, 0.5 , 0.75, 1.  , 1.  ])
    """
    return _single(shapes.Warmup(start, curve), length, per)


def linear(floor: float = 0.0, *, length: str | None = None, per: Per = "step") -> Schedule:
    """A straight line from 1 to `floor`: floor + (1 - floor) * (1 - s / n); torch's `LinearLR(1, floor, n)`.

    Example:
        >>> linear(0.5).over(steps=2)(np.arange(4))
        array([1.  , 0.75, 0.5 , 0.5 ])
    """
    return _single(shapes.Linear(floor), length, per)


def constant(*, length: str | None = None) -> Schedule:
    """The peak rate throughout.

    Example:
        >>> constant().over(steps=2)(7)
        1.0
    """
    return _single(shapes.Constant(), length, "step")


def hold(length: str) -> Schedule:
    """Stay where the part before ended (at the peak, where there is none) for `length`.

    Example:
        >>> (warmup("1 step") >> hold("2 steps") >> linear(0)).over(steps=5)(np.arange(6))
        array([0.5, 1. , 1. , 1. , 0.5, 0. ])
    """
    return _single(shapes.Hold(), length, "step")


def polynomial(power: float, floor: float = 0.0, *, length: str | None = None, per: Per = "step") -> Schedule:
    """floor + (1 - floor) * (1 - s / n)**power; with floor 0 torch's `PolynomialLR(total_iters=n, power=power)`.

    Example:
        >>> polynomial(2).over(steps=4)(np.arange(5))
        array([1.    , 0.5625, 0.25  , 0.0625, 0.    ])
    """
    return _single(shapes.Polynomial(power, floor), length, per)


def exponential(floor: float, *, length: str | None = None, per: Per = "step") -> Schedule:
    """floor ** (s / n): each step the same ratio; torch's `ExponentialLR(gamma=floor ** (1 / n))`. `floor` is above 0.

    Example:
        >>> exponential(0.25).over(steps=2)(np.arange(3))
        array([1.  , 0.5 , 0.25])
    """
    return _single(shapes.Exponential(floor), length, per)


def step_decay(at: Sequence[str], by: float = 0.1, *, length: str | None = None, per: Per = "step") -> Schedule:
    """Multiply by `by` at each of the durations `at`, counted from the start of the part; torch's `MultiStepLR`.

    Example:
        >>> step_decay(at=["1 step", "3 steps"]).over(steps=4)(np.arange(4)).round(6)
        array([1.  , 0.1 , 0.1 , 0.01])
    """
    if isinstance(at, str) or not isinstance(at, Sequence):
        raise ScheduleError(f'step_decay: at={at!r}; expected a list of durations, for example at=["30 epochs", "60 epochs"]')
    return _single(shapes.StepDecay(tuple(Duration.parse(d, where="step_decay(at=...)") for d in at), by), length, per)


def one_cycle(
    up: str = "30%", *, start: float = 1 / 25, end: float = 4e-6, curve: Anneal = "cosine", length: str | None = None, per: Per = "step"
) -> Schedule:
    """The 1cycle policy (Smith & Topin 2018): from `start` up to the peak in `up`, then down to `end`.

    The shares are torch's defaults (div_factor 25, final_div_factor 1e4). torch puts the lowest rate on its last step and counts
    the peak one step early: with W = `up` in steps, n steps here equal `OneCycleLR(total_steps=n + 1, pct_start=(W + 1) / (n + 1))`.

    Example:
        >>> one_cycle("50%", curve="linear", start=0.5, end=0.0).over(steps=4)(np.arange(5))
        array([0.5 , 0.75, 1.  , 0.5 , 0.  ])
    """
    return _single(shapes.OneCycle(Duration.parse(up, where="one_cycle(up=...)"), start, end, curve), length, per)


def restarts(
    first: str, grow: float = 1.0, decay: float = 1.0, shape: Schedule | None = None, *, length: str | None = None, per: Per = "step"
) -> Schedule:
    """Warm restarts (SGDR): cycles of `shape`, the first `first` long, each `grow` times the one before, peaks times `decay`.

    With decay 1 it equals torch's `CosineAnnealingWarmRestarts(T_0=first, T_mult=grow)` while it runs; past its end it stays.

    Args:
        first: the length of the first cycle.
        grow: 1 or more.
        decay: the peak of a cycle over the peak of the one before, from 0 to 1; floors shrink with it.
        shape: one part without a length of its own; `cosine()` where it is not given.
        length: of the whole, as for every schedule.
        per: as for every schedule.

    Example:
        >>> restarts("2 steps", grow=2, decay=0.5).over(steps=6)(np.arange(7)).round(3)
        array([1.   , 0.5  , 0.5  , 0.427, 0.25 , 0.073, 0.   ])
    """
    inner = cosine() if shape is None else shape
    if not isinstance(inner, Schedule):
        raise ScheduleError(f"restarts: shape={inner!r}; expected a schedule, for example shape=cosine(0.01)")
    if len(inner.parts) != 1 or inner.parts[0].length is not None or inner.parts[0].per != "step":
        raise ScheduleError(f"restarts: shape={inner}; expected one part without length= and per=, for example cosine(0.01)")
    said = Duration.parse(first, where="restarts(first=...)")
    return _single(shapes.Restarts(said, grow, decay, inner.parts[0].shape), length, per)


def _single(shape: Shape, length: str | None, per: Per) -> Schedule:
    if length is None and isinstance(shape, (shapes.Warmup, shapes.Hold)):
        raise ScheduleError(f'{shape.name}: needs a length, for example {shape.name}("5%")')
    said = None if length is None else Duration.parse(length, where=f"{shape.name}(length)")
    return Schedule((Part(shape, said, per),))
