"""The groups of a plan: layer decay, weight decay, names, ties, freezing again, what was frozen by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lehr.errors import RecipeError, SelectionError
from lehr.recipe import Recipe, Stage
from lehr.resolving import resolve
from lehr.schedules import constant
from lehr.selection import ModelFacts
from plans import NET, P, plan_of


def test_layer_decay() -> None:
    """Each layer's rate is the rate * layer_decay ** (distance from the head), and its group is named by the
    layer.
    """
    plan = plan_of(
        Stage("2 epochs", train="all", lr=0.1, layer_decay=0.5), weight_decay=0.1, schedule=constant()
    )
    assert plan.stages[0].peak_lr == {
        "backbone/0": 0.025,
        "backbone/0/no_decay": 0.025,
        "backbone/1": 0.05,
        "backbone/1/no_decay": 0.05,
        "head/2": 0.1,
        "head/2/no_decay": 0.1,
    }
    by_name = {name: plan.stages[0].peak_lr[group] for group, names in plan.groups.items() for name in names}
    assert by_name == {
        "stem.weight": 0.025,
        "bn.weight": 0.025,
        "bn.bias": 0.025,
        "body.weight": 0.05,
        "body.bias": 0.05,
        "fc.weight": 0.1,
        "fc.bias": 0.1,
    }


def test_layer_decay_needs_layers() -> None:
    """Where the order of layers is not known, layer_decay has no effect, and the plan says so."""
    flat = replace(NET, parameters=tuple(replace(p, layer=0) for p in NET.parameters), layers=1)
    plan = plan_of(facts=flat, layer_decay=0.5, schedule=constant())
    assert set(plan.stages[0].peak_lr.values()) == {0.1}
    assert "layer_decay has no effect: the order of this model's layers was not recognised" in plan.notes


def test_a_rate_that_vanishes_is_refused() -> None:
    """A layer decay so strong that a rate would be 0 is refused, since 0 means frozen."""
    with pytest.raises(
        RecipeError,
        match=r"layer_decay: the rate of 'stem.weight' in stages.0 is too small.*raise layer_decay",
    ):
        plan_of(layer_decay=1e-300)


def test_no_decay_is_the_recipes_choice() -> None:
    """Norms and biases have no decay unless asked for; other patterns may be added; a pattern that matches
    nothing is refused.
    """

    def decays(**said: Any) -> dict[str, float]:
        plan = plan_of(weight_decay=0.1, **said)
        return {
            name: plan.stages[0].weight_decay[group] for group, names in plan.groups.items() for name in names
        }

    assert {name for name, decay in decays().items() if not decay} == {
        "bn.weight",
        "bn.bias",
        "body.bias",
        "fc.bias",
    }
    assert set(decays(no_decay=[]).values()) == {0.1}
    assert {name for name, decay in decays(no_decay=["norm", "stem"]).items() if not decay} == {
        "stem.weight",
        "bn.weight",
        "bn.bias",
    }
    with pytest.raises(
        SelectionError, match=r"no_decay: 'stme' matches no parameter of Net; did you mean \"stem\""
    ):
        plan_of(no_decay=["stme"])
    plain = ModelFacts("Plain", (P("a.weight", (2, 2)),))
    assert plan_of(facts=plain, weight_decay=0.1).stages[0].weight_decay == {"all": 0.1}


def test_equal_settings_are_one_group() -> None:
    """Parameters that every stage treats alike are one group, whatever words name them; twins of a name are
    told apart.
    """
    one = plan_of(Stage("1 epoch", train=["head", "backbone"], lr={"head": 0.1, "backbone": 0.1}))
    assert list(one.groups) == ["all"]
    assert len(one.groups["all"]) == 7
    recipe = Recipe(
        [
            Stage("1 epoch", train="*", lr={"stem": 1, "bn": 2, "body": 3, "fc": 4}),
            Stage("1 epoch", train="*", lr=1),
        ]
    )
    assert list(resolve(recipe, NET, samples=320).groups) == ["stem", "bn", "body", "fc"]
    crossed = Recipe(
        [Stage("1 epoch", train="*", lr={"*.weight": 1, "*.bias": 2}), Stage("1 epoch", train="bn", lr=1)],
        no_decay=[],
    )
    assert sorted(resolve(crossed, NET, samples=320).groups) == ["*.bias", "*.weight", "bn", "bn#2"]


def test_stages_may_freeze_again() -> None:
    """A stage may train less than the one before: what it leaves out has rate 0 and is not trainable
    there.
    """
    plan = resolve(
        Recipe(
            [
                Stage("1 epoch", train="*", lr=1),
                Stage("1 epoch", train="head", lr=1),
                Stage("1 epoch", train="*", lr=1),
            ]
        ),
        NET,
        samples=320,
    )
    assert [plan[t].trainable == {"fc.weight", "fc.bias"} for t in (9, 10, 19, 20)] == [
        False,
        True,
        True,
        False,
    ]
    assert not plan.lr("backbone")[10:20].any()
    assert plan.lr("backbone")[20:].all()


def test_a_model_that_is_all_head() -> None:
    """A model whose every parameter is its head can be planned: it has no backbone, and needs none."""
    linear_probe = ModelFacts(
        "Linear", (P("weight", (2, 4)), P("bias", (2,), bias=True)), head=("weight", "bias")
    )
    plan = plan_of(facts=linear_probe, weight_decay=0.1)
    assert plan.groups == {"all": ("weight",), "all/no_decay": ("bias",)}


def test_tied_weights_are_one_parameter() -> None:
    """Naming a tied weight by its other name trains the one parameter, in one group."""
    plan = plan_of(Stage("1 epoch", train="embed", lr=1))
    assert plan[0].trainable == {"fc.weight"}
    assert list(plan.groups.values()) == [("fc.weight",)]


HAND = replace(
    NET,
    parameters=(replace(NET.parameters[0], frozen_by_hand=True), *NET.parameters[1:]),
    understood=("stem is frozen by hand",),
)


def test_frozen_by_hand() -> None:
    """What was frozen by hand is in no group unless a stage names it, and what is known of it is among the
    plan's notes.
    """
    plan = plan_of(facts=HAND)
    assert "stem.weight" not in plan[0].trainable
    assert all("stem.weight" not in names for names in plan.groups.values())
    assert "stem is frozen by hand" in plan.notes
    assert not any("no stage trains" in note for note in plan.notes)
    assert "stem.weight" in plan_of(Stage("1 epoch", train=["all", "stem"], lr=1), facts=HAND)[0].trainable


def test_restore_best_is_a_stages_own() -> None:
    """A stage restores its best weights as the recipe says, unless it says otherwise itself."""
    stages = [Stage("1 epoch", train="head", lr=1, restore_best=said) for said in (None, True, False)]
    for by_default in (True, False):
        plan = resolve(Recipe(stages, restore_best=by_default), NET, samples=320)
        assert [stage.restore_best for stage in plan.stages] == [by_default, True, False]
