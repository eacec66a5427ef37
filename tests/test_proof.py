"""The self-check: halves that are not the model are refused, in words, and everything is as before."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from halving import assert_as_before, halves_of, number, proved, state, with_prefix, with_suffix
from lehr.run.prefix.analysis import Call, CannotSplit, Halves
from lehr.run.prefix.proof import prove


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


class Network(nn.Module):
    """A frozen body; a norm, a dropout and a linear layer that train."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.Tanh())
        self.head = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


def made(*, training: bool = True) -> tuple[Network, Halves, Call]:
    model, call = Network(), Call((torch.randn(5, 6),), {})
    return model, halves_of(model, call, "head", training=training), call


@pytest.mark.parametrize("training", [True, False])
def test_right_halves_pass(training: bool) -> None:
    """The model's own halves pass, in training and in evaluation, and a pass changes nothing: weights, gradients, buffers,
    modes, and the random states of torch, Python and numpy."""
    model, halves, call = made(training=training)
    for parameter in model.head.parameters():
        parameter.grad = torch.randn_like(parameter)
    before, rolled = state(model), (random.getstate(), np.random.get_state()[1].tolist())
    with torch.set_grad_enabled(training):
        proved(model, halves, call, store=torch.float16)
    assert_as_before(before, state(model))
    assert (random.getstate(), np.random.get_state()[1].tolist()) == rolled


def test_what_a_look_costs() -> None:
    """Beside the batch's features, which are of use, the frozen part is run on the batch once, as the model does, and on eight
    samples.
    """
    model, halves, call = made()
    rows: list[int] = []
    model.body[0].register_forward_pre_hook(lambda _, x: rows.append(len(x[0])))
    proved(model, halves, call)
    assert rows == [2, 2, 5, 3, 1, 5]


@pytest.mark.parametrize("count", [5, 8, 32])
def test_a_mixing_that_leaves_the_ends_alone_is_refused(count: int) -> None:
    """Samples that see their neighbours, where there are two on either side, are seen by the one in the middle."""

    def mixing(x: torch.Tensor) -> Any:
        seen = model.body(x)
        mixed = seen.clone()
        mixed[2:-2] = seen[2:-2] + 0.3 * (seen[1:-3] + seen[3:-1]) if len(x) > 4 else seen[2:-2]
        return [mixed], ()

    model, halves, _ = made()
    with pytest.raises(CannotSplit, match="depend on the samples beside it"):
        proved(model, with_prefix(halves, mixing), Call((torch.randn(count, 6),), {}))


def test_gradients_of_few_rows() -> None:
    """An embedding whose gradients are sparse trains behind the cut."""

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.table = nn.Linear(6, 8), nn.Embedding(10, 8, sparse=True)

        def forward(self, x: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
            return self.body(x) * self.table(n)

    model, call = Tokens(), Call((torch.randn(5, 6), torch.arange(5)), {})
    proved(model, halves_of(model, call, "table"), call)


@pytest.mark.parametrize("autocast", [True, False])
def test_a_model_that_changes_its_inputs(autocast: bool) -> None:
    """A forward pass that normalises its inputs in place gives the same once more: each look has inputs of its own."""

    class InPlace(Network):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.sub_(0.5).div_(0.25))

    model, call = InPlace(), Call((torch.randn(5, 6),), {})
    given = call.args[0].clone()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        proved(model, halves_of(model, call, "head"), call)
    assert torch.equal(call.args[0], given)


Module = Callable[..., Any]


def _another_loss(_: Network, suffix: Module) -> Module:
    return lambda size, f: [suffix(size, f + 0.5 * f.flip(1))[0]]


def _another_gradient(model: Network, suffix: Module) -> Module:
    return lambda size, f: [suffix(size, f)[0].detach() + 0 * model.head[3].weight.sum()]


def _another_buffer(model: Network, _: Module) -> Module:
    return lambda _, f: [model.head[3](model.head[2](_norm(model, model.head[0](f))))]


def _more_random_numbers(_: Network, suffix: Module) -> Module:
    return lambda size, f: [(suffix(size, f)[0], torch.rand(1))[0]]


def _fails(_: Network, __: Module) -> Module:
    return lambda _, f: f[0, 0, 0]


WRONG_SUFFIXES = {
    "the loss is another": _another_loss,
    "gets another gradient": _another_gradient,
    "the buffer head.1": _another_buffer,
    "other random numbers": _more_random_numbers,
    "does not run": _fails,
}


def _norm(model: Network, x: torch.Tensor) -> torch.Tensor:
    return nn.functional.batch_norm(x, None, None, model.head[1].weight, model.head[1].bias, training=True)


@pytest.mark.parametrize("words", WRONG_SUFFIXES)
def test_wrong_suffixes_are_refused(words: str) -> None:
    """A suffix with another loss, other gradients, buffers or random numbers, and one that does not run, are each refused in
    their own words, and everything is as before."""
    model, halves, call = made()
    wrong = with_suffix(halves, WRONG_SUFFIXES[words](model, halves._second.module.forward))
    before = state(model)
    with pytest.raises(CannotSplit, match=words):
        proved(model, wrong, call)
    assert_as_before(before, state(model))


def _moves(model: Network) -> Callable[..., Any]:
    def function(x: torch.Tensor) -> Any:
        model.head[1].running_mean.add_(1)
        return [model.body(x)], ()

    return function


WRONG_PREFIXES = {
    "when its batch is of another size or order": lambda m: (
        lambda x: ([m.body(x) + torch.arange(len(x))[:, None]], ())
    ),
    "when its batch is of another size": lambda m: lambda x: ([m.body(x) * len(x)], ()),
    "when it is alone": lambda m: lambda x: ([m.body(x) * (1 + (len(x) == 1))], ()),
    "draws random numbers": lambda m: lambda x: ([m.body(x) + 0 * torch.rand(1)], ()),
    "changes the model's own state": _moves,
    "not a row for each sample": lambda m: lambda x: ([m.body(x)[:-1]], ()),
}


@pytest.mark.parametrize("words", WRONG_PREFIXES)
def test_wrong_prefixes_are_refused(words: str) -> None:
    """A prefix that depends on the order of the batch or on its size, draws random numbers, changes buffers, or loses samples
    is refused in its own words, and everything is as before."""
    model, halves, call = made()
    before = state(model)
    with pytest.raises(CannotSplit, match=words):
        proved(model, with_prefix(halves, WRONG_PREFIXES[words](model)), call)
    assert_as_before(before, state(model))


def _small(model: Network, x: torch.Tensor, wrong: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Features of which the last is thousands of times smaller than the others, and wrong."""
    seen = model.body(x)
    return torch.cat([1e4 * seen[:, :-1], wrong(seen[:, -1:])], 1)


def test_a_small_feature_is_seen_beside_large_ones() -> None:
    """Samples that mix in one small feature alone are refused, and a small output that is wrong beside large ones."""
    model, halves, call = made(training=False)
    mixing = with_prefix(halves, lambda x: ([_small(model, x, lambda last: last - last.mean(0))], ()))
    own = halves._second.module.forward
    scale = torch.tensor([1e4, 1e4, 1.0])
    model.head.append(Scaled(scale))
    wrong = with_suffix(halves, lambda n, f: [own(n, f)[0] * scale * torch.tensor([1.0, 1.0, 1.2])])
    with torch.no_grad():
        with pytest.raises(CannotSplit, match="when its batch is"):
            proved(model, mixing, call)
        proved(model, with_suffix(halves, lambda n, f: [own(n, f)[0] * scale]), call)
        with pytest.raises(CannotSplit, match="returns something else"):
            proved(model, wrong, call)


class Scaled(nn.Module):
    """Each number times one of its own."""

    def __init__(self, scale: torch.Tensor) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


def test_wrong_outputs_are_refused() -> None:
    """In evaluation, other outputs are refused, and the same ones in another form."""
    model, halves, call = made(training=False)
    own = halves._second.module.forward
    with torch.no_grad():
        for wrong in (lambda n, f: [own(n, f)[0] + 0.1], lambda n, f: [own(n, f)[0].double()]):
            with pytest.raises(CannotSplit, match="returns something else than the whole model"):
                proved(model, with_suffix(halves, wrong), call)


def test_features_too_large_for_the_type() -> None:
    """Features that overflow in the type in which they would be stored are refused, and the message says which type holds them;
    a wider type is no matter."""
    model, halves, call = made(training=False)
    large = with_prefix(halves, lambda x: ([1e6 * model.body(x)], ()))
    with torch.no_grad():
        with pytest.raises(CannotSplit, match='too large for float16; cache_dtype = "fp32" holds them'):
            proved(model, large, call, store=torch.float16)
        with pytest.raises(CannotSplit, match="returns something else"):
            proved(model, large, call, store=torch.bfloat16)


def test_rounding_is_no_other_gradient() -> None:
    """A prefix that differs in the last bits passes; one that differs in the third digit does not."""
    model, halves, call = made()

    def off(by: float) -> Halves:
        return with_prefix(
            halves, lambda x: ([model.body(x) * (1 + by * torch.sin(17 * x.sum(1, keepdim=True)))], ())
        )

    proved(model, off(1e-7), call)
    with pytest.raises(CannotSplit, match="another"):
        proved(model, off(2e-2), call)


class ScaledDown(Network):
    """Has a part whose gradients are a million times smaller than others."""

    def __init__(self) -> None:
        super().__init__()
        self.branch, self.scale = nn.Linear(8, 3), 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = self.body(x)
        return self.head(seen) + self.scale * self.branch(seen)


@pytest.mark.parametrize("wrong", [lambda x: x.detach() + 0 * x, lambda x: x * x.new_tensor([1.0, 1.0, 0.9])])
def test_small_gradients_are_compared(wrong: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """A gradient that is far smaller than others and wrong, or missing, is refused by its parameter's name."""
    model, call = ScaledDown(), Call((torch.randn(5, 6),), {})
    halves = halves_of(model, call, "head", "branch")
    right = with_suffix(halves, lambda _, f: [model.head(f) + 1e-6 * model.branch(f)])
    proved(model, right, call)
    off = with_suffix(halves, lambda _, f: [model.head(f) + 1e-6 * wrong(model.branch(f))])
    with pytest.raises(CannotSplit, match=r"branch\.(weight|bias) gets another gradient"):
        proved(model, off, call)


def test_a_loss_that_fails() -> None:
    """An error in the loss function is no crash, and everything is as before."""
    model, halves, call = made()
    before = state(model)

    def loss(f: Any) -> torch.Tensor:
        number(f(*call.args))
        raise KeyError("no")

    with pytest.raises(CannotSplit, match="KeyError"):
        prove(model, halves, call, loss=loss, store=None)
    assert_as_before(before, state(model))


def test_autocast() -> None:
    """Under autocast halves are cut and proved in its arithmetic, and trained weights get their gradients afterwards."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model, halves, call = made()
        proved(model, halves, call)
        features = halves.prefix(*call.args)
        assert features[0].dtype is torch.bfloat16
        halves.suffix(features).float().sum().backward()
    assert all(p.grad is not None for p in model.head.parameters())


def test_mixing_is_looked_for_in_full_precision() -> None:
    """Under autocast, whose rounding would hide it, a prefix that mixes samples by a percent is refused, and one that depends on
    the size of the batch; one that rounds otherwise in batches of another size there is not.
    """

    def mixing(model: Network, x: torch.Tensor) -> torch.Tensor:
        return model.body(x) + 0.01 * model.body(x).mean(0)

    def rounding(model: Network, x: torch.Tensor) -> torch.Tensor:
        seen = model.body(x)
        return seen * (1 + 0.05 / len(x)) if seen.dtype is torch.bfloat16 else seen

    with torch.autocast("cpu", dtype=torch.bfloat16):
        model, halves, call = made()
        right = with_suffix(halves, lambda _, f: [model.head(f / (1 + 0.05 / len(f)))])
        proved(model, with_prefix(right, lambda x: ([rounding(model, x)], ())), call)
        for wrong in (lambda x: mixing(model, x), lambda x: model.body(x) * (1 + 0.01 * (len(x) > 4))):
            with pytest.raises(CannotSplit, match="depend on the samples beside it"):
                proved(model, with_prefix(halves, lambda x, wrong=wrong: ([wrong(x)], ())), call)


def test_a_backbone_that_needs_autocast() -> None:
    """One whose weights are bf16 runs on fp32 inputs under autocast alone, and is checked there."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model = Network()
        model.body.bfloat16()
        call = Call((torch.randn(5, 6),), {})
        halves = halves_of(model, call, "head")
        proved(model, halves, call)


def test_a_full_device_is_no_reason_to_look_less_closely() -> None:
    """Where there is no room to look in full precision the halves are refused, and not judged by what bf16 shows."""

    def without_room(model: Network, x: torch.Tensor) -> torch.Tensor:
        seen = model.body(x)
        if seen.dtype is torch.float32:
            raise torch.OutOfMemoryError("no room")
        return seen

    with torch.autocast("cpu", dtype=torch.bfloat16):
        model, halves, call = made()
        with pytest.raises(CannotSplit, match="OutOfMemoryError"):
            proved(model, with_prefix(halves, lambda x: ([without_room(model, x)], ())), call)
