"""A prefix's linear layers by oneDNN: the same up to rounding, on the model's own weights, and only where it is known to be faster."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from halving import assert_as_before, assert_same, halves_of, proved, state
from lehr.run.prefix import linear
from lehr.run.prefix.analysis import Call, CannotSplit, Halves


@pytest.fixture(autouse=True)
def _seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(linear, "_is_amd", lambda: True)
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        pytest.skip("this torch has not both libraries")


class Network(nn.Module):
    """Large layers with and without bias, a small one, and a head that trains."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.back = nn.Linear(64, 2048), nn.Linear(2048, 64, bias=False)
        self.small, self.head = nn.Linear(64, 64), nn.Linear(64, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.small(self.back(self.wide(x).relu())).mean(1))


class Exported(Network):
    """The same where a graph is made by torch.export alone: it asks for a value."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x if bool(torch.ones(1).sum() > 0) else -x)


CALL = Call((torch.randn(5, 7, 64),), {})


def _layers(halves: Halves) -> list[str]:
    """What computes the products of a prefix, in order."""
    found = []
    for node in halves._first.module.graph.nodes:
        if node.op == "call_module" and isinstance(
            held := getattr(halves._first.module, str(node.target)), (nn.Linear, linear._ByOneDnn)
        ):
            found.append(type(held).__name__)
        elif node.op == "call_function" and "linear" in str(node.target):
            found.append("Linear")
        elif node.op == "call_function" and node.target is linear.product:
            found.append("_ByOneDnn")
    return found


@pytest.mark.parametrize("kind", [Network, Exported])
@pytest.mark.parametrize("training", [True, False])
def test_large_layers(kind: Any, training: bool) -> None:
    """Large layers are computed by oneDNN, small ones are not; on the model's own weights, whose changes are seen at once."""
    model = kind()
    halves = halves_of(model, CALL, "head", training=training)
    fast, before = halves.fast(), state(model)
    assert _layers(fast) == ["_ByOneDnn", "_ByOneDnn", "Linear"]
    assert _layers(halves) == ["Linear"] * 3
    with torch.set_grad_enabled(training):
        proved(model, fast, CALL)
    assert_as_before(before, state(model))
    assert_same(model, fast, CALL, exact=False)
    with torch.no_grad():
        model.wide.weight.mul_(2)
        torch.testing.assert_close(fast.prefix(*CALL.args), halves.prefix(*CALL.args), rtol=1e-4, atol=1e-5)


def test_layers_that_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer with a hook or in another type stays; so do all under autocast and on other processors."""
    model = Network()
    for layer in (model.wide, model.back):
        layer.register_forward_pre_hook(lambda *_: None)
    assert halves_of(model, CALL, "head").fast().exact is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert halves_of(Network(), CALL, "head").fast().exact is None
    double = Call((CALL.args[0].double(),), {})
    assert halves_of(Network().double(), double, "head").fast().exact is None
    monkeypatch.setattr(linear, "_is_amd", lambda: False)
    assert halves_of(Network(), CALL, "head").fast().exact is None


BIASES = {
    "strided": lambda: torch.randn(4096)[::2],
    "one number, expanded": lambda: torch.randn(1).expand(2048),
    "another type": lambda: torch.randn(2048).double(),
}


@pytest.mark.parametrize("kind", BIASES)
def test_a_bias_that_the_operator_would_misread(kind: str) -> None:
    """It is given a pointer: a layer whose bias does not lie there number by number stays as it is."""
    layer = nn.Linear(64, 2048)
    layer.bias = nn.Parameter(BIASES[kind](), requires_grad=False)
    assert not linear._is_plain(layer)
    assert linear._is_plain(nn.Linear(64, 2048))


class Other(torch.Tensor):
    """A tensor of a class of its own."""


def test_weights_that_the_operator_would_misread() -> None:
    """Those of another class, whose numbers may lie elsewhere, and a vector."""
    assert not linear._are_fit(torch.randn(2048, 64).as_subclass(Other))
    assert not linear._are_fit(torch.randn(2048 * 64))
    assert linear._are_fit(torch.randn(2048, 64))


@pytest.mark.parametrize(("numbers", "by"), [(1, "Linear"), (2048, "_ByOneDnn")])
def test_products_that_are_called_as_functions(numbers: int, by: str) -> None:
    """They are computed by oneDNN, too; not with a bias of one number: torch adds it to all, the operator would not."""

    class Function(Network):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.randn(numbers))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(nn.functional.linear(x, self.wide.weight, self.bias).mean(1)[:, :64])

    model = Function()
    fast = halves_of(model, CALL, "head").fast()
    assert _layers(fast) == [by]
    proved(model, fast, CALL)


def test_what_else_keeps_a_layer_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward of the person's own on the layer itself, and oneDNN switched off."""
    layer = nn.Linear(64, 2048)
    layer.forward = lambda x: x  # type: ignore[method-assign]
    assert not linear._is_plain(layer)
    monkeypatch.setattr(torch._C, "_get_mkldnn_enabled", lambda: False)
    assert halves_of(Network(), CALL, "head").fast().exact is None


@pytest.mark.parametrize(
    "inputs",
    [torch.randn(5, 64, 7).transpose(1, 2), torch.randn(5, 7, 128)[..., ::2], torch.randn(5, 1, 64).expand(5, 7, 64)],
    ids=["transposed", "strided", "expanded"],
)  # fmt: skip
def test_inputs_in_any_order(inputs: torch.Tensor) -> None:
    """Inputs may lie in memory as they like."""
    layer = nn.Linear(64, 2048)
    ours = linear.product(inputs, layer.weight, layer.bias)
    torch.testing.assert_close(ours, layer(inputs), rtol=1e-4, atol=1e-5)


def test_a_wrong_product_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Should the library compute something else, the proof sees it."""
    own = linear.product
    monkeypatch.setattr(linear, "product", lambda *given: own(*given) * 1.01)
    model = Network()
    with pytest.raises(CannotSplit, match=r"the faster form .* gives other features"):
        proved(model, halves_of(model, CALL, "head").fast(), CALL)
