"""Layouts: measuring leaves no trace, what was decided is done, and training is the same but for rounding."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from lehr.errors import RequestError
from lehr.run import layout as layouts
from lehr.run.layout import apply_layout, measured, named_layout
from lehr.run.precision import arithmetic
from lehr.run.update import cross_entropy

ON = arithmetic("cpu")


class Net(nn.Module):
    """Enough convolutions, statistics, dropout, a frozen part, a weight used twice, and a buffer put in its place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 128, 3)
        self.norm = nn.BatchNorm2d(128)
        self.body = nn.Conv2d(128, 128, 3)
        self.again = nn.Conv2d(128, 128, 3)
        self.again.weight = self.body.weight
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(128, 4)
        self.register_buffer("seen", torch.zeros(()))
        self.stem.weight.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = self.seen + 1
        x = self.again(self.body(self.norm(self.stem(x)).relu()).relu())
        return self.head(self.drop(x.mean((2, 3))))


def batch() -> list[torch.Tensor]:
    return [torch.randn(4, 3, 10, 10), torch.arange(4)]


def states() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Seconds of a step in each layout, told by a clock that looks at the weights."""
    seconds = {"contiguous": 1.0, "channels_last": 1.0}

    def step(model: Net, batch: Any, *_: Any) -> float:
        assert model.stem.weight.grad is None
        functional.cross_entropy(model(batch[0]), batch[1]).backward()
        torch.rand(3)
        random.random()
        np.random.rand()
        is_last = model.body.weight.is_contiguous(memory_format=torch.channels_last)
        return seconds["channels_last" if is_last else "contiguous"]

    monkeypatch.setattr(layouts, "_step", step)
    monkeypatch.delenv(layouts.TURNED_OFF_BY, raising=False)
    return seconds


@pytest.mark.parametrize("faster", ["contiguous", "channels_last"])
def test_the_faster_one_is_chosen_and_nothing_is_touched(clock: dict[str, float], faster: Any) -> None:
    """Whichever is faster is taken; parameters, their memory, gradients, buffers, batch and random states are as before."""
    model, here = Net(), batch()
    functional.cross_entropy(model(here[0]), here[1]).backward()
    parts = [*model.parameters(), *model.buffers(), *here]
    before = [(t, t.data_ptr(), t.stride(), t.detach().clone()) for t in parts]
    gradients = [(p, p.grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    random_before = states()
    clock[faster] = 0.5
    found = measured(model, here, cross_entropy(), ON, steps=1000)
    assert found.name == faster
    assert found.seconds == (clock["contiguous"], clock["channels_last"])
    assert states() == random_before
    now = [*model.parameters(), *model.buffers(), *here]
    for tensor, (was, address, stride, value) in zip(now, before, strict=True):
        assert tensor is was
        assert (tensor.data_ptr(), tensor.stride()) == (address, stride)
        assert torch.equal(tensor, value)
    for parameter, gradient, value in gradients:
        assert parameter.grad is gradient
        assert gradient is None or (value is not None and torch.equal(gradient, value))


@pytest.mark.parametrize(("contiguous", "last"), [(1.0, 0.97), (0.97, 1.0), (0.001, 0.004)])
def test_what_is_not_clear_is_for_the_rule(
    clock: dict[str, float], monkeypatch: pytest.MonkeyPatch, contiguous: float, last: float
) -> None:
    """Times that are close, or of a step too short to be timed, decide nothing."""
    clock |= {"contiguous": contiguous, "channels_last": last}
    for rule in (False, True):
        monkeypatch.setattr(layouts, "channels_last_pays", lambda *_, rule=rule: rule)
        found = measured(Net(), batch(), cross_entropy(), ON, steps=1000)
        assert (found.name == "channels_last") == rule


def test_little_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few steps, few convolutions, or no images: the rule decides, and no step is run."""

    def never(*_: Any) -> float:
        raise AssertionError

    monkeypatch.setattr(layouts, "_timed", never)
    small = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(256, 4))
    for model, data, steps in (
        (Net(), batch(), 99),
        (small, batch(), 1000),
        (Net(), [torch.randn(4, 7), torch.arange(4)], 1000),
    ):
        found = measured(model, data, cross_entropy(), ON, steps=steps)
        assert (found.name, found.seconds) == ("contiguous", None)


@pytest.mark.parametrize("asked", ["contiguous", "channels_last"])
@pytest.mark.usefixtures("clock")
def test_a_person_may_decide(monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
    """LEHR_LAYOUT decides without a step being run; a word that is none is refused with those that are."""
    monkeypatch.setenv(layouts.TURNED_OFF_BY, asked)
    found = measured(Net(), batch(), cross_entropy(), ON, steps=1000)
    assert (found.name, found.seconds) == (asked, None)
    monkeypatch.setenv(layouts.TURNED_OFF_BY, "nhwc")
    with pytest.raises(RequestError, match="'nhwc'; expected 'contiguous' or 'channels_last'"):
        measured(Net(), batch(), cross_entropy(), ON, steps=1000)


def test_a_model_that_fails_is_as_before() -> None:
    """Where a step breaks off, the rule decides, and the weights lie where they lay."""

    def fails(model: nn.Module, batch: Any) -> torch.Tensor:
        model(batch[0])
        raise RuntimeError("no")

    model = Net()
    before = [(p, p.data_ptr(), p.stride()) for p in model.parameters()]
    found = measured(model, batch(), fails, ON, steps=1000)
    assert (found.name, found.seconds) == ("contiguous", None)
    assert [(p, p.data_ptr(), p.stride()) for p in model.parameters()] == before
    assert model.seen == 0


def test_steps_are_really_timed() -> None:
    """Without a clock of its own, each layout has its seconds, and the sentence names the one that was taken."""
    found = measured(Net().train(), batch(), cross_entropy(), ON, steps=1000)
    assert found.seconds is not None
    assert min(found.seconds) > 0
    assert found.name.replace("_", "-") in found.said


def test_a_layout_is_applied_and_taken_back() -> None:
    """Each parameter stays the same object with the same values; the outputs are the same but for rounding."""
    model, (x, _) = Net().eval(), batch()
    weights = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    expected = model(x)
    for name, form in (("channels_last", torch.channels_last), ("contiguous", torch.contiguous_format)):
        apply_layout(model, named_layout(name))
        assert model.body.weight.is_contiguous(memory_format=form)
        assert model.again.weight is model.body.weight
        torch.testing.assert_close(model(x), expected)
        for key, parameter in model.named_parameters():
            was, value = weights[key]
            assert parameter is was
            assert torch.equal(parameter, value)
