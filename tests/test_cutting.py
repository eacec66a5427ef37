"""Where a graph is cut, and what has to be minded there: in-place operations, aliases, sizes, constants, bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from halving import analysed, assert_same, halves_of, proved
from lehr.run.prefix.analysis import Call, CannotSplit
from lehr.run.prefix.cuts import Crossing, Cut, choose


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


class Function(nn.Module):
    """A frozen layer, a function of its output and of the model, and a head that trains."""

    def __init__(self, function: Callable[..., torch.Tensor], inputs: int = 6) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(inputs, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, x)


def check(function: Callable[..., Any]) -> Any:
    """Cut at each place that is offered, proved, and compared for several sizes of batch; the analysis."""
    model, call = Function(function), Call((torch.randn(5, 6),), {})
    analysis = analysed(model, call, "head")
    for cut in analysis.cuts:
        halves = analysis.split(cut)
        proved(model, halves, call)
        for size in (1, 2, 5):
            assert_same(model, halves, Call((torch.randn(size, 6),), {}))
    return analysis


def test_written_to_behind_the_cut() -> None:
    """What crosses may be changed in place behind the cut; the features that were kept are not."""

    def function(m: Function, x: torch.Tensor) -> torch.Tensor:
        seen = m.second(m.first(x))
        return m.head(seen.mul_(m.head.weight.sum()))

    model, call = Function(function), Call((torch.randn(5, 6),), {})
    halves = halves_of(model, call, "head")
    features = halves.prefix(*call.args)
    before = [f.clone() for f in features]
    halves.suffix(features)
    assert all(torch.equal(a, b) for a, b in zip(features, before, strict=True))
    proved(model, halves, call)


def test_written_to_before_the_cut_after_a_use_behind_it() -> None:
    """A value that what trains reads before a frozen layer changes it in place is not read too late."""

    def function(m: Function, x: torch.Tensor) -> torch.Tensor:
        seen = m.first(x)
        early = seen + m.head.bias.sum()
        return m.head(early) + m.second(seen.relu_()).sum(1, keepdim=True)

    check(function)


def test_two_aliases_of_what_crosses() -> None:
    """Two values of one memory, one of which is written to behind the cut, are not kept apart."""

    def function(m: Function, x: torch.Tensor) -> torch.Tensor:
        seen = m.second(m.first(x))
        other = seen.view(-1, 2, 4)
        seen.mul_(m.head.weight.mean())
        return m.head(seen) + other.sum((1, 2))[:, None]

    check(function)


def test_inputs_are_not_changed() -> None:
    """A model that changes its input in place does so on a copy."""
    model, x = Function(lambda m, x: m.head(m.second(m.first(x.mul_(2))))), torch.randn(5, 6)
    before = x.clone()
    halves = halves_of(model, Call((x,), {}), "head")
    proved(model, halves, Call((x,), {}))
    halves.prefix(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: m.head(m.second(m.first(x)).view(x.shape[0], -1)),
        lambda m, x: m.head(m.second(m.first(x)).view(x.size(0) * 2, -1).tanh().view(len(x.shape) - 1, -1, 8)[0]),
        lambda m, x: m.head(m.second(m.first(x)) + torch.zeros(x.shape[0], 8)),
        lambda m, x: m.head(m.second(m.first(x))[: x.shape[0] * 2 - 1]),
        lambda m, x: m.head(torch.cat([m.token.expand(x.shape[0], -1, -1), m.second(m.first(x))[:, None]], 1)).sum(1),
    ],
    ids=["view", "twice", "zeros", "slice", "token"],
)  # fmt: skip
def test_sizes_follow_the_batch(function: Any) -> None:
    """Sizes read from the input are those of each batch, also of the last one that is smaller."""
    check(function)


@pytest.mark.parametrize(
    "like",
    [
        lambda x: torch.zeros_like(x),
        lambda x: torch.ones_like(x),
        lambda x: torch.full_like(x, 0.5, dtype=torch.float64).float(),
        lambda x: x.new_zeros(x.shape[0], 8),
        lambda x: x.new_full((8,), 2.0),
        lambda x: x.new_tensor([1.0, 2.0]).repeat(4),
        lambda x: torch.zeros_like(x.view(-1, 4)).add_(3).view(x.size(0), -1),
        lambda x: torch.zeros_like(x.t()).t(),
        lambda x: torch.zeros_like(input=x),
    ],
    ids=["zeros", "ones", "type", "new", "constant", "tensor", "in place", "turned", "by name"],
)
def test_tensors_like_one_before_the_cut(like: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """A tensor behind the cut that is like one before it needs its sizes alone, which are made from the batch's size."""
    analysis = check(lambda m, x: m.head(m.second(seen := m.first(x)) * m.head.weight.sum() + like(seen)))
    assert analysis.cuts[0].after == "second"


def test_tensors_filled_with_what_depends_on_values() -> None:
    """A tensor like another that is filled with a number from the values of a third depends on these."""

    def function(m: Function, x: torch.Tensor) -> torch.Tensor:
        seen = m.first(x)
        largest = torch.full_like(seen, seen.detach().amax().item())
        return m.head(m.second(seen) + largest * m.head.weight.sum())

    assert [cut.after for cut in check(function).cuts] == ["first"]


def test_more_rows_than_samples() -> None:
    """A value that has several rows for each sample, sample by sample, crosses as rows of samples."""
    analysis = check(
        lambda m, x: m.head(m.second(m.first(x)).reshape(-1, 4).repeat(1, 2)).view(x.shape[0], -1).mean(1)
    )
    assert analysis.cuts[0].crossings[0].shape == (2, 4)


def test_batch_in_another_dimension() -> None:
    """Where the batch is not the first dimension there is no cut, but there may be one before."""

    def function(m: Function, x: torch.Tensor) -> torch.Tensor:
        turned = m.first(x).t().contiguous()
        return m.head(m.second(turned.t()))

    analysis = check(function)
    assert all(crossing.shape == (8,) for cut in analysis.cuts for crossing in cut.crossings)


def test_constants_are_kept_once() -> None:
    """What depends on no input is computed once and is not kept for each sample, also where it is made in place."""

    def function(m: Function, x: torch.Tensor) -> torch.Tensor:
        bias = m.token.detach()[0] @ m.second.weight
        return m.head(m.second(m.first(x)) * m.head.weight.mean() + bias)

    analysis = check(function)
    assert [c.shape for c in analysis.cuts[0].crossings] == [(8,)]
    halves = analysis.split(analysis.cuts[0])
    assert any(t.shape == (1, 1, 8) for t in halves.reads)  # a change of it makes the constant another one


def test_tensors_in_attributes_of_a_layer() -> None:
    """What a layer that is called as a whole keeps in a plain attribute is read by it: it counts among what decides the
    features, and where it trains, the layer comes behind the cut."""
    call = Call((torch.randn(5, 6),), {})
    for kept, after in [(torch.ones(8), "second"), (None, "first")]:
        model = Function(lambda m, x: m.head(m.second(m.first(x))))
        held = kept if kept is not None else model.head.bias[:1].detach().expand(8)
        model.second.held = [held]
        model.second.register_forward_pre_hook(lambda m, x: (x[0] + m.held[0],))
        halves = halves_of(model, call, "head")
        assert halves.cut.after == after
        assert any(t is held for t in halves.reads) == (after == "second")
        proved(model, halves, call)


def test_several_tensors_and_parts_of_a_tuple() -> None:
    """Several tensors may cross, and of a tuple those that are used."""

    def function(m: Function, x: torch.Tensor) -> torch.Tensor:
        left, right = m.second(m.first(x)).chunk(2, dim=1)
        best = m.first(x).max(dim=1)
        scaled = torch.cat([left * m.head.weight.mean(), right], 1)
        return m.head(scaled) + best.values[:, None] + best.indices[:, None]

    check(function)


def test_numbers_that_depend_on_values() -> None:
    """A number that is read from a tensor's values is no constant, and does not cross: it is read again behind the cut."""

    def function(m: Function, x: torch.Tensor) -> torch.Tensor:
        seen = m.second(m.first(x))
        return m.head(seen * m.head.weight.mean()) * seen.abs().amax().item()

    analysis = check(function)
    assert [[c.shape for c in cut.crossings] for cut in analysis.cuts] == [[(8,)]]


def test_state_that_a_forward_pass_changes() -> None:
    """A buffer that a forward pass changes comes behind the cut; a plain tensor that it changes is refused in words, and both are
    as before."""

    def function(m: Function, x: torch.Tensor) -> torch.Tensor:
        m.count.add_(1)
        return m.head(m.second(m.first(x) + m.count))

    model = Function(function)
    model.register_buffer("count", torch.zeros(8))
    assert {cut.after for cut in analysed(model, Call((torch.randn(5, 6),), {}), "head").cuts} == {"first"}
    assert torch.equal(model.count, torch.zeros(8))
    model = Function(function)
    model.count = torch.zeros(8)
    with pytest.raises(CannotSplit, match="changes a tensor of its own that is no buffer"):
        analysed(model, Call((torch.randn(5, 6),), {}), "head")
    assert torch.equal(model.count, torch.zeros(8))


def test_choice() -> None:
    """The fewest bytes within 5 % of the best share win, among those that fit."""
    cuts = [
        Cut(name, (Crossing(name, (size,), torch.float32),), share)
        for name, size, share in [("late", 100, 1.0), ("slim", 10, 0.96), ("early", 1, 0.9)]
    ]
    assert choose(cuts) is cuts[1]
    assert choose(cuts, most=39) is cuts[2]
    assert choose(cuts, most=20, dtype=torch.float16) is cuts[1]
    assert choose(cuts, most=3) is None
    assert choose([]) is None


def test_whole_numbers_are_not_narrowed() -> None:
    """Only floating point, and only wider types, are stored as the narrower type."""
    kinds = [torch.float32, torch.int64, torch.float16, torch.bool]
    cut = Cut("x", tuple(Crossing(str(k), (2,), k) for k in kinds), 1.0)
    assert cut.bytes_in(None) == 2 * (4 + 8 + 2 + 1)
    assert cut.bytes_in(torch.bfloat16) == 2 * (2 + 8 + 2 + 1)


def test_cuts_are_no_worse_than_each_other() -> None:
    """Of the cuts that are offered none has both more bytes and no larger share than another; the largest share is first."""
    model = nn.Sequential(
        nn.Linear(6, 64), nn.Linear(64, 4), nn.Linear(4, 32), nn.Linear(32, 16), nn.Linear(16, 2)
    )
    cuts = analysed(model, Call((torch.randn(5, 6),), {}), "4").cuts
    assert [cut.after for cut in cuts] == ["3", "1"]
    assert cuts[0].share > cuts[1].share
    assert cuts[0].bytes_in(None) > cuts[1].bytes_in(None)


def test_rounding_does_not_add_up() -> None:
    """A deep model whose every layer rounds a little otherwise in batches of another size is not taken to mix samples."""

    class Rounding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(*(Rounded(6, 6) for _ in range(40)))
            self.head = nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.body(x))

    class Rounded(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * (1 + 1e-4 * x.shape[0])

    assert analysed(Rounding(), Call((torch.randn(5, 6),), {}), "head").cuts[0].after == "body"


ROWS = torch.randn(8, 8)


@torch.fx.wrap
def rows_of(x: torch.Tensor) -> torch.Tensor:
    """The global ones, by a function that no graph looks into."""
    return ROWS[: len(x)]


@pytest.mark.parametrize(
    "rows",
    [lambda model, x: model.rows[: x.shape[0]], lambda _, x: ROWS[: x.shape[0]], lambda _, x: rows_of(x)],
)
def test_rounding_is_not_evened_in_tensors_of_a_person_s_own(rows: Any) -> None:
    """Rows of a parameter, or of a tensor somewhere else, for each sample by its place in the batch are nobody's to change."""

    class Placed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
            self.rows = nn.Parameter(1 + 1e-5 * torch.randn(8, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.first(x) * rows(self, x))

    model = Placed()
    ROWS.copy_(1 + 1e-5 * torch.randn(8, 8))
    before = model.rows.clone(), ROWS.clone()
    analysed(model, Call((torch.randn(5, 6),), {}), "head")
    assert torch.equal(model.rows, before[0])
    assert torch.equal(ROWS, before[1])
