"""The faster prefix: the same up to rounding, with copies of the weights, and nothing of the model's own changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import fx, nn

from halving import assert_as_before, assert_same, halves_of, proved, state, with_suffix
from lehr.run.prefix import folding
from lehr.run.prefix.analysis import Call, CannotSplit, Halves
from lehr.run.prefix.gradients import shaken


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


class Network(nn.Module):
    """Convolutions with and without bias, and batch-norm behind them, with a shortcut."""

    def __init__(self, kind: Any = nn.BatchNorm2d, wide: int = 128) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, wide, 3, padding=1), kind(wide), nn.ReLU(inplace=True))
        self.block = nn.Sequential(
            nn.Conv2d(wide, wide, 3, padding=1, padding_mode="reflect", bias=False), kind(wide)
        )
        self.head = nn.Linear(wide, 3)
        for norm in (self.stem[1], self.block[1]):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            nn.init.normal_(norm.weight, 1, 0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = self.stem(x)
        return self.head((seen + self.block(seen)).mean((2, 3)))


CALL = Call((torch.randn(4, 3, 20, 20),), {})


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, timm.layers.BatchNormAct2d])
@pytest.mark.parametrize("training", [True, False])
def test_folded(kind: Any, training: bool) -> None:
    """Batch-norms are folded into the convolutions before them; features differ by rounding alone, the suffix is the same, and
    model and exact halves are as before."""
    model = Network(kind)
    halves = halves_of(model, CALL, "head", training=training)
    before, exact = state(model), halves.prefix(*CALL.args)
    fast = halves.fast()
    assert fast is not halves
    kinds = [type(m) for m in fast._first.module.modules()]
    assert nn.BatchNorm2d not in kinds
    assert timm.layers.BatchNormAct2d not in kinds
    rounded = fast.prefix(*CALL.args)
    assert not torch.equal(rounded[0], exact[0])
    torch.testing.assert_close(rounded, exact, rtol=1e-4, atol=1e-5)
    with torch.set_grad_enabled(training):
        proved(model, fast, CALL)
    assert_as_before(before, state(model))
    assert_same(model, fast, CALL, exact=False)
    assert torch.equal(halves.prefix(*CALL.args)[0], exact[0])
    assert fast.reads is halves.reads
    assert fast.cut is halves.cut


@pytest.mark.parametrize(("side", "is_folded"), [(20, True), (8, False)])
def test_folded_where_it_spares_more_than_it_copies(side: int, is_folded: bool) -> None:
    """A convolution with more weights than its output has numbers, for four images, keeps its own, and its norm."""
    model = Network()
    first = halves_of(model, Call((torch.randn(4, 3, side, side),), {}), "head").fast()._first.module
    left = [m for m in first.modules() if type(m) is nn.BatchNorm2d]
    assert left == ([] if is_folded else [model.block[1]])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_where_nothing_is_gained_it_is_no_faster_form(layout: torch.memory_format) -> None:
    """Where no norm is folded, and the weights lie channels last already, the prefix stays what it is."""
    model = Network().to(memory_format=layout)
    halves = halves_of(model, Call((torch.randn(4, 3, 2, 2),), {}), "head")
    assert (halves.fast().exact is None) == (layout is torch.channels_last)


def test_rows_of_a_sample_count() -> None:
    """Of a sample that is many images the outputs for all of them are compared with the weights."""

    class Frames(Network):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.flatten(0, 1)).unflatten(0, x.shape[:2]).mean(1)

    first = halves_of(Frames(), Call((torch.randn(4, 8, 3, 8, 8),), {}), "head").fast()._first.module
    assert nn.BatchNorm2d not in [type(m) for m in first.modules()]


def test_few_convolutions_are_not_folded() -> None:
    """Where nine tenths of the prefix's weights are no convolutions' there is little to gain from copies of these."""

    class Mostly(Network):
        def __init__(self, inner: int) -> None:
            super().__init__()
            self.mixer = nn.Sequential(nn.Linear(128, inner), nn.Linear(inner, 128))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen = self.stem(x)
            return self.head(self.mixer((seen + self.block(seen)).mean((2, 3))))

    for inner, is_folded in ((128, True), (8192, False)):
        halves = halves_of(Mostly(inner), CALL, "head")
        left = [type(m) for m in halves.fast()._first.module.modules()]
        assert (nn.BatchNorm2d not in left) == is_folded


def _pieces(monkeypatch: pytest.MonkeyPatch, samples: int) -> None:
    """Have the faster prefix of `Network`, for images of 20 by 20, take so many samples at a time."""
    monkeypatch.setattr(folding, "_PIECE", samples * 128 * 20 * 20 * 4)


@pytest.mark.parametrize("is_folded", [True, False])
@pytest.mark.parametrize(
    ("rows", "pieces"), [(1, [1]), (3, [3]), (4, [2, 2]), (8, [3, 3, 2]), (10, [3, 3, 2, 2])]
)
def test_a_few_samples_at_a_time(
    rows: int, pieces: list[int], is_folded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The faster prefix never has more than a piece of a batch in its hands, in pieces as even as can be, and gives the features
    of all, in order; also where nothing is folded.
    """
    _pieces(monkeypatch, 3)
    if not is_folded:
        monkeypatch.setattr(folding, "_LARGE", 10**9)
    model, images = Network(), torch.randn(rows, 3, 20, 20)
    halves = halves_of(model, CALL, "head")
    fast, seen = halves.fast(), list[int]()
    assert (fast.exact is not None) == is_folded
    model.stem[2].register_forward_hook(lambda _, given, __: seen.append(len(given[0])))
    (features,) = fast.prefix(images)
    assert seen == pieces
    seen.clear()
    (exact,) = halves.prefix(images)
    assert seen == [rows]
    torch.testing.assert_close(features, exact, rtol=1e-4, atol=1e-5)


@fx.wrap
def _mixed(x: torch.Tensor) -> torch.Tensor:
    """A sample and the fourth after it, where there are as many."""
    far = torch.zeros_like(x)
    far[:-4] = x[4:]
    return x + far


@pytest.mark.parametrize("is_folded", [True, False])
def test_a_mixing_of_samples_of_two_pieces_is_refused(
    is_folded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In pieces samples could not see each other, where in the whole model they do."""

    class Mixing(Network):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(_mixed(x))

    _pieces(monkeypatch, 4)
    if not is_folded:
        monkeypatch.setattr(folding, "_LARGE", 10**9)
    model, call = Mixing(), Call((torch.randn(8, 3, 20, 20),), {})
    fast = halves_of(model, CALL, "head").fast()
    assert fast.piece == 4
    with pytest.raises(CannotSplit, match="gives other features" if is_folded else "loss is another"):
        proved(model, fast, call)


def test_rounding_that_shows_behind_the_cut() -> None:
    """Where the suffix makes much of the faster form's rounding it is judged by the exact features."""
    model = Network()
    halves = halves_of(model, CALL, "head")
    (exact,), own = halves.prefix(*CALL.args), halves._second.module.forward

    def touchy(is_off: Callable[[torch.Tensor], bool]) -> Halves:
        return with_suffix(halves.fast(), lambda size, f: [own(size, f)[0] * (1.01 if is_off(f) else 1)])

    proved(model, touchy(lambda f: not torch.equal(f, exact)), CALL)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (exact,) = halves.prefix(*CALL.args)
        proved(model, touchy(lambda f: not torch.equal(f, exact)), CALL)
    with pytest.raises(CannotSplit, match="loss is another"):
        proved(model, touchy(lambda _: True), CALL)


def test_what_rounding_does_is_asked_of_the_exact_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each question takes a step of the suffix: where a gradient is another from the faster features, the exact ones come next."""
    model, asked = Network(), list[torch.Tensor]()
    halves = halves_of(model, CALL, "head")
    (exact,), own = halves.prefix(*CALL.args), halves._second.module.forward
    monkeypatch.setattr("lehr.run.prefix.proof.shaken", lambda f: [asked.append(f), shaken(f)][1])

    def steep(is_off: Callable[[torch.Tensor], bool]) -> Halves:
        def run(size: int, f: torch.Tensor) -> list[torch.Tensor]:
            (out,) = own(size, f)
            return [out + (out - out.detach()) * is_off(f)]

        return with_suffix(halves.fast(), run)

    proved(model, steep(lambda f: not torch.equal(f, exact)), CALL)
    assert not asked
    with pytest.raises(CannotSplit, match="gets another gradient"):
        proved(model, steep(lambda _: True), CALL)
    assert [torch.equal(f, exact) for f in asked] == [True]


def test_layout_of_what_crosses() -> None:
    """Pictures that cross lie in memory as the model's own would: contiguous, or channels last where its weights are so."""

    class Spatial(Network):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.stem(x) * self.head.weight.mean()).mean((1, 2, 3))

    for layout in (torch.contiguous_format, torch.channels_last):
        model = Spatial().to(memory_format=layout)
        (feature,) = halves_of(model, CALL, "head").fast().prefix(*CALL.args)
        assert feature.is_contiguous(memory_format=layout)


def test_a_norm_that_is_read_elsewhere() -> None:
    """A convolution whose output something else reads as well keeps its weights."""

    class Both(Network):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            before = self.stem[0](x)
            return self.head((self.stem[1](before) + before).mean((2, 3)))

    model = Both()
    fast = halves_of(model, CALL, "head").fast()
    assert nn.BatchNorm2d in [type(m) for m in fast._first.module.modules()]
    proved(model, fast, CALL)


def test_hooks_and_small_networks_are_left_alone() -> None:
    """Where there is nothing to gain, or a hook looks at a convolution, the prefix stays what it is."""
    small = halves_of(Network(wide=8), CALL, "head")
    assert small.fast()._first is small._first
    model, seen = Network(), []
    for layer in (model.stem[0], model.block[0]):
        layer.register_forward_pre_hook(lambda *_: seen.append(1))
    hooked = halves_of(model, CALL, "head")
    assert hooked.fast()._first is hooked._first


def test_a_wrong_fold_is_refused() -> None:
    """A faster form that gives other features is refused, in evaluation and in training."""
    model = Network()
    fast = halves_of(model, CALL, "head").fast()
    folded = next(m for m in fast._first.module.modules() if type(m) is nn.Conv2d)
    with torch.no_grad():
        folded.weight.mul_(1.01)
    with pytest.raises(CannotSplit, match=r"the faster form of the part up to .* gives other features"):
        proved(model, fast, CALL)
