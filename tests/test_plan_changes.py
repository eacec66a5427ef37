"""Two plans side by side: what differs, in words, and their rates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lehr.plan_changes import plan_differences, rates_compared, rates_of
from lehr.planning import Plan
from lehr.recipe import Recipe, Stage
from lehr.resolving import resolve
from lehr.schedules import constant, cosine, linear, one_cycle, warmup
from lehr.selection import ModelFacts
from plans import NET, TWO_STAGES, P
from strategies import models

WAS = resolve(TWO_STAGES, NET, samples=320)
HEAD, ALL = TWO_STAGES.stages


def changed(facts: ModelFacts = NET, samples: int = 320, **said: Any) -> Plan:
    return resolve(replace(TWO_STAGES, **said), facts, samples=samples)


def stages(*index_and_keys: tuple[int, dict[str, Any]]) -> Sequence[Stage]:
    out = list(TWO_STAGES.stages)
    for index, keys in index_and_keys:
        out[index] = replace(out[index], **keys)
    return out


def without(*names: str) -> ModelFacts:
    return replace(NET, parameters=tuple(p for p in NET.parameters if p.name not in names))


@pytest.mark.parametrize(
    ("now", "lines"),
    [
        (changed(without("fc.bias")), ["the model has no 'fc.bias', which the run trained"]),
        (
            changed(replace(NET, parameters=(*NET.parameters, P("fc.scale", (3,), layer=2)))),
            ["the model has 'fc.scale', which the run's model has not"],
        ),
        (
            changed(
                replace(
                    NET, parameters=tuple(replace(p, shape=(8,)) if p.bias else p for p in NET.parameters)
                )
            ),
            ["'fc.bias' has 8 numbers, had 5"],
        ),
        (
            changed(samples=640),
            [
                "640 training samples, were 320",
                "stage 1: steps 0 to 40, were 0 to 20",
                "stage 1: 20 steps in an epoch, were 10",
                "stage 2: steps 40 to 100, were 20 to 50",
                "stage 2: 20 steps in an epoch, were 10",
            ],
        ),
        (changed(optimizer="sgd"), ["optimizer sgd, was adamw"]),
        (
            changed(optimizer={"name": "adamw", "betas": [0.9, 0.99]}),
            ["optimizer: betas [0.9, 0.99], was not set"],
        ),
        (changed(seed=7), ["seed 7, was 0"]),
        (changed(ema=0.999), ["ema 0.999, was none"]),
        (changed(clip_norm=1.0), ["clip_norm 1, was none"]),
        (changed(min_lr=1e-6), ["min_lr 1e-06, was 0"]),
        (changed(label_smoothing=0.1), ["label_smoothing 0.1, was none"]),
        (changed(monitor="valid_accuracy"), ["monitor valid_accuracy, was valid_loss"]),
        (changed(patience="3 epochs"), ["patience 3, was none"]),
        (changed(augment=["flip", "crop"]), ["augment flip, crop, was none"]),
        (
            changed(stages=stages((1, {"length": "4 epochs"}))),
            ["stage 2: steps 20 to 60, were 20 to 50"],
        ),
        (
            changed(stages=stages((1, {"batch_size": 64, "accumulate": 2, "length": "30 steps"}))),
            [
                "stage 2: 3 steps in an epoch, were 10",
                "stage 2: batch_size 64, was 32",
                "stage 2: accumulate 2, was 1",
            ],
        ),
        (changed(restore_best=True), [f"stage {n}: restore_best true, was false" for n in (1, 2)]),
        (
            changed(stages=stages((1, {"schedule": cosine()}))),
            ['stage 2: schedule cosine(), was warmup("20%") >> cosine(floor=0.01)'],
        ),
        (
            changed(stages=stages((1, {"lr": {"head": 3e-3, "backbone": 1e-4}}))),
            ["stage 2: peak rate of head 0.003, was 0.001"],
        ),
        (
            changed(stages=stages((1, {"lr": {"head": 1e-3 + 1e-12, "backbone": 1e-4}}))),
            ["stage 2: peak rate of head 0.001000000001, was 0.001"],
        ),
        (
            changed(stages=stages((1, {"weight_decay": 0.1}))),
            ["stage 2: weight decay of backbone, head 0.1, was 0.05"],
        ),
        (
            changed(stages=stages((1, {"train": ["head", "body"], "lr": {"head": 1e-3, "body": 1e-4}}))),
            ["stage 2: 'stem.weight', 'bn.weight', 'bn.bias' frozen, was trained"],
        ),
        (
            changed(stages=stages((0, {"train": "all"}))),
            ["stage 1: backbone trained, was frozen"],
        ),
        (
            changed(stages=[HEAD, ALL, Stage("1 epoch", train="head", lr=1e-4)]),
            ["3 stages, were 2", "stage 3: is new, head, steps 50 to 60"],
        ),
        (changed(stages=[HEAD]), ["1 stage, were 2"]),
    ],
)
def test_each_difference_has_its_words(now: Plan, lines: list[str]) -> None:
    """What differs is told by name, the new value first, and nothing else is told."""
    assert list(plan_differences(WAS, now)) == lines


@pytest.mark.parametrize(
    "now",
    [
        changed(replace(NET, name="another")),
        changed(replace(NET, parameters=NET.parameters[::-1])),
        changed(stages=[replace(HEAD, train="fc"), ALL]),
        changed(optimizer="AdamW"),
        changed(stages=stages((0, {"length": "20 steps"}))),
        changed(stages=stages((1, {"schedule": warmup("6 steps") >> cosine(0.01)}))),
    ],
    ids=["model's name", "order", "words", "case", "length in steps", "schedule in steps"],
)
def test_what_has_no_effect_is_no_difference(now: Plan) -> None:
    """Names, the order of parameters, and another way to say the same have no effect: the same run."""
    assert plan_differences(WAS, now) == ()


def test_a_plan_read_back_is_the_same_run(tmp_path: Path) -> None:
    """A plan that was saved and read back does not differ, infinite settings and lists included."""
    plan = changed(optimizer={"name": "adamw", "betas": [0.9, 0.99]}, patience="2 epochs", ema=0.9)
    for each in (plan, WAS):
        each.save(tmp_path / "plan.json")
        assert plan_differences(Plan.load(tmp_path / "plan.json"), each) == ()


def test_differences_are_bounded() -> None:
    """However much differs, a page of it is told and the rest counted; many parameters take one line."""
    wide = ModelFacts("wide", tuple(P(f"layers.{i}.weight", (2,), layer=i) for i in range(200)), layers=200)
    rates = Recipe([Stage("1 epoch", train="all", lr=0.1)] * 9, layer_decay=0.99)
    was, now = (resolve(replace(rates, layer_decay=d), wide, samples=64) for d in (0.99, 0.9))
    lines = plan_differences(was, now)
    assert len(lines) == 13
    assert lines[-1] == "and 24 more"
    assert lines[3] == "stage 1: and 196 more of its rates and decays"
    lost = plan_differences(was, resolve(rates, replace(wide, parameters=wide.parameters[:1]), samples=64))
    assert (
        lost[0]
        == "the model has no 'layers.1.weight', 'layers.2.weight', 'layers.3.weight' and 196 more, which the run trained"
    )


def test_what_a_terminal_might_act_on_is_escaped() -> None:
    """Names from a file or a model are shown with control characters escaped, and stay on their line."""
    odd = replace(
        WAS,
        monitor="a\x1b[2J\nb",
        groups={f"\x1b{g}": names for g, names in WAS.groups.items()},
        owners={f"\x1b{g}": "" for g in WAS.groups},
    )
    odd = replace(
        odd,
        stages=tuple(
            replace(
                s,
                peak_lr={f"\x1b{g}": 2 * rate for g, rate in s.peak_lr.items()},
                weight_decay={f"\x1b{g}": decay for g, decay in s.weight_decay.items()},
            )
            for s in WAS.stages
        ),
    )
    lines = plan_differences(WAS, odd)
    assert lines[0] == "monitor a\\x1b[2J\\nb, was valid_loss"
    assert all(line.isprintable() for line in (*lines, *rates_compared(WAS, odd, step=30).splitlines()))


RATES = st.sampled_from([1e-3, 1e-4, {"head": 1e-3, "backbone": 1e-4}])
STAGES = st.builds(
    Stage,
    st.sampled_from(["1 epoch", "2 epochs", "1.5 epochs", "5 steps"]),
    train=st.just("*"),
    lr=RATES,
    schedule=st.sampled_from([constant(), cosine(), linear(), warmup("20%") >> cosine(0.1)]),
    batch_size=st.sampled_from([8, 16]),
    weight_decay=st.sampled_from([0.0, 0.1]),
)
RECIPES = st.builds(
    Recipe,
    st.lists(STAGES | st.just(Stage("1 epoch", train="head", lr=1e-3)), min_size=1, max_size=3),
    seed=st.integers(0, 1),
    layer_decay=st.sampled_from([1.0, 0.5]),
    clip_norm=st.sampled_from([None, 1.0]),
)


def effect(plan: Plan) -> object:
    """All that a loop would see of a plan: each step's rate and decay of each parameter, and the settings."""
    of = {name: group for group, names in plan.groups.items() for name in names}
    steps = [
        (t.stage, t.epoch, {n: (t.lr[g], t.weight_decay[g], n in t.trainable) for n, g in of.items()})
        for t in plan
    ]
    cuts = [(s.start, s.stop, s.steps_per_epoch, s.batch_size, s.accumulate) for s in plan.stages]
    return steps, cuts, plan.parameters, plan.seed, plan.samples, plan.objectives[""].clip_norm


@settings(max_examples=60)
@given(RECIPES, RECIPES, models(), st.sampled_from([40, 41]))
def test_differences_are_told_where_the_effect_differs(
    one: Recipe, two: Recipe, facts: ModelFacts, samples: int
) -> None:
    """Two plans differ in words whenever a loop would see a difference: in any rate, decay or cut."""
    was, now = resolve(one, facts, samples=40), resolve(two, facts, samples=samples)
    if effect(was) != effect(now):
        assert plan_differences(was, now)
        assert plan_differences(now, was)
    assert plan_differences(was, was) == ()


@settings(max_examples=60)
@given(RECIPES, models(), st.randoms(use_true_random=False))
def test_a_reordered_model_is_the_same_run(recipe: Recipe, facts: ModelFacts, chance: Any) -> None:
    """The same parameters in another order are no difference, whatever the recipe and the names of groups."""
    shuffled = list(facts.parameters)
    chance.shuffle(shuffled)
    other = replace(facts, parameters=tuple(shuffled))
    assert plan_differences(resolve(recipe, facts, samples=40), resolve(recipe, other, samples=40)) == ()


def test_rates_by_parameter() -> None:
    """A parameter has the rates of its group, and 0 where no stage trains it."""
    plan = changed(stages=[HEAD])
    assert rates_of(plan, "fc.bias").tolist() == plan.lr("head").tolist()
    assert not rates_of(plan, "stem.weight").any()
    assert rates_of(plan, "stem.weight").shape == (20,)


def test_rates_of_a_longer_plan() -> None:
    """The table has the old and the new rates at telling steps, and says where they rise and why."""
    now = changed(stages=stages((1, {"length": "6 epochs"})))
    assert (
        rates_compared(WAS, now, step=50)
        == """\
  step                  head              backbone
    50         - -> 6.94e-04         - -> 6.94e-05
    57         - -> 4.73e-04         - -> 4.73e-05
    64         - -> 2.58e-04         - -> 2.58e-05
    71         - -> 9.34e-05         - -> 9.34e-06
    79         - -> 1.11e-05         - -> 1.11e-06  the last
The rate of head rises at step 50 from 1.4e-05 to 6.9e-04: the schedule is laid over the longer stage.
The rate of backbone rises at step 50 from 1.4e-06 to 6.9e-05: the schedule is laid over the longer stage."""
    )


def test_rates_where_the_old_plan_goes_on() -> None:
    """Before the old plan's end both rates are there; its last step has a row; a rate that falls makes no
    line.
    """
    now = changed(stages=stages((1, {"length": "6 epochs", "lr": {"head": 1e-4, "backbone": 1e-4}})))
    table = rates_compared(WAS, now, step=40)
    assert "\n    49  1.42e-06 -> 7.24e-05  1.42e-05 -> 7.24e-05  the old plan's last\n" in table
    assert "The rate of head" not in table
    assert "The rate of backbone rises at step 40 from" in table


def test_a_new_stage_is_named_as_the_reason() -> None:
    """A rate that rises since another stage begins is said to do so; one that the recipe sets, too."""
    more = changed(stages=[HEAD, ALL, Stage("1 epoch", train="head", lr=1e-3, schedule=constant())])
    assert "rises at step 50 from 1.4e-05 to 1.0e-03: stage 3 begins." in rates_compared(WAS, more, step=50)
    higher = changed(stages=stages((1, {"lr": {"head": 1e-2, "backbone": 1e-4}})))
    assert "from 9.8e-04 to 9.8e-03: the new plan says so." in rates_compared(WAS, higher, step=28)


def test_a_shorter_plan_and_one_that_is_over() -> None:
    """Past the new plan's end its rates are a dash; where nothing is left, a sentence says so."""
    now = changed(stages=stages((1, {"length": "2 epochs"})))
    assert rates_compared(WAS, now, step=30).splitlines()[-1].endswith("the old plan's last")
    assert "1.42e-05 -> -" in rates_compared(WAS, now, step=30)
    assert rates_compared(WAS, now, step=40) == (
        "Nothing is left to train: 40 steps are done, and the plan has 40."
    )


def test_many_groups_are_bounded() -> None:
    """With a rate for each layer the highest rates are shown, and the others counted."""
    facts = ModelFacts(
        "deep", tuple(P(f"l.{i}.weight", (2,), layer=i) for i in range(9)), head=("l.8",), layers=9
    )
    recipe = Recipe([Stage("3 epochs", train="all", lr=0.1)], layer_decay=0.5, schedule=one_cycle())
    was = resolve(recipe, facts, samples=320)
    now = resolve(replace(recipe, stages=[replace(recipe.stages[0], length="9 epochs")]), facts, samples=320)
    table = rates_compared(was, now, step=25)
    assert table.splitlines()[0].split() == ["step", "head", "backbone/7", "backbone/6"]
    assert "and 6 more, whose lower rates are not shown" in table
    assert table.count("rises") == 3
    assert table.endswith("and 6 more, whose rates rise there")
    assert max(map(len, table.splitlines())) < 110


@settings(max_examples=40)
@given(RECIPES, RECIPES, models(), st.data())
def test_any_two_plans_can_be_compared(
    one: Recipe, two: Recipe, facts: ModelFacts, data: st.DataObject
) -> None:
    """A table is made of any two plans from any step on; a plan beside itself rises nowhere."""
    was, now = resolve(one, facts, samples=40), resolve(two, facts, samples=40)
    step = data.draw(st.integers(0, now.total_steps))
    assert len(rates_compared(was, now, step=step).splitlines()) <= 13
    assert "rises" not in rates_compared(was, was, step=min(step, was.total_steps))
