"""When gradients are the same up to rounding."""

from __future__ import annotations

import math

import pytest
import torch

from lehr.run.prefix.gradients import Gradients, apart, shaken


@pytest.fixture
def gradients() -> dict[str, torch.Tensor | None]:
    """A large one, one of a part that is scaled down, and one that is 0 but for rounding."""
    torch.manual_seed(0)
    return {"large": torch.randn(9), "small": 1e-7 * torch.randn(9), "nothing": 1e-10 * torch.randn(9)}


def with_(gradients: Gradients, **other: torch.Tensor | None) -> Gradients:
    return {**gradients, **other}


def test_small_gradients_are_seen(gradients: Gradients) -> None:
    """A gradient that is ten million times smaller than all is compared with itself; what is all rounding is not."""
    small = gradients["small"]
    assert apart(gradients, gradients) == {}
    assert apart(gradients, with_(gradients, nothing=torch.randn(9) * 1e-10)) == {}
    assert apart(gradients, with_(gradients, small=torch.zeros(9))) == {"small": pytest.approx(1)}
    assert apart(gradients, with_(gradients, small=1.1 * small)) == {"small": pytest.approx(0.1)}
    assert apart(gradients, with_(gradients, small=None)) == {"small": math.inf}


def test_what_the_last_bits_make_is_rounding(gradients: Gradients) -> None:
    """What a change of the features' last bits makes of a gradient is allowed it some times over: where it is all rounding
    without a bound, else by a twentieth of it."""
    nothing = {n: 30 * g for n, g in gradients.items()} | {"large": gradients["large"]}
    other = with_(nothing, nothing=-nothing["nothing"], large=1.02 * gradients["large"])
    assert apart(nothing, other).keys() == {"nothing", "large"}
    moved = with_(other, nothing=0.5 * nothing["nothing"], large=1.03 * gradients["large"])
    assert apart(nothing, other, moved) == {}
    worse = with_(other, large=1.2 * gradients["large"])
    assert apart(nothing, worse, with_(moved, large=gradients["large"])).keys() == {"large"}


def test_shaken_features() -> None:
    """The last bits of a feature change, always in the same way; whole numbers stay, and no random state is used."""
    feature = torch.randn(4, 3)
    before = torch.get_rng_state()
    assert not torch.equal(shaken(feature), feature)
    assert torch.equal(shaken(feature), shaken(feature))
    torch.testing.assert_close(shaken(feature), feature, rtol=1e-6, atol=0)
    assert torch.equal(shaken(torch.arange(5)), torch.arange(5))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gradient_of_several_pieces(dtype: torch.dtype) -> None:
    """One number of a large gradient that is another shows, wherever it stands; the gradients themselves stay as they are."""
    one = torch.ones((3 << 18) + 5, dtype=dtype)
    for place in (0, 1 << 18, -1):
        other = one.clone()
        other[place] = 1000
        assert apart({"a": one}, {"a": other})["a"] == pytest.approx(999 / one.numel() ** 0.5)
        assert other.sum() == one.numel() + 999
    assert bool((one == 1).all())
