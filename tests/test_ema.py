"""The moving average of the weights, beside one computed by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lehr
from lehr.run.ema import Ema


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.fc = nn.Linear(4, 2)
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
        self.register_buffer("mean", torch.zeros(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.mean = 0.5 * self.mean + 0.5  # another tensor each time
        return self.fc(self.body(x)) + self.mean


def test_the_average_is_the_one_by_hand() -> None:
    """After each step average = d * average + (1 - d) * weight with d = min(decay, (1 + t) / (10 + t)),
    float buffers included."""
    model = Net()
    ema = Ema(model, 0.6)
    names = [name for name, t in model.state_dict().items() if t.is_floating_point() and name != "mask"]
    wanted = {name: model.state_dict()[name].double() for name in names}
    sgd = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(20):
        sgd.zero_grad()
        model(torch.randn(8, 4)).square().mean().backward()
        sgd.step()
        ema.update(step)
        d = min(0.6, (1 + step) / (10 + step))
        for name in names:
            wanted[name] = d * wanted[name] + (1 - d) * model.state_dict()[name].double()
    found = ema.model.state_dict()
    for name in names:
        torch.testing.assert_close(found[name].double(), wanted[name], rtol=1e-5, atol=1e-6)
    assert not torch.equal(found["fc.weight"], model.fc.weight)
    assert found["body.1.num_batches_tracked"].item() == 20


def test_an_infinity_in_a_buffer_stays_one() -> None:
    """A mask of infinities is copied: its average would be not a number."""
    model = Net()
    ema = Ema(model, 0.9)
    for step in range(3):
        ema.update(step)
    assert torch.equal(ema.model.mask, model.mask)


@pytest.mark.parametrize("decay", [0.3, 0.999])
def test_what_is_frozen_stays_equal_to_the_bit(decay: float) -> None:
    """Averaging equal weights gives them back, bit for bit, however often: frozen parts of model and
    average agree."""
    model = Net()
    lehr.freeze(model, "body")
    ema = Ema(model, decay)
    for step in range(50):
        with torch.no_grad():
            model.fc.weight.add_(torch.randn(2, 4))
        ema.update(step)
    for name, tensor in model.body.state_dict().items():
        assert torch.equal(tensor, ema.model.body.state_dict()[name]), name


def test_the_average_is_a_model_of_its_own() -> None:
    """The average is in eval mode, wants no gradients, shares nothing with the model, and sees through
    `torch.compile`."""
    model = Net()
    ema = Ema(torch.compile(model, backend="eager"), 0.9)
    assert type(ema.model) is Net
    assert not any(module.training for module in ema.model.modules())
    assert not any(parameter.requires_grad for parameter in ema.model.parameters())
    with torch.no_grad():
        model.fc.weight.zero_()
    assert ema.model.fc.weight.abs().sum() > 0
