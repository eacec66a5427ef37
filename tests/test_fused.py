"""Fused optimizers: taken where they are right, and the same training as the loop of single operations."""

from __future__ import annotations

import copy
import gc
import inspect
import weakref
from typing import Any

import pytest
import torch
from torch import nn

import lehr
from lehr.recipe import Recipe, Stage
from lehr.run.fused import keep_right

OPTIMIZERS = (
    "adamw",
    "adam",
    "adagrad",
    {"name": "sgd", "momentum": 0.9},
    {"name": "sgd", "momentum": 0.9, "nesterov": True},
)


class Net(nn.Module):
    """Convolutions, so that weights have more than one layout."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, bias=False)  # before a norm its gradient would be rounding alone
        self.norm = nn.BatchNorm2d(8)
        self.body = nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.norm(self.stem(x)).relu()).mean((2, 3)))


def made(model: nn.Module, optimizer: Any, train: str = "all") -> torch.optim.Optimizer:
    recipe = Recipe([Stage("4 epochs", train=train, lr=0.01)], optimizer=optimizer, batch_size=4)
    return lehr.optimizer(lehr.plan(recipe, model, samples=16), model)


def is_fused(optimizer: torch.optim.Optimizer) -> bool:
    return all(group.get("fused") is True for group in optimizer.param_groups)


def trained(optimizer: Any, *, steps: int = 4, layout_at: int | None = None) -> dict[str, torch.Tensor]:
    """The weights after some steps; the model is laid out anew before step `layout_at`."""
    torch.manual_seed(0)
    model = Net()
    own = made(model, optimizer)
    for step in range(steps):
        if step == layout_at:
            model.to(memory_format=torch.channels_last)
        own.zero_grad()
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(4, 3, 8, 8, generator=generator)
        model(x).square().sum().backward()
        own.step()
    return {name: value.clone().contiguous() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
def test_a_fused_optimizer_trains_as_the_one_of_single_operations(optimizer: Any) -> None:
    """Fused and not, the same steps lead to the same weights, but for rounding."""
    said = optimizer if isinstance(optimizer, dict) else {"name": optimizer}
    assert is_fused(made(Net(), optimizer))
    assert not is_fused(made(Net(), {**said, "fused": False}))
    fused, plain = trained(optimizer), trained({**said, "fused": False})
    for name, value in plain.items():
        torch.testing.assert_close(fused[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout_at", [0, 2])
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
def test_weights_that_are_laid_out_anew_keep_their_momentum(optimizer: Any, layout_at: int) -> None:
    """Where the model is laid out channels-last on the way, each momentum still meets its own weight."""
    once, always = trained(optimizer, layout_at=layout_at), trained(optimizer)
    for name, value in always.items():
        torch.testing.assert_close(once[name], value, rtol=1e-4, atol=1e-5)


def test_a_gradient_in_another_layout_meets_its_own_weight() -> None:
    """A gradient that a person has put there in another order of memory does what it does to a loop of operations."""
    found = []
    for fused in (None, False):
        torch.manual_seed(0)
        model = Net().to(memory_format=torch.channels_last)
        optimizer = made(model, {"name": "adamw", "fused": fused} if fused is False else "adamw")
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape)
        optimizer.step()
        found.append(model.stem.weight.detach().contiguous())
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("optimizer", ["adam", {"name": "adamw", "amsgrad": True}], ids=str)
def test_weights_that_lie_channels_last_are_not_copied(optimizer: Any) -> None:
    """The kernels work on the weights' own memory, in whatever order it is; weights and state keep their shapes."""
    model = Net().to(memory_format=torch.channels_last)
    own = made(model, optimizer)
    assert is_fused(own)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    own.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        own.step()
    assert "aten::clone" not in {event.key for event in profile.key_averages()}
    assert not model.stem.weight.is_contiguous()
    for parameter in model.parameters():
        assert all(t.shape in (parameter.shape, ()) for t in own.state[parameter].values())


def test_the_kernels_see_the_memory_of_each_weight() -> None:
    """Weights of four and five dimensions, in one layout or another, come to the numbers that single operations come to."""
    shapes = [(6, 4, 3, 3), (6, 4, 1, 1), (4, 3, 2, 2, 2), (5, 4), (4,)]
    layouts = [torch.channels_last, torch.contiguous_format, torch.channels_last_3d]
    found = []
    for fused in (True, False):
        torch.manual_seed(0)
        weights = [nn.Parameter(torch.randn(shape)) for shape in shapes]
        for weight, layout in zip(weights[:3], layouts, strict=True):
            weight.data = weight.data.contiguous(memory_format=layout)
        optimizer = torch.optim.AdamW(weights, lr=0.1, amsgrad=True, fused=fused)
        if fused:
            keep_right(optimizer)
        for _ in range(3):
            for weight in weights:
                weight.grad = torch.randn(weight.shape)
            optimizer.step()
        found.append([weight.detach().clone() for weight in weights])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_flag_among_the_lists_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """AdamW of torch 2.6 gives the method that gathers weights a flag between its lists."""
    gather = torch.optim.AdamW._init_group

    def with_flag(self: Any, group: Any, params: Any, grads: Any, amsgrad: bool, *lists: Any) -> Any:
        assert amsgrad is False
        flag = [amsgrad] if "amsgrad" in inspect.signature(gather).parameters else []
        return gather(self, group, params, grads, *flag, *lists)

    monkeypatch.setattr(torch.optim.AdamW, "_init_group", with_flag)
    weight = nn.Parameter(torch.randn(4, 3, 2, 2).contiguous(memory_format=torch.channels_last))
    optimizer: Any = torch.optim.AdamW([weight], fused=True)
    keep_right(optimizer)
    weight.grad, lists = torch.randn_like(weight), [[], [], False, [], [], [], []]
    optimizer._init_group(optimizer.param_groups[0], *lists)
    assert all(tensors[0].shape == (4, 2, 2, 3) for tensors in lists[:2] + lists[3:5])


def test_an_optimizer_is_gone_with_its_last_user() -> None:
    """Its state is twice the size of the weights, and waits for no garbage collector."""
    optimizer = made(Net(), "adamw")
    held = weakref.ref(optimizer)
    gc.disable()
    try:
        del optimizer
        assert held() is None
    finally:
        gc.enable()


def test_an_update_that_the_scaler_refuses_leaves_nothing_behind() -> None:
    """After a refused first update, fp16 training goes on as if it had never been tried."""
    weights = []
    for refused in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        optimizer = made(model, {"name": "sgd", "momentum": 0.9})
        assert is_fused(optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=1.0, backoff_factor=0.5)
        scaler.scale(torch.zeros(()))
        for value in ([float("inf")] if refused else []) + [1.0, 2.0]:
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, value * scaler.get_scale())
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        weights.append(model.weight.detach().clone())
    torch.testing.assert_close(weights[0], weights[1])


def strided() -> nn.Module:
    model = nn.Linear(4, 4)
    model.weight = nn.Parameter(torch.randn(8, 4)[::2])
    return model


@pytest.mark.parametrize(
    ("model", "optimizer"),
    [
        (nn.Linear(4, 2), "sgd"),
        (nn.Linear(4, 2), "nadam"),
        (nn.Linear(4, 2), {"name": "adamw", "foreach": True}),
        (nn.Linear(4, 2), {"name": "adamw", "fused": False}),
        (nn.Linear(4, 2).to(torch.bfloat16), "adamw"),
        (strided(), "adamw"),
        (
            nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Linear(4, 2)),
            {"name": "sgd", "momentum": 0.9},
        ),
    ],
    ids=["nothing to fuse", "no kernel", "foreach", "said", "bfloat16", "gaps", "sparse"],
)
def test_where_fused_would_not_do_torch_chooses(model: nn.Module, optimizer: Any) -> None:
    """What a person said stays, and kernels that are not there, of no use, or not right are not taken."""
    assert not is_fused(made(model, optimizer))


def test_the_state_of_a_fused_optimizer_is_taken_over() -> None:
    """A copied state goes on to the same bits, in a model of another layout too."""
    torch.manual_seed(0)
    first = Net()
    second = copy.deepcopy(first).to(memory_format=torch.channels_last)
    one, two = made(first, "adamw"), made(second, "adamw")
    gradients = [torch.randn(p.shape) for p in first.parameters()]
    for parameter, gradient in zip(first.parameters(), gradients, strict=True):
        parameter.grad = gradient
    one.step()
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    second.load_state_dict(first.state_dict())
    for model, optimizer in ((first, one), (second, two)):
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    for name, value in first.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], value, rtol=1e-5, atol=1e-6)
