"""The closed forms: each shape is a pure function of the local position `s` of `n`, in float64.

`values(s, n, unit)` takes an array of positions 0 <= s <= n (position n is where the shape ended) and
returns factors of the peak rate. `unit(duration, n)` turns a duration that a shape carries
(`step_decay(at=...)`) into positions; a share is one of `n`. Positions are steps, or epochs for a part with
`per="epoch"`; the shapes cannot tell. This file must not know how parts are joined.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from lehr.duration import Duration
from lehr.errors import ScheduleError

Array = NDArray[np.float64]
ToPositions = Callable[[Duration, int], int]
Curvature = Literal["linear", "quadratic"]
Anneal = Literal["cosine", "linear"]

_MOST_CYCLES = 1_000_000


def _share(shape: str, key: str, value: float) -> None:
    """Refuse a number that is not a share of the peak."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ScheduleError(f"{shape}: {key}={value!r}; expected a share of the peak rate, from 0 to 1")


def _number(shape: str, key: str, value: float, least: float, expected: str) -> None:
    """Refuse what is no finite number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value < float("inf"):
        raise ScheduleError(f"{shape}: {key}={value!r}; expected {expected}")


def _one_of(shape: str, key: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ScheduleError(f"{shape}: {key}={value!r}; expected {' or '.join(map(repr, known))}")


class Shape(Protocol):
    """One closed form. `name` is the constructor that makes it."""

    name: ClassVar[str]

    def values(self, s: Array, n: int, unit: ToPositions) -> Array:
        """Factors at positions `s` of a part that is `n` long."""
        ...


@dataclass(frozen=True)
class Cosine:
    """floor + (1 - floor) * (1 + cos(pi * s / n)) / 2, from 1 at s = 0 to `floor` at s = n."""

    floor: float = 0.0
    name: ClassVar[str] = "cosine"

    def __post_init__(self) -> None:
        _share("cosine", "floor", self.floor)

    def values(self, s: Array, n: int, unit: ToPositions) -> Array:  # noqa: ARG002 - one signature for all shapes
        """Factors at positions `s` of `n`, as the class says."""
        return self.floor + (1.0 - self.floor) * ((1.0 + np.cos(np.pi * s / n)) / 2.0)


@dataclass(frozen=True)
class Warmup:
    """a + (1 - a) * (s / n)**p, from a at s = 0 towards 1 at s = n; p is 1 (linear) or 2 (quadratic)."""

    start: float | None = None
    curve: Curvature = "linear"
    name: ClassVar[str] = "warmup"

    def __post_init__(self) -> None:
        if self.start is not None:
            _share("warmup", "start", self.start)
        _one_of("warmup", "curve", self.curve, ("linear", "quadratic"))

    def values(self, s: Array, n: int, unit: ToPositions) -> Array:  # noqa: ARG002
        """Factors at positions `s` of `n`, as the class says."""
        start = 1.0 / (n + 1) if self.start is None else self.start
        x = s / n
        return start + (1.0 - start) * (x if self.curve == "linear" else x * x)


@dataclass(frozen=True)
class Linear:
    """floor + (1 - floor) * (1 - s / n), from 1 to `floor`."""

    floor: float = 0.0
    name: ClassVar[str] = "linear"

    def __post_init__(self) -> None:
        _share("linear", "floor", self.floor)

    def values(self, s: Array, n: int, unit: ToPositions) -> Array:  # noqa: ARG002
        """Factors at positions `s` of `n`, as the class says."""
        return self.floor + (1.0 - self.floor) * (1.0 - s / n)


@dataclass(frozen=True)
class Polynomial:
    """floor + (1 - floor) * (1 - s / n)**power, from 1 to `floor`."""

    power: float
    floor: float = 0.0
    name: ClassVar[str] = "polynomial"

    def __post_init__(self) -> None:
        _share("polynomial", "floor", self.floor)
        _number("polynomial", "power", self.power, 5e-324, "a number above 0 (1 is linear)")

    def values(self, s: Array, n: int, unit: ToPositions) -> Array:  # noqa: ARG002
        """Factors at positions `s` of `n`, as the class says."""
        return self.floor + (1.0 - self.floor) * (1.0 - s / n) ** self.power


@dataclass(frozen=True)
class Exponential:
    """floor ** (s / n), from 1 to `floor`: the same ratio from each step to the next."""

    floor: float
    name: ClassVar[str] = "exponential"

    def __post_init__(self) -> None:
        _share("exponential", "floor", self.floor)
        if self.floor == 0:
            raise ScheduleError(
                "exponential: floor=0 is never reached by a constant ratio; write a small number, say 0.001"
            )

    def values(self, s: Array, n: int, unit: ToPositions) -> Array:  # noqa: ARG002
        """Factors at positions `s` of `n`, as the class says."""
        return np.asarray(self.floor ** (s / n), dtype=np.float64)


@dataclass(frozen=True)
class Constant:
    """1 throughout."""

    name: ClassVar[str] = "constant"

    def values(self, s: Array, n: int, unit: ToPositions) -> Array:  # noqa: ARG002
        """Factors at positions `s` of `n`, as the class says."""
        return np.ones_like(s)


@dataclass(frozen=True)
class Hold:
    """`level` throughout; the join sets it to where the part before ended (1 where there is none)."""

    level: float = 1.0
    name: ClassVar[str] = "hold"

    def values(self, s: Array, n: int, unit: ToPositions) -> Array:  # noqa: ARG002
        """Factors at positions `s` of `n`, as the class says."""
        return np.full_like(s, self.level)


@dataclass(frozen=True)
class StepDecay:
    """by ** (the number of entries of `at` that are <= s): torch's MultiStepLR with gamma = by."""

    at: tuple[Duration, ...]
    by: float = 0.1
    name: ClassVar[str] = "step_decay"

    def __post_init__(self) -> None:
        _share("step_decay", "by", self.by)
        if not self.at:
            raise ScheduleError(
                'step_decay: at=[] drops nowhere; write where, for example at=["30 epochs", "60 epochs"]'
            )

    def values(self, s: Array, n: int, unit: ToPositions) -> Array:
        """Factors at positions `s` of `n`, as the class says."""
        drops = np.sort(np.array([unit(at, n) for at in self.at], dtype=np.float64))
        return np.asarray(self.by ** np.searchsorted(drops, s, side="right").astype(np.float64))


_THIRTY_PERCENT = Duration.parse("30%")


@dataclass(frozen=True)
class OneCycle:
    """From `start` up to 1 in `up`, then down to `end` at s = n; each way a half cosine or a line (Smith &
    Topin 2018).
    """

    up: Duration = _THIRTY_PERCENT
    start: float = 1 / 25
    end: float = 4e-6
    curve: Anneal = "cosine"
    name: ClassVar[str] = "one_cycle"

    def __post_init__(self) -> None:
        _share("one_cycle", "start", self.start)
        _share("one_cycle", "end", self.end)
        _one_of("one_cycle", "curve", self.curve, ("cosine", "linear"))

    def values(self, s: Array, n: int, unit: ToPositions) -> Array:
        """Factors at positions `s` of `n`, as the class says."""
        peak = unit(self.up, n)
        if peak > n:
            raise ScheduleError(f'one_cycle: up="{self.up}" is longer than the {n} it is part of')
        rise = self._between(self.start, 1.0, s / max(peak, 1))
        fall = self._between(1.0, self.end, (s - peak) / max(n - peak, 1))
        return np.where(s < peak, rise, fall)

    def _between(self, a: float, b: float, x: Array) -> Array:
        return b + (a - b) * ((1.0 + np.cos(np.pi * x)) / 2.0 if self.curve == "cosine" else 1.0 - x)


@dataclass(frozen=True)
class Restarts:
    """Warm restarts (Loshchilov & Hutter 2017, SGDR): `shape` again and again, each cycle `grow` times as
    long as the one before and starting at `decay` times its peak. Cycle i is round(first * grow**i) long.
    Where the last cycle is cut short by the end of the part, it is cut: it does not restart there.
    """

    first: Duration
    grow: float = 2.0
    decay: float = 1.0
    shape: Shape = Cosine()
    name: ClassVar[str] = "restarts"

    def __post_init__(self) -> None:
        _share("restarts", "decay", self.decay)
        _number("restarts", "grow", self.grow, 1, "1 or more (2 doubles each cycle)")
        if isinstance(self.shape, (Warmup, Hold, Restarts)):
            raise ScheduleError(
                f"restarts: shape={self.shape.name} does not come down; use cosine(), linear() or the like"
            )

    def values(self, s: Array, n: int, unit: ToPositions) -> Array:
        """Factors at positions `s` of `n`, as the class says."""
        bounds = self.bounds(n, unit)
        # Position n belongs to the cycle that ran last: a schedule that ended does not rise again.
        cycle = np.searchsorted(bounds, np.minimum(s, n - 1), side="right") - 1
        lengths, peaks = np.diff(bounds)[cycle], self.decay ** cycle.astype(np.float64)
        out = np.empty_like(s)
        for length in np.unique(lengths):  # not cycle by cycle: there may be as many cycles as steps
            here = lengths == length
            out[here] = peaks[here] * self.shape.values((s - bounds[cycle])[here], int(length), unit)
        return out

    def bounds(self, n: int, unit: ToPositions) -> Array:
        """Where each cycle that begins before position `n` begins, and where the last one would end."""
        first = unit(self.first, n)
        if first < 1:
            raise ScheduleError(
                f'restarts: first="{self.first}" is no step; the first cycle needs at least one'
            )
        starts = [0.0]
        while starts[-1] < n:
            if len(starts) > _MOST_CYCLES:
                raise ScheduleError(
                    f'restarts: first="{self.first}" begins more than {_MOST_CYCLES:,} cycles in {n:,} steps; '
                    "make the first longer, or let them grow"
                )
            starts.append(starts[-1] + max(1, int(first * self.grow ** (len(starts) - 1) + 0.5)))
        return np.array(starts)
