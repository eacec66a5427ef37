"""The optimizer and `apply`: every parameter in one group, every group on its own curve, and no history."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import TensorDataset

import lehr
from lehr.errors import ModelError, RecipeError
from lehr.planning import Plan
from lehr.recipe import Recipe, Stage
from lehr.run.facts import named

ALL = vars(torch.optim).values()
CLASSES = sorted(c.__name__ for c in ALL if isinstance(c, type) and issubclass(c, torch.optim.Optimizer))
USABLE = [name for name in CLASSES if name not in ("Optimizer", "LBFGS")]


class Net(nn.Module):
    """Batch-norm, dropout, two identically initialised twins, and a weight that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.3)
        self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 8)
        self.right.load_state_dict(self.left.state_dict())
        self.echo = nn.Linear(8, 8)
        self.echo.weight = self.left.weight
        self.fc = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.drop(self.norm(self.stem(x)).relu())
        return self.fc(self.echo((self.left(x) - 0.5 * self.right(x)).relu()))


STAGES = (
    Stage("2 epochs", train="head", lr=3e-2),
    Stage("13 steps", train=["head", "right", "norm"], lr={"head": 1e-2, "right": 3e-3, "norm": 0.1}),
    Stage("2 epochs", train="all", lr={"head": 1e-2, "backbone": 1e-3}, layer_decay=0.7, weight_decay=0.2),
    Stage("3 steps", train="left", lr=1e-3, schedule=lehr.linear(0.1)),
)
EVERYTHING = Recipe(STAGES, optimizer="adamw", weight_decay=0.05, batch_size=8, min_lr=1e-6)


def data(samples: int = 50) -> TensorDataset:
    return TensorDataset(torch.randn(samples, 6), torch.arange(samples) % 3)


def planned(model: nn.Module, *, train: str = "all", **said: Any) -> Plan:
    recipe = Recipe([Stage("1 epoch", train=train, lr=0.01)], batch_size=8, **said)
    return lehr.plan(recipe, model, samples=48)


def group_of(plan: Plan) -> dict[str, str]:
    return {name: group for group, names in plan.groups.items() for name in names}


@contextmanager
def spied(model: nn.Module) -> Iterator[list[dict[str, list[tuple[float, float]]]]]:
    """One entry an update of any optimizer: name -> (rate, decay) of every group that holds the parameter."""
    seen: list[dict[str, list[tuple[float, float]]]] = []
    names = {id(parameter): name for name, parameter in named(model).items()}

    def look(optimizer: torch.optim.Optimizer, *_: object) -> None:
        rates: dict[str, list[tuple[float, float]]] = {}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                rates.setdefault(names[id(parameter)], []).append((group["lr"], group["weight_decay"]))
        seen.append(rates)

    handle = register_optimizer_step_pre_hook(look)
    try:
        yield seen
    finally:
        handle.remove()


@pytest.mark.parametrize(
    "recipe",
    [
        EVERYTHING,
        Recipe(STAGES, optimizer={"name": "sgd", "momentum": 0.9}, batch_size=8, ema=0.9, clip_norm=1.0),
        Recipe(STAGES, batch_size=8, accumulate=3, lr_rule="linear", layer_decay=0.5, weight_decay=0.01),
        Recipe(STAGES, batch_size=8, no_decay=["left"], weight_decay=0.1, schedule=lehr.restarts("30%")),
    ],
    ids=["adamw", "sgd", "accumulate", "restarts"],
)
def test_every_parameter_is_in_one_group_and_follows_its_own_curve(recipe: Recipe) -> None:
    """At every update of every stage each trained parameter stands in exactly one group, with the bits of
    its curve."""
    model, train = Net(), data()
    plan = lehr.plan(recipe, model, samples=len(train))
    with spied(model) as seen:
        lehr.fit(model, train, recipe=recipe)
    assert len(seen) == plan.total_steps
    groups, curves = group_of(plan), {group: plan.lr(group) for group in plan.groups}
    assert Counter(n for names in plan.groups.values() for n in names) == Counter(list(named(model)))
    for step, rates in enumerate(seen):
        assert rates.keys() == groups.keys()
        decay = plan.stage_at(step).weight_decay
        for name, found in rates.items():
            assert found == [(float(curves[groups[name]][step]), decay[groups[name]])], (step, name)


def test_the_curve_of_a_group_is_its_own_closed_form() -> None:
    """What the optimizer is given is min_lr + (peak - min_lr) * factor of the stage's own step, for that
    group's peak."""
    model = Net()
    recipe = Recipe(STAGES[1:2], schedule=lehr.linear(0.25), min_lr=1e-5, batch_size=8)
    with spied(model) as seen:
        lehr.fit(model, data(), recipe=recipe)
    for name, peak in (("fc.weight", 1e-2), ("right.bias", 3e-3), ("norm.bias", 0.1)):
        wanted = [1e-5 + (peak - 1e-5) * (1 - 0.75 * s / 13) for s in range(13)]
        assert [rates[name][0][0] for rates in seen] == pytest.approx(wanted, rel=1e-14)


def test_twins_part_where_their_rates_differ() -> None:
    """Identically initialised twins stay two parameters: only the one that a stage names moves."""
    model = Net()
    recipe = Recipe([Stage("1 epoch", train="right", lr=0.1)], optimizer="sgd", batch_size=8)
    before = model.left.weight.detach().clone()
    lehr.fit(model, data(), recipe=recipe)
    assert torch.equal(model.left.weight, before)
    assert not torch.equal(model.right.weight, before)


@pytest.mark.parametrize("name", USABLE)
def test_every_torch_optimizer_works_by_its_name(name: str) -> None:
    """Every class of torch.optim that needs no closure trains by its name, in any case, at the plan's
    rates."""
    if name == "SparseAdam":  # it takes sparse gradients only
        model = nn.Sequential(nn.Embedding(6, 4, sparse=True), nn.Flatten(0), nn.Linear(24, 3))
        train, inputs = "0", torch.arange(6)
    else:
        model = nn.Sequential(nn.Linear(6, 4, bias=False), nn.ReLU(), nn.Linear(4, 3, bias=False))
        train, inputs = "all", torch.randn(8, 6)
    plan = planned(model, train=train, optimizer=name.upper())
    optimizer = lehr.optimizer(plan, model)
    assert type(optimizer).__name__ == name
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    before = [parameter.detach().clone() for parameter in trained]
    for step in plan:
        lehr.apply(step, model, optimizer)
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()
        assert [g["lr"] for g in optimizer.param_groups] == [step.lr[g] for g in plan.groups]
    assert all(not torch.equal(old, new) for old, new in zip(before, trained, strict=True))


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ({"name": "sgd", "momentum": 0.9, "nesterov": True}, {"momentum": 0.9, "nesterov": True}),
        ({"name": "SGD", "momentum": 0.5, "dampening": 0.1}, {"momentum": 0.5, "dampening": 0.1}),
        ({"name": "adam", "betas": [0.8, 0.99], "amsgrad": True}, {"betas": (0.8, 0.99), "amsgrad": True}),
        ({"name": "adamw", "maximize": True, "foreach": True}, {"maximize": True, "foreach": True}),
        ({"name": "adamw", "fused": True, "eps": 1e-6}, {"fused": True, "eps": 1e-6}),
        ({"name": "rmsprop", "alpha": 0.9, "centered": True}, {"alpha": 0.9, "centered": True}),
    ],
    ids=lambda said: said.get("name"),
)
def test_every_setting_reaches_every_group(said: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Each keyword of the class can be said in the recipe and stands in every parameter group; lists
    become tuples."""
    model = Net()
    recipe = Recipe(STAGES, optimizer=said, weight_decay=0.05, batch_size=8)
    optimizer = lehr.optimizer(lehr.plan(recipe, model, samples=50), model)
    for group in optimizer.param_groups:
        assert {key: group[key] for key in wanted} == wanted
    lehr.fit(model, data(), recipe=recipe)


def test_groups_are_named_and_name_their_parameters() -> None:
    """Groups stand in the plan's order, called as there, with the names of the parameters that they hold."""
    model = Net()
    plan = lehr.plan(EVERYTHING, model, samples=50)
    optimizer = lehr.optimizer(plan, model)
    assert [(g["name"], tuple(g["param_names"])) for g in optimizer.param_groups] == list(plan.groups.items())
    own = named(model)
    for group in optimizer.param_groups:
        assert all(p is own[n] for n, p in zip(group["param_names"], group["params"], strict=True))


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"optimizer": "adamm"}, r"torch has no 'adamm'; did you mean \"adam.*It has: .*rmsprop"),
        (
            {"optimizer": {"name": "sgd", "momentun": 0.9}},
            r"SGD has no setting 'momentun'; did you mean \"momentum\"",
        ),
        ({"optimizer": {"name": "sgd", "nesterov": True}}, r"SGD refused its settings .*Nesterov"),
        ({"optimizer": {"name": "adam", "betas": 3}}, r"Adam refused its settings"),
        ({"optimizer": "rprop", "weight_decay": 0.1}, r"Rprop has no weight decay; say weight_decay = 0"),
        ({"optimizer": "LBFGS"}, r"'LBFGS' evaluates the loss several times a step.*take one of adadelta"),
        ({"optimizer": "optimizer"}, r"torch has no 'optimizer'"),
    ],
    ids=["unknown", "setting", "refused", "type", "no decay", "closure", "base class"],
)
def test_what_cannot_be_is_refused_in_words(said: dict[str, Any], message: str) -> None:
    """An unknown optimizer or setting, or a decay that it lacks, is an error that names the nearest right
    thing."""
    model = Net()
    with pytest.raises(RecipeError, match=message):
        lehr.optimizer(planned(model, **said), model)


def test_a_plan_of_another_model_is_refused() -> None:
    """A plan that trains what the model does not have is an error that says so."""
    with pytest.raises(ModelError, match=r"'stem\.weight', which this model does not have"):
        lehr.optimizer(planned(Net()), nn.Linear(2, 2))


def test_a_compiled_part_keeps_its_names() -> None:
    """A model with a compiled submodule gets its optimizer: names are those of the plan, without the
    wrapper's."""
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))
    model[0] = torch.compile(model[0], backend="eager")
    plan = planned(model)
    assert "0.weight" in group_of(plan)
    lehr.apply(plan[0], model, lehr.optimizer(plan, model))
    assert all(p.requires_grad for p in model.parameters())


def state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {
        "requires_grad": {n: p.requires_grad for n, p in model.named_parameters()},
        "gradient": {n: p.grad is not None for n, p in model.named_parameters()},
        "mode": {n: m.training for n, m in model.named_modules()},
        "groups": [(g["name"], g["lr"], g["weight_decay"]) for g in optimizer.param_groups],
    }


def parts() -> tuple[Net, Plan, torch.optim.Optimizer]:
    model = Net()
    plan = lehr.plan(EVERYTHING, model, samples=50)
    return model, plan, lehr.optimizer(plan, model)


def give_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)


TOTAL = parts()[1].total_steps


@given(st.lists(st.integers(0, TOTAL - 1), max_size=6), st.integers(0, TOTAL - 1), st.data())
@settings(deadline=None, max_examples=60)
def test_apply_has_no_history(before: list[int], last: int, more: st.DataObject) -> None:
    """After any steps in any order, `apply(plan[t])` leaves what it leaves on a fresh model; doing it
    again changes nothing."""
    model, plan, optimizer = parts()
    for t in before:
        lehr.apply(plan[t], model, optimizer)
        model.train(more.draw(st.booleans()))
    model.train()
    give_gradients(model)
    lehr.apply(plan[last], model, optimizer)
    fresh, _, fresh_optimizer = parts()
    give_gradients(fresh)
    lehr.apply(plan[last], fresh, fresh_optimizer)
    found = state(model, optimizer)
    assert found == state(fresh, fresh_optimizer)
    lehr.apply(plan[last], model, optimizer)
    assert state(model, optimizer) == found
    trained = {n for n, wanted in found["requires_grad"].items() if wanted}
    assert trained == plan[last].trainable  # torch lists a tied weight by its first name
    assert {n for n, there in found["gradient"].items() if there} == trained


@pytest.mark.parametrize("step", [0, 20])
def test_apply_refuses_an_optimizer_that_is_not_the_plans(step: int) -> None:
    """Groups that are not the plan's, none missing and none too many, are refused before anything has
    changed."""
    model, plan, ours = parts()
    plain = torch.optim.SGD(model.parameters(), lr=0.5)
    other = lehr.optimizer(planned(model), model)
    fewer = lehr.optimizer(plan, model)
    fewer.param_groups.pop()
    for wrong in (plain, other, fewer):
        rates = [group["lr"] for group in wrong.param_groups]
        with pytest.raises(RecipeError, match=r"make it with lehr\.optimizer\(plan, model\)"):
            lehr.apply(plan[step], model, wrong)
        assert [group["lr"] for group in wrong.param_groups] == rates
    assert all(p.requires_grad for p in model.parameters())
    lehr.apply(plan[step], model, ours)


def test_a_torch_scheduler_follows_the_curve() -> None:
    """`torch_scheduler` gives each group its initial rate times the curve, at every step and past the end."""
    curve = (lehr.warmup("3 steps") >> lehr.cosine(0.1)).over(steps=10)
    first, second = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([{"params": [first], "lr": 0.5}, {"params": [second], "lr": 2.0}])
    scheduler = lehr.torch_scheduler(optimizer, curve)
    for t in range(13):
        assert [group["lr"] for group in optimizer.param_groups] == [0.5 * curve(t), 2.0 * curve(t)]
        optimizer.step()
        scheduler.step()
