"""Running a model must leave it as it was: what moves is noticed, and put back where it was copied."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from lehr.run.prefix.cuts import CannotSplit
from lehr.run.prefix.unmoved import unmoved


def model() -> nn.Sequential:
    """With weights of several types and layouts, and more of them than are summed at a time."""
    made = nn.Sequential(nn.Linear(600, 600), nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last))
    made.add_module("odd", nn.Linear(3, 1, bias=False).half())
    return made


def _one_bit(made: nn.Sequential) -> None:
    made[0].weight.data[-1, -1] = torch.nextafter(made[0].weight.data[-1, -1], torch.tensor(torch.inf))


def _other_memory(made: nn.Sequential) -> None:
    made[1].weight.data = made[1].weight.data.clone()


def _half(made: nn.Sequential) -> None:
    made.odd.weight.data[0, 1] += 1


MOVES = {"0.weight": _one_bit, "1.weight": _other_memory, "odd.weight": _half}


@pytest.mark.parametrize("copied", [True, False])
@pytest.mark.parametrize("name", MOVES)
def test_a_weight_that_moves_is_named(name: str, copied: bool) -> None:
    """Whatever way around autograd's counts it moves; a copy puts its values back."""
    made = model()
    before = {n: p.detach().clone() for n, p in made.named_parameters()}
    move: Callable[[nn.Sequential], None] = MOVES[name]
    with pytest.raises(CannotSplit, match=f"changes {name}"), unmoved(made, copied=copied):
        move(made)
    if copied:
        assert all(torch.equal(p, before[n]) for n, p in made.named_parameters())


@pytest.mark.parametrize("copied", [True, False])
def test_what_does_not_move_is_left_alone(copied: bool) -> None:
    """Running it, and moving a weight there and back, is no change."""
    made = model()
    with unmoved(made, copied=copied):
        made[0](torch.randn(2, 600))
        made[0].weight.data.neg_().neg_()
