"""The schedules that a person writes: `warmup("5%") >> cosine(floor=0.01)`. Each function makes a
`Schedule` of one part.

    (warmup("5%") >> cosine(floor=0.01)).over(steps=10_000)(0)

Formulas are in each docstring and in `shapes.py`; joining and evaluating is in `curves.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np  # noqa: F401 - for the examples

from lehr import shapes
from lehr.curves import Part, Per, Schedule
from lehr.duration import Duration
from lehr.errors import ScheduleError
from lehr.shapes import Anneal, Curvature, Shape


def cosine(floor: float = 0.0, *, length: str | None = None, per: Per = "step") -> Schedule:
    """Cosine annealing: floor + (1 - floor) * (1 + cos(pi * s / n)) / 2.

    From 1 at s = 0 to `floor` at s = n, and `floor` ever after. With lr = peak * factor and lr_min = peak *
    floor this is lr_min + (lr_max - lr_min) / 2 * (1 + cos(pi T / T_max)), eq. 5 of Loshchilov & Hutter,
    "SGDR", 2017, and equals torch's `CosineAnnealingLR(T_max=n, eta_min=peak * floor)` at steps 0 to n;
    torch's rises again after n, this does not.

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


def warmup(
    length: str, start: float | None = None, curve: Curvature = "linear", *, per: Per = "step"
) -> Schedule:
    """Warm-up over W steps: a + (1 - a) * (s / W)**p, with p = 1 (`"linear"`) or 2 (`"quadratic"`).

    `start` is a; it defaults to 1 / (W + 1), so that the first update is never wasted at rate 0 and the
    peak comes exactly at the seam, s = W. With `start` given it equals torch's `LinearLR(start_factor=a,
    total_iters=W)`. Zero steps is no warm-up.

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


def constant(*, length: str | None = None, per: Per = "step") -> Schedule:
    """The peak rate throughout.

    Example:
        >>> constant().over(steps=2)(7)
        1.0
    """
    return _single(shapes.Constant(), length, per)


def hold(length: str, *, per: Per = "step") -> Schedule:
    """Stay where the part before ended (at the peak, where there is none) for `length`.

    Example:
        >>> (warmup("1 step") >> hold("2 steps") >> linear(0)).over(steps=5)(np.arange(6))
        array([0.5, 1. , 1. , 1. , 0.5, 0. ])
    """
    return _single(shapes.Hold(), length, per)


def polynomial(power: float, floor: float = 0.0, *, length: str | None = None, per: Per = "step") -> Schedule:
    """floor + (1 - floor) * (1 - s / n)**power; with floor 0 torch's `PolynomialLR(total_iters=n,
    power=power)`.

    Example:
        >>> polynomial(2).over(steps=4)(np.arange(5))
        array([1.    , 0.5625, 0.25  , 0.0625, 0.    ])
    """
    return _single(shapes.Polynomial(power, floor), length, per)


def exponential(floor: float, *, length: str | None = None, per: Per = "step") -> Schedule:
    """floor ** (s / n): each step the same ratio; torch's `ExponentialLR(gamma=floor ** (1 / n))`. `floor`
    is above 0.

    Example:
        >>> exponential(0.25).over(steps=2)(np.arange(3))
        array([1.  , 0.5 , 0.25])
    """
    return _single(shapes.Exponential(floor), length, per)


def step_decay(
    at: Sequence[str], by: float = 0.1, *, length: str | None = None, per: Per = "step"
) -> Schedule:
    """Multiply by `by` at each of the durations `at`, counted from the start of the part; torch's
    `MultiStepLR`.

    Example:
        >>> step_decay(at=["1 step", "3 steps"]).over(steps=4)(np.arange(4)).round(6)
        array([1.  , 0.1 , 0.1 , 0.01])
    """
    if isinstance(at, str) or not isinstance(at, Sequence):
        raise ScheduleError(
            f'step_decay: at={at!r}; expected a list of durations, for example at=["30 epochs", "60 epochs"]'
        )
    return _single(
        shapes.StepDecay(tuple(Duration.parse(d, where="step_decay(at=...)") for d in at), by), length, per
    )


def one_cycle(
    up: str = "30%",
    *,
    start: float = 1 / 25,
    end: float = 4e-6,
    curve: Anneal = "cosine",
    length: str | None = None,
    per: Per = "step",
) -> Schedule:
    """The 1cycle policy (Smith & Topin 2018): from `start` up to the peak in `up`, then down to `end`.

    The shares are torch's defaults (div_factor 25, final_div_factor 1e4). torch puts the lowest rate on its
    last step and counts the peak one step early: with W = `up` in steps, n steps here equal
    `OneCycleLR(total_steps=n + 1, pct_start=(W + 1) / (n + 1))`.

    Example:
        >>> one_cycle("50%", curve="linear", start=0.5, end=0.0).over(steps=4)(np.arange(5))
        array([0.5 , 0.75, 1.  , 0.5 , 0.  ])
    """
    return _single(
        shapes.OneCycle(Duration.parse(up, where="one_cycle(up=...)"), start, end, curve), length, per
    )


def restarts(
    first: str,
    grow: float = 2.0,
    decay: float = 1.0,
    shape: Schedule | None = None,
    *,
    length: str | None = None,
    per: Per = "step",
) -> Schedule:
    """Warm restarts (SGDR): cycles of `shape`, the first `first` long, each `grow` times the one before,
    peaks times `decay`.

    With decay 1 it equals torch's `CosineAnnealingWarmRestarts(T_0=first, T_mult=grow)` while it runs; past
    its end it stays.

    Args:
        first: the length of the first cycle.
        grow: 1 (cycles of one length) or more.
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
        raise ScheduleError(
            f"restarts: shape={inner}; expected one part without length= and per=, for example cosine(0.01)"
        )
    said = Duration.parse(first, where="restarts(first=...)")
    return _single(shapes.Restarts(said, grow, decay, inner.parts[0].shape), length, per)


def _single(shape: Shape, length: str | None, per: Per) -> Schedule:
    if length is None and isinstance(shape, (shapes.Warmup, shapes.Hold)):
        raise ScheduleError(f'{shape.name}: needs a length, for example {shape.name}("5%")')
    said = None if length is None else Duration.parse(length, where=f"{shape.name}(length)")
    return Schedule((Part(shape, said, per),))
