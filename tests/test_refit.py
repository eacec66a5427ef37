"""A second run on one model: what a plan froze does not count as frozen by hand; what a person froze does."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import lehr
from lehr.planning import Plan
from lehr.recipe import Recipe, Stage


class Net(nn.Module):
    """A backbone with batch-norm, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8))
        self.fc = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.body(x))


HEAD = {"fc.weight", "fc.bias"}
EVERYTHING = {name for name, _ in Net().named_parameters()}
STEM = {"body.0.weight", "body.0.bias"}


def recipe(train: Any, lr: Any = 0.05) -> Recipe:
    return Recipe([Stage("1 epoch", train=train, lr=lr)], batch_size=8)


ALL = recipe("all", {"head": 0.05, "backbone": 0.02})
STAGES = Recipe(
    [Stage("1 epoch", train="head", lr=0.05), *ALL.stages, Stage("1 epoch", train="body.0", lr=0.01)],
    batch_size=8,
)


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(24, 6, generator=generator)
    return TensorDataset(inputs, inputs[:, :3].argmax(1))


def fit(model: nn.Module, recipe: Recipe, **said: Any) -> set[str]:
    """The parameters that one run moves."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    lehr.fit(model, data(), recipe=recipe, device="cpu", **said)
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def plan(model: nn.Module, recipe: Recipe = ALL) -> Plan:
    return lehr.plan(recipe, model, 24)


def trains(model: nn.Module, recipe: Recipe = ALL) -> set[str]:
    """The parameters that a plan for the model trains in some step."""
    return {name for names in plan(model, recipe).groups.values() for name in names}


def test_first_the_head_then_all() -> None:
    """A run of all after a run of the head trains all, the backbone at its own rate."""
    model = Net()
    fresh = plan(model)
    assert fit(model, recipe("head")) == HEAD
    assert plan(model) == fresh
    assert fit(model, ALL) == EVERYTHING


def _stop_in_stage_one(event: Any) -> None:
    if isinstance(event, lehr.events.EpochEnded):
        raise KeyboardInterrupt


def test_an_interrupted_run_is_begun_again() -> None:
    """A run that was stopped while the head trained alone leaves a model whose next run is the same."""
    model = Net()
    fresh = plan(model, STAGES)
    with pytest.raises(KeyboardInterrupt):
        fit(model, STAGES, observers=[_stop_in_stage_one])
    assert not model.body[0].weight.requires_grad
    assert plan(model, STAGES) == fresh
    assert fit(model, STAGES) == EVERYTHING


@pytest.mark.parametrize("by_hand", ["nothing", "stem", "all"])
def test_apply_changes_no_plan(by_hand: str) -> None:
    """The plan of a model, and its hash, are the same after any step of any plan was applied to it."""
    model = Net()
    if by_hand != "nothing":
        lehr.freeze(model, "body.0" if by_hand == "stem" else "all")
    facts = lehr.inspect(model)
    wanted = recipe("*") if by_hand == "all" else STAGES
    fresh = plan(model, wanted)
    optimizer = lehr.optimizer(fresh, model)
    for t in (0, fresh.total_steps // 2, fresh.total_steps - 1, 0):
        lehr.apply(fresh[t], model, optimizer)
        again = plan(model, wanted)
        assert again == fresh
        assert again.hash == fresh.hash
        assert lehr.inspect(model) == facts


@pytest.mark.parametrize("hand", [lehr.freeze, lambda m, _: m.body[0].requires_grad_(False)])
def test_frozen_by_hand_stays_so_through_two_runs(hand: Callable[..., Any]) -> None:
    """What a person froze before the first run stays frozen in the second, too."""
    model = Net()
    hand(model, "body.0")
    assert fit(model, recipe("head")) == HEAD
    assert fit(model, ALL) == EVERYTHING - STEM
    assert fit(model, ALL) == EVERYTHING - STEM


def test_a_stage_that_names_it_frees_it_for_that_run_only() -> None:
    """What a person froze trains in a run whose stage names it, and is left out of the next one."""
    model = Net()
    lehr.freeze(model, "body.0")
    assert fit(model, recipe(["head", "body.0"])) == HEAD | STEM
    assert fit(model, ALL) == EVERYTHING - STEM


def test_freeze_between_two_runs() -> None:
    """What a person freezes after a run is left out of the next, also what that run had frozen itself."""
    for first in (recipe("head"), ALL):
        model = Net()
        fit(model, first)
        assert lehr.freeze(model, "body.0")
        assert fit(model, ALL) == EVERYTHING - STEM


def test_thaw_between_two_runs() -> None:
    """What a person froze before the first run and thaws after it trains in the second, also where the run
    had thawed it already."""
    for first in (recipe("head"), recipe(["head", "body.0"])):
        model = Net()
        lehr.freeze(model, "body")
        fit(model, first)
        lehr.thaw(model, "body.0")
        assert fit(model, ALL) == HEAD | STEM


def test_requires_grad_between_two_runs() -> None:
    """`requires_grad_` by hand after a run counts as before it: what trained is frozen, what was frozen by
    hand is free."""
    model = Net()
    lehr.freeze(model, "body.0")
    fit(model, ALL)
    model.fc.bias.requires_grad_(False)
    assert trains(model) == EVERYTHING - STEM - {"fc.bias"}
    model.body[0].requires_grad_(True)
    assert fit(model, ALL) == EVERYTHING - {"fc.bias"}
    fit(model, recipe("fc.weight"))
    model.requires_grad_(True)
    assert trains(model) == EVERYTHING


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_knows_who_froze_it(copied: Callable[[nn.Module], nn.Module]) -> None:
    """A copy of a model has the plan that the model has, and keeps it through runs."""
    model = Net()
    lehr.freeze(model, "body.0")
    fit(model, recipe("head"))
    other = copied(model)
    assert plan(other) == plan(model)
    assert fit(other, ALL) == EVERYTHING - STEM
    assert plan(other) == plan(model)


def test_a_backbone_goes_into_another_model() -> None:
    """A part of a trained model trains in a new one, but for what a person froze of it."""
    model = Net()
    lehr.freeze(model, "body.0")
    fit(model, recipe("head"))
    grown = nn.Sequential(model.body, nn.Linear(8, 3))
    free = {name for name, _ in grown.named_parameters()} - {"0.0.weight", "0.0.bias"}
    assert trains(grown) == free
    assert fit(grown, ALL) == free


def test_a_replaced_part_is_read_anew() -> None:
    """A part that a person put in after a run is free, or frozen, as it comes."""
    model = Net()
    fit(model, recipe("head"))
    model.body[0] = nn.Linear(6, 8).requires_grad_(False)
    model.fc = nn.Linear(8, 3)
    assert fit(model, ALL) == EVERYTHING - STEM


def test_wrapped_models() -> None:
    """A compiled model and the model inside have one plan, whichever of them a run had."""
    model = Net()
    fresh = plan(model)
    compiled = torch.compile(model, backend="eager")
    fit(compiled, recipe("head"))
    assert plan(model) == plan(compiled) == fresh
    torch.compiler.reset()
