"""Schedules over steps: parts joined one after another, resolved to whole steps, and evaluated.

A `Schedule` is a sequence of parts; a part is a shape (`shapes.py`), a length, and whether it is counted in
steps or in epochs. `over(...)` resolves the lengths and gives a `Curve`, which is called with a step, or an
array of steps. A schedule prints as what you would type; `notation.py` reads that back. This file must not
know what a stage, a group or a rate is, nor how schedules are made (`schedules.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, replace
from fractions import Fraction
from functools import cached_property
from typing import Any, Literal, overload

import numpy as np

from lehr import shapes
from lehr.duration import Duration
from lehr.errors import ScheduleError
from lehr.shapes import Array, Shape

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
    """Parts, one after another; each sees its own local step. Made by `cosine(...)` and its like, joined
    with `>>`.
    """

    parts: tuple[Part, ...]

    def __rshift__(self, after: Schedule) -> Schedule:
        if not isinstance(after, Schedule):
            return NotImplemented
        joined = Schedule(self.parts + after.parts)
        open_ended = [part for part in joined.parts if part.length is None]
        if len(open_ended) > 1:
            first, second = open_ended[:2]
            example = replace(first, length=Duration.parse("50%"))
            raise ScheduleError(
                f"{joined}: {first} and {second} both take what the others leave; "
                f"give all but one a length, for example {example}"
            )
        return joined

    def over(self, *, steps: int, steps_per_epoch: int | None = None) -> Curve:
        """The schedule over `steps` updates, of which `steps_per_epoch` make an epoch.

        Raises:
            ScheduleError: where the parts take more than `steps`, or a length needs `steps_per_epoch` and
                there is none.

        Example:
            >>> from lehr.schedules import cosine, warmup
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

    @property
    def in_steps(self) -> Part:
        """The part that gives the same factors there, with its lengths in whole steps (in whole epochs inside
        a shape that is counted in epochs). The lengths inside a shape that restarts stay: they are of each
        cycle.
        """
        fixed = {f.name: self._fixed(getattr(self.part.shape, f.name)) for f in fields(self.part.shape)}  # type: ignore[arg-type]
        shape = shapes.Hold() if isinstance(self.part.shape, shapes.Hold) else type(self.part.shape)(**fixed)
        return replace(self.part, shape=shape, length=_steps(self.stop - self.start))

    def check(self) -> None:
        """Refuse a duration inside the shape that cannot be resolved: in any cycle, where it restarts."""
        shape = self.part.shape
        begins = shape.bounds(self.n, self._unit)[:-1] if isinstance(shape, shapes.Restarts) else np.zeros(1)
        shape.values(begins, self.n, self._unit)

    def _fixed(self, value: Any) -> Any:
        """A setting of the shape with its durations resolved."""
        if isinstance(value, Duration):
            whole = self._unit(value, self.n)
            return Duration(Fraction(whole), "epochs" if self.part.per == "epoch" else "steps")
        return tuple(map(self._fixed, value)) if isinstance(value, tuple) else value

    def _unit(self, length: Duration, whole: int) -> int:
        if self.part.per == "epoch":
            if length.unit == "steps":
                raise ScheduleError(
                    f'{self.part}: "{length}" is counted in steps, the part in epochs; write epochs'
                )
            return length.steps(whole=whole, steps_per_epoch=1, where=str(self.part))
        return length.steps(whole=whole, steps_per_epoch=self.steps_per_epoch, where=str(self.part))


@dataclass(frozen=True)
class Curve:
    """A schedule over a known number of steps: call it with a step or an integer array of steps.

    `curve(t)` is the factor that update t (0-based) uses, in float64, by the closed form; the same for an
    int and for an array. From `steps` on it stays where the last part ended: it never rises again.

    Raises:
        ScheduleError: for a step below 0 or a position that is no whole number.
    """

    schedule: Schedule
    steps: int
    steps_per_epoch: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("steps", self.steps), ("steps_per_epoch", self.steps_per_epoch)):
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1
            ):
                raise ScheduleError(
                    f"{self.schedule}: over {name}={value!r}; expected a whole number of at least 1"
                )
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
                    part = replace(part, shape=shapes.Hold(segments[-1].end if segments else 1.0))
                stop = start + length
                segments.append(
                    Segment(
                        part,
                        start,
                        stop,
                        _positions(part, start, stop, self.steps_per_epoch),
                        self.steps_per_epoch,
                    )
                )
                start = stop
        for segment in segments:
            segment.check()
        return tuple(segments)

    @property
    def in_steps(self) -> Schedule:
        """A schedule that gives the same factors, to the bit, in which every length is a number of whole
        steps; parts that got no step are left out.

        Example:
            >>> from lehr.schedules import cosine, one_cycle, warmup
            >>> (warmup("10%") >> cosine()).over(steps=100).in_steps
            warmup("10 steps") >> cosine(length="90 steps")
            >>> one_cycle("30%").over(steps=100).in_steps
            one_cycle(up="30 steps", length="100 steps")
        """
        peak = Part(shapes.Constant(), _steps(self.steps))  # where no part got a step
        return Schedule(tuple(segment.in_steps for segment in self.segments) or (peak,))

    @overload
    def __call__(self, step: int) -> float: ...
    @overload
    def __call__(self, step: np.ndarray) -> Array: ...
    def __call__(self, step: int | np.ndarray) -> float | Array:
        """The factor at a step, or at each of an array of steps."""
        steps = np.asarray(step)
        if steps.dtype.kind not in "iu" or (steps.size and steps.min() < 0):
            raise ScheduleError(
                f"{self.schedule}: called with {step!r}; expected a step, a whole number from 0 on"
            )
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
        """The factor at every step from `steps` on; 1 where no part got a step, such as a warm-up of zero
        steps.
        """
        return self.segments[-1].end if self.segments else 1.0


def _lengths(schedule: Schedule, steps: int, steps_per_epoch: int | None) -> list[int]:
    """Whole steps of each part: durations by their rounding rule, an open part gets what is left."""
    said = [part.length for part in schedule.parts]
    lengths = [
        0 if d is None else d.steps(whole=steps, steps_per_epoch=steps_per_epoch, where=str(part))
        for part, d in zip(schedule.parts, said, strict=True)
    ]
    left = steps - sum(lengths)
    exact = sum(
        (d.amount * steps / 100 if d.unit == "%" else n for n, d in zip(lengths, said, strict=True) if d),
        Fraction(0),
    )
    if left < 0 and exact > steps:
        raise ScheduleError(
            f"{schedule}: its parts take {sum(lengths)} steps, but there are only {steps}; shorten them, or write shares (%)"
        )
    if left >= 0 and None in said:
        lengths[said.index(None)] = left
    elif left < 0 or exact == steps:
        # The shares fit, only their rounding does not: the last ones give way, or the last takes what is left.
        for index in reversed(range(len(lengths))):
            duration = said[index]
            if duration is not None and duration.unit == "%" and duration.amount:
                change = max(left, -lengths[index])
                lengths[index] += change
                left -= change
    return lengths


def _steps(count: int) -> Duration:
    return Duration(Fraction(count), "steps")


def _positions(part: Part, start: int, stop: int, steps_per_epoch: int | None) -> int:
    """The n of a part: its steps, or the number of epochs that it touches."""
    if part.per == "step":
        return stop - start
    if steps_per_epoch is None:
        raise ScheduleError(
            f'{part}: per="epoch" needs steps_per_epoch, which is not known here; give it to over(...)'
        )
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
