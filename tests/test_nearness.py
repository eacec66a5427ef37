"""When two tensors are the same up to rounding."""

from __future__ import annotations

import pytest
import torch

from lehr.run.prefix.nearness import near, tolerance


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def features(small: float) -> torch.Tensor:
    """Channels of one size but for the first."""
    made = torch.randn(4, 16, 6, 6)
    made[:, 0] *= small
    return made


FP32 = tolerance(torch.device("cpu"))


@pytest.mark.parametrize("small", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("dim", [0, 1, 2, 3])
def test_a_wrong_slice_is_seen(small: float, dim: int) -> None:
    """A slice that is wrong by half is seen along each dimension, however large the others are."""
    made = features(small).transpose(0, 1).transpose(0, dim)
    wrong = made.clone()
    wrong.select(dim, 0).mul_(1.5)
    assert not near(made, wrong, FP32)


@pytest.mark.parametrize("small", [1.0, 1e-2, 1e-4, 0.0])
def test_rounding_is_near(small: float) -> None:
    """What rounding makes is near, also where a channel is all that large numbers have left of each other."""
    made = features(small)
    assert near(made, made * (1 + 1e-5 * torch.randn_like(made)), FP32)
    assert near(made, made + 1e-6 * torch.randn_like(made), FP32)
    assert near(made, made + 3 - 3, FP32)


def test_what_is_not_finite() -> None:
    """NaN and infinity are near themselves only, in their places."""
    made = features(1.0)
    made[0, 0, 0], made[1, 1, 1] = float("nan"), float("inf")
    assert near(made, made * (1 + 1e-6), FP32)
    for wrong in (made.nan_to_num(nan=0.0), made.nan_to_num(nan=float("nan"), posinf=1.0), made.roll(1, 1)):
        assert not near(made, wrong, FP32)
        assert not near(wrong, made, FP32)
