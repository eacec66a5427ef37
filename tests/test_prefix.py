"""The traps that a model can hold for whoever cuts it: each is cut rightly, or refused in words."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from halving import analysed, assert_same, halves_of, proved
from lehr.run.freezing import set_trainable
from lehr.run.prefix.analysis import Call, CannotSplit, analyse


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


class Two(nn.Module):
    """A frozen body, something in between, and a head that trains."""

    def __init__(self, between: Any = lambda x: x, body: nn.Module | None = None) -> None:
        super().__init__()
        self.body = body or nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8))
        self.head = nn.Linear(8, 3)
        self.between = between

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(self.between(self.body(x)))


class MixesOneOfEight(nn.Module):
    """Adds the batch's mean to one channel that is small beside the others."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = torch.eye(8)[0]
        return torch.addcmul(x * (2e3 - 2e3 * first + first), x.mean(0), first)


def batch(size: int = 5) -> Call:
    return Call((torch.randn(size, 6),), {})


def check(model: nn.Module, call: Call, *trained: str, training: bool = True) -> Any:
    """Cut, proved, and compared on other batches; the halves."""
    halves = halves_of(model, call, *trained, training=training)
    proved(model, halves, call)
    for size in (2, len(call.args[0])):
        assert_same(model, halves, Call(tuple(a[:size] for a in call.args), call.kwargs))
    return halves


def test_the_cut_is_named_as_a_person_would() -> None:
    """A cut says behind which module it lies, what crosses it, and which share of the arithmetic lies before."""
    halves = check(Two(), batch(), "head")
    assert halves.cut.after == "body"
    assert [(c.shape, c.dtype) for c in halves.cut.crossings] == [((8,), torch.float32)]
    assert halves.cut.share == pytest.approx((6 * 8 + 8 * 8) / (6 * 8 + 8 * 8 + 8 * 3))
    assert halves.cut.bytes_in(torch.float16) == 16


@pytest.mark.parametrize("where", ["frozen", "thawed"])
def test_branch_on_values(where: str) -> None:
    """A branch on the values of a tensor is refused, with the reason, wherever it is."""

    class Branches(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 if x.sum() > 0 else x

    model = (
        Two(body=nn.Sequential(nn.Linear(6, 8), Branches())) if where == "frozen" else Two(between=Branches())
    )
    words = f"cannot be traced in {'body.1' if where == 'frozen' else 'between'} .*branch on the values of a tensor"
    with pytest.raises(CannotSplit, match=words):
        analysed(model, batch(), "head")


def test_tied_weights_are_named() -> None:
    """Where a head that trains shares its weight with the first layer, nothing can be kept, and the message names both."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.middle = nn.Embedding(9, 8), nn.Linear(8, 8)
            self.head = nn.Linear(8, 9, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.middle(self.embed(x)).mean(1))

    with pytest.raises(
        CannotSplit, match=r"embed\.weight trains and is used first; it is shared with head\.weight"
    ):
        analysed(Tied(), Call((torch.randint(9, (4, 5)),), {}), "embed")


@pytest.mark.parametrize(
    "between",
    [
        nn.BatchNorm1d(8, affine=False),
        nn.BatchNorm1d(8, affine=False, track_running_stats=False),
        nn.Dropout(),
        lambda x: F.dropout(x, 0.5, training=True),
        lambda x: x + torch.randn_like(x),
        lambda x: x - x.mean(0),
        lambda x: x.flip(0),
        lambda x: x.sort(0).values,
        MixesOneOfEight(),
    ],
    ids=["statistics", "no statistics", "dropout", "functional", "noise", "mean", "flip", "sort", "small"],
)
def test_what_changes_is_behind_the_cut(between: Any) -> None:
    """Batch statistics, random numbers and whatever mixes the samples of a batch come after the cut, also without parameters."""
    halves = check(Two(between), batch(), "head")
    assert halves.cut.after == "body"


def test_mixing_is_found_with_a_single_sample() -> None:
    """Also where the batch that is looked at has one sample, what mixes samples comes behind the cut; and the proof sees it."""
    model = Two(lambda x: x - x.mean(0))
    halves = check(model, batch(1), "head")
    assert halves.cut.after == "body"
    mixing = SimpleNamespace(forward=lambda x: ([model.body(x) - model.body(x).mean(0)], ()))
    with pytest.raises(CannotSplit, match="when its batch is larger"):
        proved(model, replace(halves, _first=replace(halves._first, module=mixing)), batch(1))


def test_random_numbers_in_python() -> None:
    """A forward pass that rolls dice in Python to decide what to do is refused."""
    import random

    with pytest.raises(CannotSplit, match="draws random numbers of its own"):
        analysed(Two(lambda x: x * 2 if random.random() < 0.1 else x), batch(), "head")


def noisy(size: float) -> nn.Linear:
    """A layer that gets noise of this size, from a generator of its own, which no graph shows."""
    layer, own = nn.Linear(8, 8), torch.Generator().manual_seed(0)
    layer.register_forward_pre_hook(lambda _, x: (x[0] + size * torch.rand(x[0].shape, generator=own),))
    return layer


def test_private_generator() -> None:
    """A generator of the model's own is found by the values that it makes: the cut lies before it."""
    model, call = Two(body=nn.Sequential(nn.Linear(6, 8), nn.ReLU(), noisy(1.0))), batch()
    assert [cut.after for cut in analysed(model, call, "head").cuts] == ["body.1"]


@pytest.mark.parametrize("size", [1e-4, 1e-6])
@pytest.mark.parametrize("where", ["run", "traced"])
def test_private_generator_of_small_numbers(size: float, where: str) -> None:
    """Where its numbers are as small as rounding, the proof finds them: the same samples give something else, also where
    the graph has only those that were drawn while it was traced."""
    own = torch.Generator().manual_seed(0)
    frozen = nn.Sequential(nn.Linear(6, 8), noisy(size) if where == "run" else nn.ReLU())
    drawn = (lambda x: x) if where == "run" else lambda x: x + size * torch.rand(8, generator=own)
    model, call = Two(drawn, frozen), batch()
    halves = halves_of(model, call, "head")
    with pytest.raises(CannotSplit, match="a generator of its own"):
        proved(model, halves, call)


def test_dropout_that_only_frozen_layers_follow() -> None:
    """Dropouts under a half-frozen parent run in eval mode where something frozen follows; the one before the head stays on."""

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.drop = nn.Linear(6, 8), nn.Dropout(0.5)
            self.between, self.second = nn.Linear(8, 8), nn.Dropout(0.5)
            self.block, self.late, self.head = nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.late(self.block(self.second(self.between(self.drop(self.embed(x)))))))

    model = Half()
    analysis = analysed(model, batch(), "head")
    assert (analysis.route, analysis.stilled) == ("fx", ("drop", "second"))
    assert analysis.cuts[0].after == "block"
    assert model.drop.training
    check(model, batch(), "head")
    assert model.drop.training


def test_a_dropout_behind_what_cannot_be_cut_goes_on() -> None:
    """One that frozen layers follow, but that stands behind noise of the model's own, is left on: nothing is kept of it."""

    class Noise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.drop = nn.Linear(6, 8), nn.Dropout(0.5)
            self.block, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.block(self.drop(F.dropout(self.embed(x), 0.1, True))))

    analysis = analysed(Noise(), batch(), "head")
    assert (analysis.route, analysis.stilled, analysis.cuts[0].after) == ("fx", (), "embed")


def test_weight_standardisation() -> None:
    """Batch-norm of a weight is the same in each epoch, and no reason to cut before it."""

    class Standardised(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            weight = F.batch_norm(self.weight[None], None, None, training=True).reshape_as(self.weight)
            return F.linear(x, weight, self.bias)

    halves = check(Two(body=nn.Sequential(nn.Linear(6, 8), nn.ReLU(), Standardised(8, 8))), batch(), "head")
    assert halves.cut.after == "body"


def test_two_inputs_and_every_kind_of_output() -> None:
    """Several inputs, keywords, and dicts, tuples and named tuples of outputs, frozen tensors and None among them, come back in
    the same form."""

    class Pair(NamedTuple):
        scores: torch.Tensor
        frozen: torch.Tensor

    class Rich(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.head = nn.Linear(6, 8), nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor, *, y: torch.Tensor, twice: bool = False, mask: Any = None) -> Any:
            seen = self.one(x) + self.two(y)
            out = self.head(seen) * (2 if twice else 1)
            return {"pair": Pair(out, seen), "list": [seen, (out, None)], "mask": mask, "x": x}

    model = Rich()
    call = Call((torch.randn(5, 6),), {"y": torch.randn(5, 4), "twice": True})
    halves = halves_of(model, call, "head")
    proved(model, halves, call)
    assert_same(model, halves, call)
    returned = halves.suffix(halves.prefix(*call.args, **call.kwargs))
    assert isinstance(returned["pair"], Pair)
    assert {c.shape for c in halves.cut.crossings} == {
        (8,),
        (6,),
    }  # the input is returned, so it crosses as well
    with pytest.raises(CannotSplit, match="called in another way"):
        halves.prefix(torch.randn(5, 6), y=torch.randn(5, 4), twice=False)


def test_inputs_that_are_no_batch() -> None:
    """A list of pictures, something that is no tensor, and tensors of different lengths are refused in words."""
    model = Two(body=nn.Sequential(nn.Linear(6, 8)))
    for call, words in [
        (Call(([torch.randn(3, 6), torch.randn(3, 6)],), {}), "a list of pictures"),
        (Call((torch.randn(3, 6), torch.randn(4, 6)), {}), "do not have a row for each sample"),
        (Call((object(),), {}), "called with a object"),
        (Call((), {}), "without a tensor"),
        (Call((torch.zeros(0, 6),), {}), "without a tensor"),
    ]:
        with pytest.raises(CannotSplit, match=words):
            analysed(model, call, "head")


def test_nothing_before_what_trains() -> None:
    """Where the first layer trains, the message names its parameter."""
    with pytest.raises(
        CannotSplit, match=r"nothing to cache: body\.0\.(weight|bias) trains and is used first"
    ):
        analysed(Two(), batch(), "body", "head")


def test_tensors_kept_in_attributes() -> None:
    """A model that leaves tensors of its forward pass in an attribute is refused, and has none left there."""

    class Keeps(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen = x
            return x

    model = Two(Keeps())
    with pytest.raises(CannotSplit, match=r"keeps tensors of a forward pass in its attribute between\.seen"):
        analysed(model, batch(), "head")
    assert not hasattr(model.between, "seen")


def test_statistics_that_training_moves_are_no_constant_in_evaluation() -> None:
    """In evaluation, a batch-norm that is not held in eval mode while training counts as what trains."""
    model = Two(nn.Sequential(nn.BatchNorm1d(8, affine=False), nn.Linear(8, 8)))
    model.between[1].requires_grad_(False)
    names = frozenset({"between.1.weight", "head.weight", "head.bias"})
    set_trainable(model, names)
    model.eval()
    analysis = analyse(model, batch(), trained=names)
    assert {cut.after for cut in analysis.cuts} == {"body"}


def test_hooks_on_what_is_frozen() -> None:
    """A forward hook on a frozen layer, which would be called no more, is refused by name; one on the head is not."""
    model = Two()
    model.head.register_forward_hook(lambda *_: None)
    check(model, batch(), "head")
    model.body[0].register_forward_hook(lambda *_: None)
    with pytest.raises(CannotSplit, match=r"a forward hook on body\.0"):
        analysed(model, batch(), "head")
