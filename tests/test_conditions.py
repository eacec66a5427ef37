"""Conditions: how they are read, what they refuse, and what meets them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lehr.conditions import Best, Condition, judged
from lehr.errors import ConditionError, RecipeError

METRICS = st.sampled_from(["train_error", "valid_loss", "valid_f1", "train_d_loss"])
LIMITS = st.floats(-1e9, 1e9, allow_nan=False)


@given(METRICS, st.sampled_from(["<", "<=", ">", ">="]), LIMITS)
def test_a_comparison_prints_as_it_is_read(metric: str, sign: str, limit: float) -> None:
    """What a comparison prints as reads back as the same condition, to the bit of its limit."""
    condition = Condition.parse(f"{metric} {sign} {limit!r}")
    assert (condition.metric, condition.kind, condition.limit) == (metric, sign, limit)
    assert Condition.parse(str(condition)) == condition


@given(METRICS, st.integers(1, 10**6), st.sampled_from(["epochs", "steps"]))
def test_a_plateau_prints_as_it_is_read(metric: str, length: int, unit: str) -> None:
    """What a plateau prints as reads back as the same condition."""
    condition = Condition.parse(f"  {metric}  plateaus   {length} {unit} ")
    assert (condition.kind, condition.patience.amount, condition.patience.unit) == ("plateaus", length, unit)
    assert Condition.parse(str(condition)) == condition


MISTAKES = [
    ("train_error", "is no condition; expected for example"),
    ("train_error < ", "is no condition"),
    ("train_error == 0.8", "is no condition"),
    ("train_error < 80%", "is no condition"),
    ("train_error < nan", "is no condition"),
    ("error < 0.8", "'error' is no metric; did you mean \"train_error\""),
    ("test_loss < 1", "'test_loss' is no metric"),
    ("train_ < 1", "'train_' is no metric"),
    ("train_error < 1e400", "inf is no limit; expected a finite number"),
    ("valid_loss plateaus 3", '"plateaus 3" has no unit; write "plateaus 3 epochs"'),
    ("valid_loss plateaus 0 epochs", "for how long? Write epochs or steps"),
    ("valid_loss plateaus 10%", "for how long? Write epochs or steps"),
    ("valid_loss plateaus 1.5 epochs", "after whole epochs; write a whole number"),
    (0.8, "0.8 is no condition"),
    (None, "is no condition"),
    ("train_error < 0.8" + " " * 500, "is no condition"),
]


@pytest.mark.parametrize(("said", "helpful"), MISTAKES, ids=[str(m[0])[:30] for m in MISTAKES])
def test_mistakes(said: object, helpful: str) -> None:
    """What is no condition is a recipe's error that says what one looks like."""
    with pytest.raises(ConditionError) as caught:
        Condition.parse(said)  # type: ignore[arg-type]
    assert isinstance(caught.value, RecipeError)
    assert helpful in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "met"),
    [("<", [True, False, False]), ("<=", [True, True, False]), (">", [False, False, True]), (">=", [False, True, True])],
)  # fmt: skip
def test_what_meets_a_comparison(kind: str, met: list[bool]) -> None:
    """A comparison is met by what it says, at the limit only with =, and never by NaN."""
    condition = Condition.parse(f"valid_accuracy {kind} 0.5")
    found = [judged(condition, v, Best(), at=1, patience=0, sign=1.0)[0] for v in (0.4, 0.5, 0.6, math.nan)]
    assert found == [*met, False]


@given(
    st.lists(st.sampled_from([0.1, 0.2, 0.3, 0.4, 0.5]), min_size=1, max_size=40), st.integers(1, 4), st.booleans()
)  # fmt: skip
def test_a_plateau_is_torchs(values: list[float], length: int, more: bool) -> None:
    """A plateau of n epochs is found exactly where torch's ReduceLROnPlateau(patience=n-1, threshold=0) reduces."""
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
    torchs = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, "max" if more else "min", factor=0.5, patience=length - 1, threshold=0.0
    )
    condition = Condition.parse(f"valid_x plateaus {length} epochs")
    best, rate = Best(), 1.0
    for at, value in enumerate(values, start=1):
        torchs.step(value)
        met, best = judged(condition, value, best, at=at, patience=length, sign=1.0 if more else -1.0)
        rate *= 0.5 if met else 1.0
        assert rate == optimizer.param_groups[0]["lr"] or rate < 1e-7  # torch stops at eps = 1e-8


def test_a_warm_up_is_no_plateau() -> None:
    """Measurements during a warm-up count as no plateau, though the best of them is one to beat."""
    condition = Condition.parse("valid_loss plateaus 2 epochs")
    best, found = Best(), []
    for at, value in enumerate([0.5, 0.6, 0.6, 0.6, 0.55, 0.51], start=1):
        met, best = judged(condition, value, best, at=at, patience=2, sign=-1.0, counts=at > 3)
        found.append(met)
    assert found == [False, False, False, False, True, False]


def test_nan_is_a_plateau() -> None:
    """A metric that has become NaN brings no new best, so a plateau ends."""
    condition = Condition.parse("valid_loss plateaus 2 epochs")
    best, found = Best(), []
    for at, value in enumerate([0.5, math.nan, math.nan], start=1):
        met, best = judged(condition, value, best, at=at, patience=2, sign=-1.0)
        found.append(met)
    assert found == [False, False, True]
