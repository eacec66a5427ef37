"""Going on with another plan: what is refused and how, what may change, and longer recipes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lehr.duration import Duration
from lehr.errors import DurationError, RecipeError
from lehr.planning import Plan
from lehr.recipe import Recipe, Stage
from lehr.replanning import check_continuation, extended
from lehr.resolving import resolve
from lehr.schedules import constant, cosine, linear, step_decay, warmup
from lehr.selection import ModelFacts
from plans import NET, TWO_STAGES, P, plan_of

WAS = resolve(TWO_STAGES, NET, samples=320)  # steps 0 to 20 and 20 to 50, ten to an epoch
HEAD, ALL = TWO_STAGES.stages
Place = tuple[int, int, int]
BETWEEN, INSIDE, OVER = (1, 3, 30), (1, 3, 34), (1, 5, 50)


def go_on(now: Plan, place: Place, was: Plan = WAS) -> None:
    stage, epoch, step = place
    check_continuation(was, now, stage=stage, epoch=epoch, step=step)


def changed(facts: ModelFacts = NET, samples: int = 320, **said: Any) -> Plan:
    return resolve(replace(TWO_STAGES, **said), facts, samples=samples)


def second(**keys: Any) -> Plan:
    """The plan with another second stage."""
    return changed(stages=[HEAD, replace(ALL, **keys)])


def places(plan: Plan) -> Iterator[Place]:
    """Every place that a run of `plan` comes by, between two updates."""
    for stage in plan.stages:
        for epoch, start, stop in stage.epoch_ranges():
            yield from ((stage.index, epoch, step) for step in range(start, stop + 1))
        yield stage.index, stage.first_epoch + stage.epochs, stage.stop


@pytest.mark.parametrize("place", [BETWEEN, INSIDE, OVER, (0, 0, 0), (0, 1, 13), (0, 2, 20), (1, 2, 20)])
@pytest.mark.parametrize(
    "now",
    [
        WAS,
        changed(schedule=warmup("10%") >> linear()),
        changed(weight_decay=0.01),
        changed(min_lr=1e-6, clip_norm=1.0, patience="3 epochs", label_smoothing=0.1),
        changed(augment=["flip"], restore_best=True),
        changed(replace(NET, parameters=NET.parameters[::-1], name="another")),
        changed(stages=[HEAD, ALL, replace(HEAD, batch_size=8)]),
        changed(optimizer="AdamW"),
        second(lr={"head": 5e-4, "backbone": 3e-4}),
        second(length="7 epochs"),
    ],
)
def test_what_may_differ(now: Plan, place: Place) -> None:
    """Rates, decays, schedules, how the run is ended, stages that follow and a last stage that is longer by
    whole epochs may differ wherever the run stands.
    """
    go_on(now, place)


@pytest.mark.parametrize(
    ("now", "place", "reason", "way_out"),
    [
        (
            changed(replace(NET, parameters=NET.parameters[:-1])),
            BETWEEN,
            "the model has no 'fc.bias', which the run trained",
            "go on with the model that the run began with, or begin a new run from its weights",
        ),
        (
            changed(layer_decay=0.5),
            BETWEEN,
            "the groups of parameters are backbone/0 (1), backbone/0/no_decay (2), backbone/1 (1)",
            "name the same parts as before, with other numbers",
        ),
        (changed(optimizer="sgd"), BETWEEN, "the optimizer is sgd, was adamw", "leave it as it was"),
        (
            changed(monitor="valid_accuracy"),
            INSIDE,
            "monitor is 'valid_accuracy', was 'valid_loss', by which the best weights so far were chosen",
            "leave it as it was, or begin a new run from its weights",
        ),
        (
            changed(optimizer={"name": "adamw", "amsgrad": True}),
            OVER,
            "the optimizer's amsgrad is True, was not set, which changes what state it keeps",
            "leave it as it was",
        ),
        (changed(ema=0.99), INSIDE, "ema is turned on, and there is no average so far", "leave it as it was"),
        (
            changed(stages=[replace(HEAD, length="3 epochs"), ALL]),
            BETWEEN,
            "stage 1 is done, from step 0 to 20 in 2 epochs; the plan has it from step 0 to 30 in 3 epochs",
            "Leave its length, batch_size and accumulate",
        ),
        (
            changed(stages=[replace(HEAD, length="20 steps", batch_size=16), ALL]),
            INSIDE,
            "the plan has it from step 0 to 20 in 1 epoch.",
            "Leave its length",
        ),
        (
            changed(samples=640),
            BETWEEN,
            "the plan has it from step 0 to 40 in 2 epochs",
            "and the number of samples, as they were",
        ),
        (
            changed(stages=[replace(ALL, length="2 epochs")]),
            BETWEEN,
            "the plan has only 1 of the stages",
            "keep this one, at its length or shorter",
        ),
        (
            second(batch_size=64),
            BETWEEN,
            "the stage has begun with batches of 32, the plan has batches of 64",
            "leave batch_size and accumulate as they were, or end stage 2 here and write a stage after it",
        ),
        (
            second(accumulate=2),
            BETWEEN,
            "the plan has batches of 32, 2 to a step",
            "or end stage 2 here",
        ),
        (
            changed(stages=[replace(HEAD, length="20 steps"), ALL], samples=352),
            (0, 1, 10),
            "the stage has begun with 10 steps in an epoch, the plan has 11 (352 training samples, were 320)",
            "give the data that the run began with",
        ),
        (
            second(length="13 steps"),
            INSIDE,
            "the plan ends the stage at step 33, which is past",
            'make it at least "14 steps" long',
        ),
        (
            changed(seed=3),
            INSIDE,
            "in the middle of epoch 4, the rest of which would come from another order: seed 3, was 0",
            "or go on from the end of an epoch",
        ),
        (
            changed(samples=319),
            INSIDE,
            "in the middle of epoch 4, the rest of which would come from another order: samples 319, was 320",
            "leave it as it was",
        ),
        (
            second(length="4 epochs"),
            (1, 6, 50),
            "neither plan has epoch 7 at this step",
            "leave its length and write a stage after it",
        ),
    ],
)
def test_what_is_refused(now: Plan, place: Place, reason: str, way_out: str) -> None:
    """What cannot go on from a place is refused with the place, the reason and the way out."""
    with pytest.raises(RecipeError) as caught:
        go_on(now, place)
    said = str(caught.value)
    assert said.startswith(f"resume: stage {place[0] + 1}, step {place[2]}: ")
    assert reason in said
    assert way_out in said
    assert len(said.splitlines()) == 1


def test_what_trains_stays_within_a_stage() -> None:
    """A stage that has begun neither thaws nor freezes anything more; one that has not begun may."""
    fewer = changed(stages=[replace(HEAD, train=["head", "!bias"]), ALL])
    for was, now, odd in ((WAS, fewer, "freezes"), (fewer, WAS, "thaws")):
        with pytest.raises(RecipeError, match=rf"the plan {odd} fc.bias in it; .* or end stage 1 here"):
            go_on(now, (0, 0, 1), was)
        go_on(now, (0, 0, 0), was)
        go_on(now, BETWEEN, was)
    other = changed(stages=[replace(HEAD, train="fc.weight"), replace(ALL, lr=1e-3)])
    with pytest.raises(RecipeError, match=r"the groups of parameters are"):
        go_on(other, (0, 0, 0))


def test_every_reason_has_a_line() -> None:
    """All reasons are told at once, a line each."""
    with pytest.raises(RecipeError) as caught:
        go_on(changed(optimizer="sgd", ema=0.9, seed=1), INSIDE)
    assert [line.split(": ")[2][:12] for line in str(caught.value).splitlines()] == [
        "the optimize", "ema is turne", "in the middl",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("was", "now", "refused"),
    [
        ({"momentum": 0.9}, {"momentum": 0.95}, False),
        ({"betas": [0.9, 0.999]}, {"betas": [0.8, 0.99]}, False),
        ({"momentum": 0.9}, {"momentum": 0.0}, True),
        ({}, {"momentum": 0.9}, True),
        ({"momentum": 0.9, "nesterov": True}, {"momentum": 0.9}, True),
        ({"amsgrad": False}, {"amsgrad": True}, True),
    ],
)
def test_settings_of_the_optimizer(was: dict[str, Any], now: dict[str, Any], refused: bool) -> None:
    """A number may become another; what turns a kind of state on or off is refused."""
    plans = [changed(optimizer={"name": "any", **settings}) for settings in (was, now)]
    if not refused:
        return go_on(plans[1], BETWEEN, plans[0])
    with pytest.raises(RecipeError, match="changes what state it keeps"):
        go_on(plans[1], BETWEEN, plans[0])
    return None


def test_ema() -> None:
    """The average keeps being taken, or keeps not being; its decay may change."""
    with_average = changed(ema=0.9)
    go_on(changed(ema=0.99), INSIDE, with_average)
    with pytest.raises(RecipeError, match="ema is turned off"):
        go_on(WAS, INSIDE, with_average)


def test_between_epochs_the_order_may_change() -> None:
    """At an epoch's end, validated or not, another seed and as many steps of other samples are accepted."""
    for place in (BETWEEN, (1, 2, 30)):
        go_on(changed(seed=3), place)
        go_on(changed(samples=319), place)


def test_a_run_that_is_over_goes_on_where_whole_epochs_end() -> None:
    """A run that has ended after whole epochs may be extended; one whose last epoch was cut short and
    counted may not, but a stage may follow; before that epoch is counted it goes on in it.
    """
    go_on(second(length="45 steps"), OVER)
    cut, longer = second(length="25 steps"), second(length="45 steps")
    with pytest.raises(
        RecipeError, match=r"ended within an epoch, after 5 of 10 steps, and that epoch is val"
    ):
        go_on(longer, (1, 5, 45), cut)
    go_on(longer, (1, 4, 45), cut)
    go_on(changed(stages=[HEAD, replace(ALL, length="25 steps"), HEAD]), (1, 5, 45), cut)


def test_a_stage_may_end_where_the_run_is() -> None:
    """A stage may be cut to the steps that are done, and a stage that has not begun may be any other."""
    go_on(second(length="14 steps"), INSIDE)
    go_on(second(length="1 epoch", batch_size=8, accumulate=2), (1, 2, 20))


@pytest.mark.parametrize("place", list(places(WAS)), ids=str)
def test_the_same_plan_goes_on_from_everywhere(place: Place) -> None:
    """No place of a run is refused to its own plan."""
    go_on(WAS, place)


LENGTHS = st.one_of(st.integers(1, 4).map("{} epochs".format), st.integers(1, 25).map("{} steps".format))
STAGES = st.builds(
    Stage, LENGTHS, train=st.just("*"), lr=st.sampled_from([0.1, 0.01]), batch_size=st.sampled_from([32, 64])
)


def so_far(plan: Plan, place: Place) -> object:
    """What a place means in a plan: what was done before its stage, and how its stage is cut once begun."""
    number, _, step = place
    stage = plan.stages[number]
    cut = (stage.batch_size, stage.steps_per_epoch) if step > stage.start else None
    return [(s.stop, s.epochs) for s in plan.stages[:number]], cut


@settings(max_examples=100)
@given(st.lists(STAGES, min_size=1, max_size=3), st.lists(STAGES, min_size=1, max_size=3))
def test_a_place_is_accepted_where_it_means_the_same(old: list[Stage], new: list[Stage]) -> None:
    """A place is accepted where the new plan comes by it too, after the same steps and epochs and, within a
    stage, with the same batches; everywhere else it is refused.
    """
    was, now = (resolve(Recipe(stages), NET, samples=320) for stages in (old, new))
    common = set(places(now))
    for place in places(was):
        same = place in common and so_far(was, place) == so_far(now, place)
        try:
            go_on(now, place, was)
        except RecipeError:
            assert not same, place
        else:
            assert same, place


@given(
    st.integers(1, 5 * 10**5),
    st.integers(1, 5 * 10**5),
    st.sampled_from(["epochs", "steps"]),
    st.integers(1, 100),
)
def test_a_longer_recipe(length: int, by: int, unit: str, tenths: int) -> None:
    """The last stage is longer by exactly what was said, and nothing else changes."""
    recipe = replace(TWO_STAGES, stages=[HEAD, replace(ALL, length=f"{length} {unit}")])
    longer = extended(recipe, f"{by} {unit}")
    assert Duration.parse(longer.stages[1].length) == Duration.parse(f"{length + by} {unit}")
    assert replace(longer, stages=recipe.stages) == recipe
    assert replace(longer.stages[1], length=recipe.stages[1].length) == recipe.stages[1]
    fraction = extended(replace(recipe, stages=[HEAD]), f"0.{tenths} epochs").stages[0].length
    assert Duration.parse(fraction).amount == 2 + Duration.parse(f"0.{tenths} epochs").amount


@pytest.mark.parametrize(
    ("by", "helpful"),
    [
        ("100 steps", '"100 steps" cannot be added to the "3 epochs" of the last stage'),
        ("100 steps", "write epochs"),
        ("10%", '"10%" is a share, but of what? Write epochs'),
        ("0 epochs", '"0 epochs" adds nothing'),
        ("5", "'5' has no unit; write \"5 epochs\""),
        ("5 epoches", 'did you mean "epochs"'),
        ("-1 epochs", "is negative"),
    ],
)
def test_an_extension_that_cannot_be(by: str, helpful: str) -> None:
    """What cannot be added to the last stage is refused with what to write."""
    with pytest.raises(DurationError) as caught:
        extended(TWO_STAGES, by)
    assert str(caught.value).startswith("extend: ")
    assert helpful in str(caught.value)


def test_what_an_extension_does_to_schedules() -> None:
    """Absolute lengths inside the last stage's schedule stay; shares and what is left over stretch."""
    said = warmup("4 steps") >> constant(length="10%") >> cosine()
    recipe = Recipe([Stage("2 epochs", train="*", lr=0.1, schedule=said)])
    lengths = [
        [
            segment.stop - segment.start
            for segment in resolve(r, NET, samples=320).stages[0].curves[0].segments
        ]
        for r in (recipe, extended(recipe, "2 epochs"))
    ]
    assert lengths == [[4, 2, 14], [4, 4, 32]]
    drops = replace(recipe.stages[0], schedule=step_decay(at=["10 steps"], by=0.5))
    longer = resolve(extended(replace(recipe, stages=[drops]), "3 epochs"), NET, samples=320)
    assert longer.lr("*").tolist() == [0.1] * 10 + [0.05] * 40


def test_what_never_trained_counts_too() -> None:
    """A parameter that no stage trains is part of the model all the same: without it the run cannot go on."""
    was = plan_of(Stage("2 epochs", train="head", lr=0.1))
    now = plan_of(
        Stage("2 epochs", train="head", lr=0.1),
        facts=replace(NET, parameters=tuple(p for p in NET.parameters if p.name != "stem.weight")),
    )
    with pytest.raises(RecipeError, match=r"the model has no 'stem.weight', which the run's model has"):
        go_on(now, (0, 1, 10), was)
    other = replace(NET, parameters=(P("stem.weight", (8, 4)), *NET.parameters[1:]))
    with pytest.raises(RecipeError, match=r"'stem.weight' has 32 numbers, had 24"):
        go_on(plan_of(Stage("2 epochs", train="head", lr=0.1), facts=other), (0, 1, 10), was)
