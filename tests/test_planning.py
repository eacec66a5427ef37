"""Plans: every number of a step by hand, purity in the step, lengths, batches, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lehr.errors import RecipeError, RequestError, ScheduleError, SelectionError
from lehr.planning import Plan, batches_in
from lehr.recipe import Recipe, Stage
from lehr.resolving import resolve
from lehr.schedules import constant, cosine, hold, linear, one_cycle, restarts
from lehr.selection import ModelFacts, ParameterFacts
from plans import NET, TWO_STAGES, plan_of
from strategies import joins, models

# ---------------------------------------------------------------- steps


def test_a_step_by_hand() -> None:
    """Index, stage, epoch, trainable names, rates and decay of a step are what the recipe says."""
    plan = resolve(TWO_STAGES, NET, samples=320)
    assert plan.total_steps == len(plan) == 50
    assert plan.total_epochs == 5
    first, seam, thawed = plan[0], plan[4], plan[20]
    assert (first.index, first.stage, first.epoch) == (0, 0, 0)
    assert first.trainable == {"fc.weight", "fc.bias"}
    assert first.lr == {
        "head": 1e-3 / 5,
        "head/no_decay": 1e-3 / 5,
        "backbone": 0.0,
        "backbone/no_decay": 0.0,
    }
    assert first.weight_decay == {
        "head": 0.05,
        "head/no_decay": 0.0,
        "backbone": 0.0,
        "backbone/no_decay": 0.0,
    }
    assert seam.lr["head"] == 1e-3
    assert (thawed.index, thawed.stage, thawed.epoch) == (20, 1, 2)
    assert thawed.trainable == {p.name for p in NET.parameters}
    assert thawed.lr["backbone"] == pytest.approx(1e-4 / 7, rel=1e-12)
    assert thawed.weight_decay["backbone"] == 0.05
    assert plan.groups == {
        "backbone": ("stem.weight", "body.weight"),
        "backbone/no_decay": ("bn.weight", "bn.bias", "body.bias"),
        "head": ("fc.weight",),
        "head/no_decay": ("fc.bias",),
    }


def test_a_step_cannot_be_changed() -> None:
    """A step's tables are read-only: a loop cannot change the plan that it follows."""
    step = plan_of()[3]
    with pytest.raises(TypeError):
        step.lr["all"] = 1.0  # type: ignore[index]
    with pytest.raises(TypeError):
        step.weight_decay["all"] = 1.0  # type: ignore[index]


@settings(max_examples=30)
@given(
    models(),
    joins(),
    st.integers(1, 200),
    st.integers(1, 40),
    st.integers(1, 4),
    st.floats(0.0, 3e-6),  # below the least peak, 0.05 * 0.3**8
    st.floats(0.3, 1.0),
    st.randoms(use_true_random=False),
)
def test_any_plan(
    facts: ModelFacts,
    schedule: Any,
    samples: int,
    batch_size: int,
    accumulate: int,
    min_lr: float,
    layer_decay: float,
    random: Any,
) -> None:
    """Any order of asking gives the step that iteration gives; groups are disjoint and total; every rate is
    the formula's.
    """
    recipe = Recipe(
        [
            Stage("1.5 epochs", train="head", lr=0.1, weight_decay=0.3),
            Stage(
                "7 steps",
                train=["all", "head"],
                lr={"head": 0.01, "backbone": 0.02},
                schedule=cosine(0.1),
                layer_decay=1,
            ),
            Stage("2 epochs", train="*", lr=0.05, batch_size=3),
        ],
        schedule=schedule,
        batch_size=batch_size,
        accumulate=accumulate,
        min_lr=min_lr,
        layer_decay=layer_decay,
        weight_decay=0.1,
    )
    if all(p.frozen_by_hand or p.name.startswith("head") for p in facts.parameters):
        return  # then "backbone" has nothing to train in the second stage, which is refused (tested below)
    plan = resolve(recipe, facts, samples=samples)
    steps = list(plan)
    assert [step.index for step in steps] == list(range(plan.total_steps))
    order = random.sample(range(plan.total_steps), min(20, plan.total_steps))
    fresh = resolve(recipe, facts, samples=samples)
    assert [fresh[t] for t in order] == [steps[t] for t in order]
    members = [name for names in plan.groups.values() for name in names]
    assert len(members) == len(set(members))
    assert (
        set(members) == set().union(*(step.trainable for step in steps)) == {p.name for p in facts.parameters}
    )
    group_of = {name: group for group, names in plan.groups.items() for name in names}
    rates = {group: plan.lr(group) for group in plan.groups}
    for p in facts.parameters:
        for t in order:
            step, stage = steps[t], plan.stages[steps[t].stage]
            assert rates[group_of[p.name]][t] == step.lr[group_of[p.name]]
            expected = 0.0
            if p.name in step.trainable:
                head = p.name.startswith("head")
                peak = [0.1, 0.01 if head else 0.02, 0.05][step.stage]
                if step.stage != 1:
                    peak = peak * layer_decay ** (facts.layers - 1 - p.layer)
                said = cosine(0.1) if step.stage == 1 else schedule
                factor = said.over(steps=stage.steps, steps_per_epoch=stage.steps_per_epoch)(t - stage.start)
                expected = min_lr + (peak - min_lr) * factor
            assert step.lr[group_of[p.name]] == expected
            if p.name in step.trainable:
                decays = 0.0 if p.norm or p.bias else [0.3, 0.1, 0.1][step.stage]
                assert step.weight_decay[group_of[p.name]] == decays
    assert plan == Plan.from_dict(json.loads(json.dumps(plan.to_dict()), parse_constant=float))


def test_lr_is_an_array_over_the_run() -> None:
    """lr(group) has one float64 for each step; where the group is frozen it is 0."""
    plan = resolve(TWO_STAGES, NET, samples=320)
    rates = plan.lr("backbone")
    assert rates.dtype == np.float64
    assert rates.shape == (50,)
    assert not rates[:20].any()
    curve = TWO_STAGES.schedule.over(steps=30)
    assert np.array_equal(rates[20:], 1e-4 * curve(np.arange(30)))
    assert rates.tolist() == [step.lr["backbone"] for step in plan]


def test_no_such_group() -> None:
    """Asking for a group that is not there names the nearest and all that are."""
    with pytest.raises(
        SelectionError,
        match=r"no group 'backbon'; did you mean \"backbone\".*Groups: backbone, backbone/no_decay, head",
    ):
        resolve(TWO_STAGES, NET, samples=320).lr("backbon")


@pytest.mark.parametrize("index", [-1, 20, 10**9, 1.0, True, "3", None, slice(0, 2)])
def test_index_errors(index: Any) -> None:
    """Only the steps 0 to N - 1 are steps; nothing counts from the end."""
    with pytest.raises(IndexError, match=r"the plan has the steps 0 to 19"):
        plan_of()[index]
    assert plan_of()[np.int64(3)] == plan_of()[3]


# ---------------------------------------------------------------- lengths


@pytest.mark.parametrize(
    ("samples", "batch_size", "batches"),
    [
        (100, 32, 4),
        (96, 32, 3),
        (97, 32, 3),
        (98, 32, 4),
        (1, 32, 1),
        (2, 32, 1),
        (33, 32, 1),
        (34, 32, 2),
        (5, 1, 5),
        (1, 1, 1),
    ],
)
def test_batches(samples: int, batch_size: int, batches: int) -> None:
    """All samples are used; the last batch may be short, but a lone last sample joins the batch before it."""
    assert batches_in(samples, batch_size) == batches


@given(st.integers(1, 10**6), st.integers(1, 4096))
def test_batches_hold_every_sample(samples: int, batch_size: int) -> None:
    """No batch is larger than one sample more than asked for, and none holds a single sample where more are
    wanted.
    """
    batches = batches_in(samples, batch_size)
    last = samples - (batches - 1) * batch_size
    assert 1 <= last <= batch_size + 1
    if batch_size > 1 and samples > 1:
        assert last > 1


def test_epochs_and_steps() -> None:
    """A stage begins a new epoch; half an epoch is half its steps; a stage in steps may end within an
    epoch.
    """
    plan = resolve(
        Recipe(
            [
                Stage("1.5 epochs", train="head", lr=1),
                Stage("25 steps", train="head", lr=1),
                Stage("1 epoch", train="head", lr=1),
            ]
        ),
        NET,
        samples=320,
    )
    assert [(s.start, s.stop, s.first_epoch, s.epochs) for s in plan.stages] == [
        (0, 15, 0, 2),
        (15, 40, 2, 3),
        (40, 50, 5, 1),
    ]
    assert [step.epoch for step in plan] == [0] * 10 + [1] * 5 + [2] * 10 + [3] * 10 + [4] * 5 + [5] * 10
    assert list(plan.stages[0].epoch_ranges()) == [(0, 0, 10), (1, 10, 15)]
    assert plan.total_epochs == 6


def test_accumulation_counts_its_short_last_window() -> None:
    """With accumulation a step is several batches, and the short last window of an epoch is a step too."""
    plan = plan_of(accumulate=3)
    assert (plan.stages[0].steps_per_epoch, plan.total_steps) == (4, 8)
    assert (
        plan_of(Stage("2 epochs", train="all", lr=0.1, accumulate=10), accumulate=3).stages[0].steps_per_epoch
        == 1
    )


def test_a_loader_decides_its_batches() -> None:
    """Where a data loader has decided the batches of an epoch, they are taken as they are."""
    assert plan_of(batches=7).stages[0].steps_per_epoch == 7
    assert plan_of(batches=7, accumulate=2).stages[0].steps_per_epoch == 4


def test_batch_size_by_stage() -> None:
    """A stage's own batch size gives its own steps in an epoch; its rates stay as written, and a note says
    so.
    """
    plan = resolve(
        Recipe(
            [Stage("1 epoch", train="head", lr=0.1, batch_size=64), Stage("1 epoch", train="head", lr=0.1)],
            schedule=constant(),
        ),
        NET,
        samples=320,
    )
    assert [stage.steps for stage in plan.stages] == [5, 10]
    assert plan.lr("head").tolist() == [0.1] * 15
    assert (
        'stage 1 has 2 times the samples a step; its rates are as written; lr_rule = "linear" would '
        "multiply them by it" in plan.notes
    )


def test_the_linear_rule() -> None:
    """With lr_rule = "linear" a stage with k times the samples a step gets k times the rate, accumulation
    counted, and a note.
    """
    plan = resolve(
        Recipe(
            [
                Stage("1 epoch", train="head", lr=0.1, batch_size=64, accumulate=2),
                Stage("1 epoch", train="head", lr=0.1),
            ],
            schedule=constant(),
            lr_rule="linear",
        ),
        NET,
        samples=320,
    )
    assert [stage.peak_lr["head"] for stage in plan.stages] == [0.4, 0.1]
    assert "stage 1 has 4 times the samples a step; its rates are multiplied by it" in plan.notes


# ---------------------------------------------------------------- min_lr and notes


def test_min_lr() -> None:
    """An absolute min_lr is where each group's rate ends, whatever its peak: min_lr + (peak - min_lr) *
    factor.
    """
    recipe = Recipe(
        [Stage("2 epochs", train="all", lr={"head": 0.1, "backbone": 0.01})], min_lr=1e-3, schedule=linear()
    )
    plan = resolve(recipe, NET, samples=320)
    assert plan.lr("head")[10] == pytest.approx(1e-3 + 0.099 * 0.5, rel=1e-12)
    assert plan.lr("backbone")[19] == pytest.approx(1e-3 + 0.009 * 0.05, rel=1e-12)
    assert plan.lr("head")[0] == 0.1


def test_min_lr_above_a_peak() -> None:
    """A min_lr above some group's peak is refused with both numbers; one equal to it is not."""
    with pytest.raises(
        RecipeError,
        match=r"min_lr: 0\.2 lies above the peak rate 0\.1 of 'stem.weight' in stages\.0; lower min_lr, "
        r"raise",
    ):
        plan_of(min_lr=0.2)
    assert set(plan_of(min_lr=0.1).lr("all").tolist()) == {0.1}


def test_notes() -> None:
    """The plan says what was understood, what no stage trains, where a lone sample goes, and where a stage
    is shorter than an epoch.
    """
    plan = plan_of(Stage("3 steps", train="head", lr=1), samples=321)
    assert plan.notes == (
        "head: fc, the last linear layer",
        "tied: fc.weight is also embed.weight",
        "no stage trains stem.weight, bn.weight, bn.bias and 2 more (112 scalars)",
        "stage 1: the last of 321 samples joins the batch before it (a batch of one has no statistics)",
        "stage 1 ends after 3 of the 10 steps of an epoch",
    )
    assert not any("joins" in note for note in plan_of(samples=321, batches=11).notes)


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("make", "error", "helpful"),
    [
        (lambda: plan_of(samples=0), RecipeError, "samples=0; a plan needs at least one training sample"),
        (lambda: plan_of(samples=2.5), RecipeError, "samples=2.5; "),
        (lambda: plan_of(samples=True), RecipeError, "samples=True; "),
        (
            lambda: plan_of(batches=0),
            RecipeError,
            "batches=0; an epoch needs at least one batch: expected a whole number, 1 or more",
        ),
        (lambda: plan_of(batches=-3), RecipeError, "batches=-3; "),
        (lambda: plan_of(batches=7.0), RecipeError, "batches=7.0; "),
        (
            lambda: plan_of(schedule=restarts("4 steps", grow=2, shape=one_cycle("5 steps"))),
            ScheduleError,
            'stages.0 (all, 20 steps): one_cycle: up="5 steps" is longer than the 4 it is part of',
        ),
        (
            lambda: plan_of(Stage("1 epoch", train="haed", lr=1)),
            SelectionError,
            "stages.0.train: 'haed' matches no parameter of Net; did you mean \"head\"?",
        ),
        (
            lambda: plan_of(Stage("1 epoch", train="all", lr={"head": 1})),
            SelectionError,
            "stages.0.lr: 'stem.weight' and 4 more would be trained but has no rate",
        ),
        (
            lambda: plan_of(Stage("1 epoch", train="all", lr={"head": 1, "*": 2})),
            SelectionError,
            "is in both 'head' and '*'",
        ),
        (
            lambda: plan_of(Stage("1 epoch", train="head", lr={"head": 1, "backbone": 2})),
            SelectionError,
            "stages.0.lr: 'backbone' names nothing that this stage trains",
        ),
        (
            lambda: plan_of(Stage("1 epoch", train="all", lr=1, schedule=hold("11 steps") >> cosine())),
            ScheduleError,
            'stages.0 (all, 10 steps): hold("11 steps") >> cosine(): its parts take 11 steps, but there are '
            "only 10",
        ),
        (
            lambda: plan_of(
                facts=replace(NET, parameters=tuple(replace(p, frozen_by_hand=True) for p in NET.parameters))
            ),
            SelectionError,
            "stages.0.train: 'all' leaves out what was frozen by hand, and all of Net was",
        ),
    ],
)
def test_refused(make: Callable[[], Plan], error: type[RequestError], helpful: str) -> None:
    """What cannot be planned is refused with the stage, the key, and the way to mend it."""
    with pytest.raises(error) as caught:
        make()
    assert helpful in str(caught.value)


def test_a_role_that_hides_a_module() -> None:
    """Where the model has a module that is called like a role and is not the whole of it, the plan says what was meant."""
    norms = (ParameterFacts(name, (4,), norm=True) for name in ("body.1.weight", "norm.weight"))
    facts = ModelFacts("net", (*norms, ParameterFacts("head.weight", (2, 4))), head=("head",))

    def notes(*train: str) -> list[str]:
        recipe = Recipe([Stage("1 epoch", train=list(train), lr=1)])
        return [note for note in resolve(recipe, facts, samples=64).notes if "in that role" in note]

    assert notes("head", "norm") == [
        '"norm" is every parameter in that role, not only the module of this name, which is "norm.*"'
    ]
    assert notes("all", "!norm") == notes("head", "norm")
    assert not notes("head", "norm.*")
