"""Small random networks, cut wherever they can be: the halves are the whole, to the bit, whatever trains."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from halving import analysed, assert_as_before, assert_same, proved, state
from lehr.run.prefix.analysis import Analysis, Call, CannotSplit

WIDTH = 4


class Norm(nn.Module):
    """Batch-norm over all but the last dimension, as a function with parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("var", torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.batch_norm(x, self.mean, self.var, self.weight, None, self.training, 0.1)


MODULES: dict[str, Any] = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "convolution": lambda: nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 4, 2), nn.Flatten()),
    "norm": lambda: nn.BatchNorm1d(WIDTH),
    "norm without weights": lambda: nn.BatchNorm1d(WIDTH, affine=False),
    "norm by function": Norm,
    "layer norm": lambda: nn.LayerNorm(WIDTH),
    "dropout": lambda: nn.Dropout(0.5),
    "relu": nn.ReLU,
    "relu in place": lambda: nn.ReLU(inplace=True),
}
FUNCTIONS: dict[str, Any] = {
    "add an earlier one": lambda x, past: x + past,
    "add in place": lambda x, past: x.add_(past),
    "mix samples": lambda x, past: x - past.mean(0, keepdim=True),
    "view": lambda x, past: x.view(x.shape[0] * 2, -1).tanh().view(past.size(0), WIDTH),
    "halves": lambda x, past: torch.cat([past.chunk(2, dim=1)[0], x.chunk(2, dim=1)[1]], dim=1),
    "positions": lambda x, past: x + torch.arange(past.shape[1], device=x.device) * 0.1,
    "noise": lambda x, past: x + 0.1 * torch.randn_like(past),
    "product": lambda x, past: torch.einsum("bi,bj->bij", x, past).sum(2).sigmoid(),
}

ARITHMETIC = ("linear", "convolution")
HARMLESS = ("layer norm", "relu", "view", "halves", "positions", "product")


class Network(nn.Module):
    """`steps` are modules by number, and functions of the value and of an earlier one."""

    def __init__(self, steps: list[tuple[str, int]], form: str) -> None:
        super().__init__()
        self.steps, self.form = steps, form
        self.layers = nn.ModuleDict({str(n): MODULES[s]() for n, (s, _) in enumerate(steps) if s in MODULES})
        self.last = nn.Linear(WIDTH, 3)

    def forward(self, x: torch.Tensor, *, scale: torch.Tensor) -> Any:
        values = [x * scale[:, None]]
        for number, (step, back) in enumerate(self.steps):
            past = values[max(0, len(values) - 1 - back)]
            value = values[-1]
            values.append(
                self.layers[str(number)](value) if step in MODULES else FUNCTIONS[step](value, past)
            )
        out = self.last(values[-1])
        return {
            "tensor": out,
            "tuple": (out, values[-1], None),
            "dict": {"scores": out, "seen": [values[1]]},
        }[self.form]


networks = st.tuples(
    st.lists(st.tuples(st.sampled_from([*MODULES, *FUNCTIONS]), st.integers(0, 3)), min_size=1, max_size=8),
    st.sampled_from(["tensor", "tuple", "dict"]),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(network=networks, seed=st.integers(0, 99), training=st.booleans(), data=st.data())
def test_halves_are_the_whole(network: Any, seed: int, training: bool, data: st.DataObject) -> None:
    """At each cut that is offered, outputs, gradients, buffers and random numbers are the model's own, for any batch size; and
    the look at the model changes nothing of it."""
    torch.manual_seed(seed)
    model = Network(*network)
    paths = [*(f"layers.{n}" for n in model.layers if list(model.layers[n].parameters())), "last"]
    trained = data.draw(st.lists(st.sampled_from(paths), min_size=1, unique=True))
    count = data.draw(st.sampled_from([2, 5, 9]))
    call = Call((torch.randn(count, WIDTH),), {"scale": torch.rand(count) + 0.5})
    with torch.set_grad_enabled(training):
        analysis = found(model, call, trained, training)
        if analysis is None:
            assert not begins_frozen(network[0], trained)
            return
        before = state(model)
        found(model, call, trained, training)
        assert_as_before(before, state(model))
        for cut in analysis.cuts:
            halves = analysis.split(cut)
            assert 0 < cut.share <= 1
            proved(model, halves, call)
            assert_as_before(before, state(model))
            for size in (2, 5, 12):
                given_ = Call((torch.randn(size, WIDTH),), {"scale": torch.rand(size)})
                assert_same(model, halves, given_)


def begins_frozen(steps: list[tuple[str, int]], trained: list[str]) -> bool:
    """Whether a frozen layer with arithmetic comes before all that trains, is random, mixes samples or writes."""
    for number, (step, _) in enumerate(steps):
        if f"layers.{number}" in trained or step not in (*ARITHMETIC, *HARMLESS):
            return False
        if step in ARITHMETIC:
            return True
    return False


def found(model: nn.Module, call: Call, trained: list[str], training: bool) -> Analysis | None:
    """The analysis; None where nothing comes before what trains, mixes samples, or is random."""
    try:
        return analysed(model, call, *trained, training=training)
    except CannotSplit:
        return None
