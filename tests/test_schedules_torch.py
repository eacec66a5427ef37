"""Schedules beside torch's own schedulers, at every step that both define.

Tolerances: torch's `CosineAnnealingLR`, `LinearLR`, `PolynomialLR`, `ExponentialLR` and `MultiStepLR`
compute each rate from the one
before, so their rounding adds up over the steps: 1e-9 of the peak. `OneCycleLR` and
`CosineAnnealingWarmRestarts` are closed forms: 1e-12 of the peak. Where torch has a closed form beside the
chained one
(`_get_closed_form_lr`), that is compared to 1e-12 too.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler as torch_lr

from lehr.curves import Schedule
from lehr.errors import ScheduleError
from lehr.run.torch_scheduler import torch_scheduler
from lehr.schedules import (
    constant,
    cosine,
    exponential,
    linear,
    one_cycle,
    polynomial,
    restarts,
    step_decay,
    warmup,
)

PEAK = 0.3
CHAINED = 1e-9
CLOSED = 1e-12
Make = Callable[[torch.optim.Optimizer], torch_lr.LRScheduler]


def _rates(make: Make, count: int) -> tuple[np.ndarray, np.ndarray | None]:
    """The rate that each of `count` updates would use, as shares of the peak: as chained, and by torch's
    closed form if it has one.
    """
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler = make(optimizer)
    chained, closed = [], []
    form = getattr(scheduler, "_get_closed_form_lr", None)
    for t in range(count):
        chained.append(optimizer.param_groups[0]["lr"])
        if form is not None:
            closed.append(form()[0])
        optimizer.step()
        if t < count - 1:
            scheduler.step()
    return np.array(chained) / PEAK, np.array(closed) / PEAK if form is not None else None


N = 60
# schedule, torch's scheduler, the updates compared, the tolerance of the chained form
SAME: list[tuple[str, Schedule, Make, int, float]] = [
    ("CosineAnnealingLR", cosine(), lambda o: torch_lr.CosineAnnealingLR(o, T_max=N), N + 1, CHAINED),
    (
        "CosineAnnealingLR eta_min",
        cosine(0.1),
        lambda o: torch_lr.CosineAnnealingLR(o, T_max=N, eta_min=0.1 * PEAK),
        N + 1,
        CHAINED,
    ),
    (
        "LinearLR up",
        warmup(f"{N} steps", 0.2),
        lambda o: torch_lr.LinearLR(o, start_factor=0.2, total_iters=N),
        2 * N,
        CHAINED,
    ),
    (
        "LinearLR up, then constant",
        warmup("20 steps", 0.01) >> constant(),
        lambda o: torch_lr.LinearLR(o, start_factor=0.01, total_iters=20),
        N,
        CHAINED,
    ),
    (
        "LinearLR default start",
        warmup("20 steps") >> constant(),
        lambda o: torch_lr.LinearLR(o, start_factor=1 / 21, total_iters=20),
        N,
        CHAINED,
    ),
    (
        "LinearLR down",
        linear(0.25),
        lambda o: torch_lr.LinearLR(o, start_factor=1.0, end_factor=0.25, total_iters=N),
        2 * N,
        CHAINED,
    ),
    (
        "PolynomialLR",
        polynomial(2),
        lambda o: torch_lr.PolynomialLR(o, total_iters=N, power=2.0),
        2 * N,
        CHAINED,
    ),
    (
        "PolynomialLR 0.7",
        polynomial(0.7),
        lambda o: torch_lr.PolynomialLR(o, total_iters=N, power=0.7),
        2 * N,
        CHAINED,
    ),
    (
        "ExponentialLR",
        exponential(0.01),
        lambda o: torch_lr.ExponentialLR(o, gamma=0.01 ** (1 / N)),
        N + 1,
        CHAINED,
    ),
    (
        "MultiStepLR",
        step_decay(["7 steps", "30 steps", "30 steps", "59 steps"], by=0.3),
        lambda o: torch_lr.MultiStepLR(o, milestones=[7, 30, 30, 59], gamma=0.3),
        2 * N,
        CHAINED,
    ),
    (
        "CosineAnnealingWarmRestarts 1",
        restarts("12 steps", 1),
        lambda o: torch_lr.CosineAnnealingWarmRestarts(o, T_0=12),
        N,
        CLOSED,
    ),
    (
        "CosineAnnealingWarmRestarts 2",
        restarts("7 steps", grow=2),
        lambda o: torch_lr.CosineAnnealingWarmRestarts(o, T_0=7, T_mult=2),
        N,
        CLOSED,
    ),
    (
        "CosineAnnealingWarmRestarts eta_min",
        restarts("7 steps", grow=2, shape=cosine(0.05)),
        lambda o: torch_lr.CosineAnnealingWarmRestarts(o, T_0=7, T_mult=2, eta_min=0.05 * PEAK),
        N,
        CLOSED,
    ),
]


@pytest.mark.parametrize(
    ("schedule", "make", "count", "tolerance"), [row[1:] for row in SAME], ids=[row[0] for row in SAME]
)
def test_equals_torch(schedule: Schedule, make: Make, count: int, tolerance: float) -> None:
    """A schedule equals torch's scheduler of the same name at every update that both define."""
    ours = schedule.over(steps=N)(np.arange(count))
    chained, closed = _rates(make, count)
    np.testing.assert_allclose(ours, chained, rtol=0, atol=tolerance)
    if closed is not None:
        np.testing.assert_allclose(ours, closed, rtol=0, atol=CLOSED)


@pytest.mark.parametrize("anneal", ["cosine", "linear"])
@pytest.mark.parametrize(("n", "up"), [(100, 30), (97, 13), (10, 1), (60, 59), (50, 25)])
@pytest.mark.parametrize(("start", "end"), [(1 / 25, 4e-6), (0.1, 0.001), (0.5, 0.5)])
def test_one_cycle_equals_torch_with_the_shift(
    anneal: str, n: int, up: int, start: float, end: float
) -> None:
    """n steps equal OneCycleLR(total_steps=n + 1, pct_start=(W + 1) / (n + 1)), its last step being the
    value after the end.
    """
    curve = one_cycle(f"{up} steps", start=start, end=end, curve=anneal).over(steps=n)  # type: ignore[arg-type]
    chained, _ = _rates(
        lambda o: torch_lr.OneCycleLR(
            o,
            max_lr=PEAK,
            total_steps=n + 1,
            pct_start=(up + 1) / (n + 1),
            div_factor=1 / start,
            final_div_factor=start / end,
            anneal_strategy="cos" if anneal == "cosine" else "linear",
            cycle_momentum=False,
        ),
        n + 1,
    )
    np.testing.assert_allclose(curve(np.arange(n + 1)), chained, rtol=0, atol=CLOSED)


def test_one_cycle_without_the_shift_differs() -> None:
    """With torch's own reading of the same numbers the curves differ, which is why the shift is written
    down.
    """
    ours = one_cycle("30%").over(steps=100)(np.arange(100))
    chained, _ = _rates(
        lambda o: torch_lr.OneCycleLR(o, max_lr=PEAK, total_steps=100, cycle_momentum=False), 100
    )
    assert np.abs(ours - chained).max() > 1e-3
    assert chained.argmax() == 29
    assert ours.argmax() == 30


def test_torch_rises_again_and_this_does_not() -> None:
    """After T_max torch's cosine climbs back to the peak; a schedule stays at its floor."""
    chained, _ = _rates(lambda o: torch_lr.CosineAnnealingLR(o, T_max=N), 2 * N + 1)
    assert chained[2 * N] == pytest.approx(1.0, abs=1e-6)
    assert (np.diff(chained[N:]) > 0).all()
    assert set(cosine().over(steps=N)(np.arange(N, 2 * N + 1)).tolist()) == {0.0}


def test_torch_restarts_at_the_end_and_this_does_not() -> None:
    """On the step after its last cycle torch starts another at the peak; a schedule stays where it ended."""
    chained, _ = _rates(lambda o: torch_lr.CosineAnnealingWarmRestarts(o, T_0=12), N + 1)
    curve = restarts("12 steps", 1).over(steps=N)
    assert chained[N] == 1.0
    assert curve(N) == 0.0
    np.testing.assert_allclose(curve(np.arange(N)), chained[:N], rtol=0, atol=CLOSED)


def test_torch_goes_on_falling_and_this_does_not() -> None:
    """ExponentialLR multiplies for ever; `exponential` stays at its floor."""
    chained, _ = _rates(lambda o: torch_lr.ExponentialLR(o, gamma=0.01 ** (1 / N)), 2 * N)
    assert chained[-1] < 2e-4
    assert exponential(0.01).over(steps=N)(2 * N) == pytest.approx(0.01)


def test_warm_up_then_cosine_equals_sequential() -> None:
    """Joined parts equal torch's SequentialLR of the same parts with the milestone at the seam."""
    curve = (warmup("15 steps", 0.1) >> cosine(0.02)).over(steps=N)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SequentialLR calls step(0), of which torch itself warns
        chained, _ = _rates(
            lambda o: torch_lr.SequentialLR(
                o,
                [
                    torch_lr.LinearLR(o, 0.1, total_iters=15),
                    torch_lr.CosineAnnealingLR(o, N - 15, eta_min=0.02 * PEAK),
                ],
                milestones=[15],
            ),
            N,
        )
    np.testing.assert_allclose(curve(np.arange(N)), chained, rtol=0, atol=CHAINED)


@pytest.mark.parametrize(
    ("schedule", "make"),
    [
        (cosine(0.1, per="epoch"), lambda o: torch_lr.CosineAnnealingLR(o, T_max=12, eta_min=0.1 * PEAK)),
        (linear(0.1, per="epoch"), lambda o: torch_lr.LinearLR(o, 1.0, 0.1, total_iters=12)),
        (exponential(0.1, per="epoch"), lambda o: torch_lr.ExponentialLR(o, gamma=0.1 ** (1 / 12))),
        (step_decay(["3 epochs", "75%"], per="epoch"), lambda o: torch_lr.MultiStepLR(o, [3, 9])),
        (step_decay(["3 epochs", "9 epochs"]), lambda o: torch_lr.MultiStepLR(o, [3, 9])),
        (restarts("4 epochs", grow=2, per="epoch"), lambda o: torch_lr.CosineAnnealingWarmRestarts(o, 4, 2)),
    ],
    ids=str,
)
@pytest.mark.parametrize("steps_per_epoch", [1, 7])
def test_per_epoch_equals_stepping_once_an_epoch(
    schedule: Schedule, make: Make, steps_per_epoch: int
) -> None:
    """A part per epoch equals torch's scheduler stepped once at the end of each epoch."""
    curve = schedule.over(steps=12 * steps_per_epoch, steps_per_epoch=steps_per_epoch)
    chained, _ = _rates(make, 12)
    np.testing.assert_allclose(
        curve(np.arange(12 * steps_per_epoch)), np.repeat(chained, steps_per_epoch), rtol=0, atol=CHAINED
    )


def test_torch_scheduler_wants_a_curve() -> None:
    """A schedule that was not laid over its steps is refused at once, with what to write."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    with pytest.raises(ScheduleError, match=r"cosine\(\) is no curve.*schedule\.over\(steps=\.\.\.\)"):
        torch_scheduler(optimizer, cosine())  # type: ignore[arg-type]
