"""Running a model must leave it as it was: what moves is noticed, and put back."""

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


@pytest.mark.parametrize("name", MOVES)
def test_a_weight_that_moves_is_named(name: str) -> None:
    """Whatever way around autograd's counts it moves; and it has its values again."""
    made = model()
    before = {n: p.detach().clone() for n, p in made.named_parameters()}
    move: Callable[[nn.Sequential], None] = MOVES[name]
    with pytest.raises(CannotSplit, match=f"changes {name}"), unmoved(made):
        move(made)
    assert all(torch.equal(p, before[n]) for n, p in made.named_parameters())


def test_what_does_not_move_is_left_alone() -> None:
    """Running it, and moving a weight there and back, is no change."""
    made = model()
    with unmoved(made):
        made[0](torch.randn(2, 600))
        made[0].weight.data.neg_().neg_()


def test_nothing_is_copied_where_nothing_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model as large as the memory can be looked at."""
    made, images = model(), torch.randn(2, 3, 8, 8)
    monkeypatch.setattr(torch.Tensor, "clone", None)
    with unmoved(made):
        made[1](images).sum().backward()


def test_parameters_that_share_their_memory_are_all_put_back() -> None:
    """Parts of one block, as some libraries lay them out, are written to through the whole."""
    made, block = nn.ParameterList(), torch.arange(6.0)
    made.extend([nn.Parameter(block[:2]), nn.Parameter(block[2:])])
    with pytest.raises(CannotSplit, match="changes 0"), unmoved(made):
        block.add_(1)
    assert torch.equal(block, torch.arange(6.0))


def test_what_is_written_past_torch_is_noticed() -> None:
    """NumPy writes to the same memory, which nothing of torch sees."""
    made = model()
    with pytest.raises(CannotSplit, match=r"changes 0\.weight"), unmoved(made):
        made[0].weight.detach().numpy()[0, 0] += 1


def test_a_compiled_model_is_compiled_afterwards() -> None:
    """torch.compile leaves a model as it is while somebody looks at its operations: not for good."""
    made = model()
    compiled = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        compiled.append(graph)
        return graph.forward

    run = torch.compile(made[0], backend=backend)
    with unmoved(made):
        run(torch.randn(2, 600))
    run(torch.randn(2, 600))
    assert len(compiled) == 1
