"""Tracing and walking: what a model computes is written down and watched, and the model and the process stay as they were."""

from __future__ import annotations

import io
import logging
import warnings
from contextlib import redirect_stderr, redirect_stdout
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from halving import analysed, assert_as_before, assert_same, halves_of, proved, state
from lehr.run.prefix.cuts import Call, CannotSplit
from lehr.run.prefix.forms import checked_form
from lehr.run.prefix.tracing import trace
from lehr.run.prefix.walking import Memory, walk


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


class Unpacks(nn.Module):
    """Walks over a tensor's sizes in a way that torch.fx does not follow, and torch.export does."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Dropout(0.5))
        self.block, self.head = (
            nn.Linear(8, 8),
            nn.Sequential(nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 3)),
        )

    def forward(self, x: torch.Tensor) -> Any:
        rows, *rest = [int(n) if i else n for i, n in enumerate(x.shape)]
        if rest[0] != 6:
            raise ValueError("six are wanted")
        return {"scores": self.head(self.block(self.body(x)).view(rows, -1))}


@pytest.mark.parametrize("training", [True, False])
def test_export_where_fx_fails(training: bool) -> None:
    """What torch.fx cannot trace, torch.export may; batch-norm, dropout and in-place operations are right there, too."""
    model, call = Unpacks(), Call((torch.randn(5, 6),), {})
    before = state(model.train(training))
    analysis = analysed(model, call, "head", training=training)
    assert analysis.route == "export"
    assert analysis.cuts[0].after == "block"
    halves = analysis.split(analysis.cuts[0])
    with torch.set_grad_enabled(training):
        proved(model, halves, call)
    assert torch.equal(before[-1], torch.get_rng_state())
    for size in (2, 3, 5):
        assert_same(model, halves, Call((torch.randn(size, 6),), {}))


class Precise(nn.Module):
    """Computes one of its layers, and the sum behind it, without autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.mid, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = self.body(x)
        with torch.autocast("cpu", enabled=False):
            seen = self.mid(seen.float()) * 1.001 + seen.float().sum(1, keepdim=True)
        return self.head(seen)


@pytest.mark.parametrize("trained", [("head",), ("mid", "head")])
@pytest.mark.parametrize("training", [True, False])
def test_autocast_switched_off_in_the_model(trained: tuple[str, ...], training: bool) -> None:
    """Where the model switches autocast off for a part, before the cut or behind it, the halves do so, too, to the bit."""
    model, call = Precise(), Call((torch.randn(5, 6),), {})
    assert (
        analysed(model, call, *trained, training=training).route == "fx"
    )  # without autocast there is nothing to mind
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.set_grad_enabled(training):
        analysis = analysed(model, call, *trained, training=training)
        for cut in analysis.cuts:
            halves = analysis.split(cut)
            proved(model, halves, call)
            for size in (2, 5, 7):
                assert_same(model, halves, Call((torch.randn(size, 6),), {}))


def test_fx_does_not_follow_autocast() -> None:
    """torch.fx, which would lose it, refuses a model that switches autocast in words."""
    form, tensors = checked_form(Call((torch.randn(5, 6),), {}))
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(CannotSplit, match="switches autocast"):
        trace(Precise(), form, tensors, "fx")


def test_gradients_reach_the_model_itself() -> None:
    """Suffix and model share parameters and buffers: gradients and statistics land in the model, whose keys stay."""
    model, call = Unpacks(), Call((torch.randn(5, 6),), {})
    keys = list(model.state_dict())
    halves = halves_of(model, call, "head")
    halves.suffix(halves.prefix(*call.args))["scores"].sum().backward()
    assert model.head[2].weight.grad is not None
    assert model.block.weight.grad is None
    assert model.head[0].num_batches_tracked == 1
    assert model.body[1].num_batches_tracked == 0
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize(
    "kind", [Unpacks, lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))]
)
def test_nothing_is_left_behind(kind: Any) -> None:
    """A look at a model changes neither it nor random states, prints nothing, warns of nothing and logs nothing."""
    model, call = kind(), Call((torch.randn(5, 6),), {})
    trained = "head" if isinstance(model, Unpacks) else "2"
    analysed(model, call, trained)
    sum(p.square().sum() for p in model.parameters() if p.requires_grad).backward()
    before, off, out = state(model), logging.root.manager.disable, io.StringIO()
    with warnings.catch_warnings(), redirect_stdout(out), redirect_stderr(out):
        warnings.simplefilter("error")
        analysis = analysed(model, call, trained)
        analysis.split(analysis.cuts[0])
    assert_as_before(before, state(model))
    assert out.getvalue() == ""
    assert logging.root.manager.disable == off


def test_failures_leave_nothing_behind() -> None:
    """Where tracing fails half-way, the model is as before all the same."""

    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head, self.calls, self.log = nn.Linear(6, 8), nn.Linear(8, 3), 0, []

        def forward(self, _: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            self.log.append(self.calls)
            self.last = "seen"
            raise RuntimeError("no")

    model = Fails()
    with pytest.raises(CannotSplit, match="RuntimeError: no"):
        analysed(model, Call((torch.randn(5, 6),), {}), "head")
    assert model.calls == 0
    assert model.log == []
    assert not hasattr(model, "last")


def test_cache_of_weights_in_an_attribute() -> None:
    """A module that puts away in a dict what it computes from its weights is cut, and its dict is as before."""

    class Caches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
            self.bias, self.cache = nn.Parameter(torch.randn(4)), {}

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if "bias" not in self.cache:
                self.cache["bias"] = self.bias.repeat(2)
            return self.head(self.first(x) + self.cache["bias"])

    model = Caches()
    model(torch.randn(2, 6))
    kept = model.cache["bias"]
    halves = halves_of(model, Call((torch.randn(5, 6),), {}), "bias", "head")
    assert model.cache == {"bias": kept}
    assert halves.cut.after == "first"


def test_configuration_is_put_back() -> None:
    """`use_cache` of a configuration is off while a model is traced, and on again afterwards."""
    seen = []

    class Configured(Unpacks):
        config = SimpleNamespace(use_cache=True)

        def forward(self, x: torch.Tensor) -> Any:
            seen.append(self.config.use_cache)
            return super().forward(x)

    model = Configured()
    analysed(model, Call((torch.randn(5, 6),), {}), "head")
    assert seen[-1] is False
    assert model.config.use_cache is True


def test_compiled_models() -> None:
    """A model inside `torch.compile`, or with `compile()` called on it, is cut as it is written."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    model.compile(backend="eager")
    compiled = model.__dict__["_compiled_call_impl"]
    halves = halves_of(torch.compile(model, backend="eager"), Call((torch.randn(5, 6),), {}), "2")
    assert halves.cut.after == "1"
    assert model.__dict__["_compiled_call_impl"] is compiled


def test_what_a_walk_sees() -> None:
    """Of each node: aliases, writes, draws, rows that mix, sizes that follow the batch, and arithmetic."""

    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.drop = nn.Linear(6, 8), nn.Dropout()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen = self.linear(x)
            turned = seen.view(x.size(0) * 2, 4)
            turned.mul_(2)
            return self.drop(seen) + seen.mean(0)

    model = Steps()
    form, tensors = checked_form(Call((torch.randn(5, 6),), {}))
    traced = trace(model, form, tensors, "fx")
    seen = {str(node.target): (node, s) for node, s in walk(traced, model, tensors, Memory.of(model)).items()}
    linear, size, view = seen["model.linear"][1], seen["size"][1], seen["view"][1]
    assert linear.flops == 2 * 2 * 6 * 8
    assert size.value.at(7) == 7
    assert view.groups == linear.groups
    assert (view.value.fold, view.value.shape) == (2, (4,))
    assert seen["mul_"][1].writes == linear.groups
    assert seen["model.drop"][1].draws
    assert not linear.mixes
    assert [s.mixes for _, s in seen.values() if "add" in str(_.target)] == [True]


def test_parameters_changed_in_place() -> None:
    """A forward pass that changes a parameter in place is found before it has changed it."""

    class Changes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head, self.scale = nn.Linear(6, 8), nn.Linear(8, 3), nn.Parameter(torch.ones(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                torch.Tensor.mul_(self.scale, 2)
            return self.head(self.first(x) * self.scale)

    model = Changes()
    with pytest.raises(CannotSplit, match="changes the parameter"):
        analysed(model, Call((torch.randn(5, 6),), {}), "head")
    assert torch.equal(model.scale, torch.ones(8))
