"""Running a model must leave it as it was: what moves is noticed, and put back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from lehr.run.prefix.cuts import CannotSplit
from lehr.run.prefix.unmoved import undone, unmoved


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


@pytest.mark.parametrize("name", MOVES)
def test_a_weight_that_moves_is_named(name: str) -> None:
    """Whatever way around autograd's counts it moves; and it has its values again."""
    made = model()
    before = {n: p.detach().clone() for n, p in made.named_parameters()}
    move: Callable[[nn.Sequential], None] = MOVES[name]
    with pytest.raises(CannotSplit, match=f"changes {name}"), unmoved(made), undone(made):
        move(made)
    assert all(torch.equal(p, before[n]) for n, p in made.named_parameters())


@pytest.mark.parametrize("name", MOVES)
def test_where_it_is_not_undone_it_is_noticed(name: str) -> None:
    """By its sums alone."""
    made = model()
    with pytest.raises(CannotSplit, match=f"changes {name}"), unmoved(made):
        MOVES[name](made)


def test_what_does_not_move_is_left_alone() -> None:
    """Running it, and moving a weight there and back, is no change."""
    made = model()
    with unmoved(made), undone(made):
        made[0](torch.randn(2, 600))
        made[0].weight.data.neg_().neg_()


def test_nothing_is_copied_where_nothing_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model as large as the memory can be looked at, also where its weights are read by what writes elsewhere."""
    made, images = model(), torch.randn(2, 3, 8, 8)
    monkeypatch.setattr(torch.Tensor, "clone", None)
    with unmoved(made), undone(made):
        made[1](images).sum().backward()
        torch.mm(made[0].weight.data, made[0].weight.data, out=torch.empty(600, 600))


def test_parameters_that_share_their_memory_are_all_put_back() -> None:
    """Parts of one block, as some libraries lay them out, are written to through the whole."""
    made, block = nn.ParameterList(), torch.arange(6.0)
    made.extend([nn.Parameter(block[:2]), nn.Parameter(block[2:])])
    with pytest.raises(CannotSplit, match="changes 0"), undone(made):
        block.add_(1)
    assert torch.equal(block, torch.arange(6.0))


def test_rows_that_change_places_are_noticed() -> None:
    """What keeps the sum of all is seen where it was copied."""
    made = model()
    with pytest.raises(CannotSplit, match=r"changes 0\.weight"), undone(made):
        made[0].weight.data.copy_(made[0].weight.data.flip(0))


def test_what_is_written_past_torch_is_noticed() -> None:
    """NumPy writes to the same memory, which nothing of torch sees."""
    made = model()
    with pytest.raises(CannotSplit, match=r"changes 0\.weight"), unmoved(made), undone(made):
        made[0].weight.detach().numpy()[0, 0] += 1


@pytest.mark.skipif(torch.__version__ < "2.7", reason="torch 2.6 runs them in no mode that it does not know")
def test_operators_that_take_functions() -> None:
    """They run there as elsewhere."""
    with undone(model()):
        found = torch.cond(torch.tensor(True), lambda x: x + 1, lambda x: x - 1, (torch.ones(2),))
    assert found.tolist() == [2.0, 2.0]
