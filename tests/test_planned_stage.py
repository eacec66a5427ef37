"""Stages in numbers: turns, rounds, counters, and plans with decisions."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lehr import plan_json
from lehr.errors import RecipeError
from lehr.planned_stage import Decision, PlannedStage
from lehr.planning import Plan
from lehr.recipe import Objective, Recipe, Stage
from lehr.resolving import resolve
from lehr.schedules import constant, cosine, linear, step_decay, warmup
from plans import NET

TURNS = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3)), min_size=1, max_size=3)


def taking_turns(turns: list[tuple[int, int]], samples: int, length: str = "3 epochs") -> Plan:
    """A plan over batches of 10 whose objectives a, b, ... are `turns`: (every, repeat)."""
    names = ("head", "stem", "body")
    objectives = [
        Objective("abc"[i], train=names[i], lr=0.1 * (i + 1), every=every, repeat=repeat, schedule=linear())
        for i, (every, repeat) in enumerate(turns)
    ]
    return resolve(Recipe([Stage(length, objectives=objectives, batch_size=10)]), NET, samples=samples)


def by_hand(turns: list[tuple[int, int]], rounds: int) -> list[tuple[int, int]]:
    """(whose turn, in which round) of each step of an epoch, by the two loops that it stands for."""
    return [
        (turn, number)
        for number in range(rounds)
        for turn, (every, repeat) in enumerate(turns)
        if number % every == 0
        for _ in range(repeat)
    ]


@given(TURNS, st.integers(1, 12))
def test_turns_are_two_loops(turns: list[tuple[int, int]], rounds: int) -> None:
    """Whose turn each step is, in which round, and where a round ends: as two nested loops have it."""
    plan = taking_turns(turns, 10 * rounds)
    (stage,) = plan.stages
    expected = by_hand(turns, rounds)
    assert stage.steps_per_epoch == len(expected)
    for step in plan:
        position = step.index % len(expected)
        turn, number = expected[position]
        assert (stage.turn_at(step.index), stage.round_of(step.index)) == (turn, number)
        assert step.objective == "abc"[turn]
        last = position + 1 == len(expected) or expected[position + 1][1] != number
        assert stage.ends_round(step.index) == (last or step.index + 1 == plan.total_steps)
        assert stage.first_of_round(number) == next(k for k, (_, n) in enumerate(expected) if n == number)


@given(TURNS, st.integers(1, 9))
def test_each_objective_counts_its_own_updates(turns: list[tuple[int, int]], rounds: int) -> None:
    """The rate of an objective follows its schedule over its own updates, is 0 in the turns of the others, and its
    counter is none of theirs.
    """
    plan = taking_turns(turns, 10 * rounds)
    (stage,) = plan.stages
    counts = dict.fromkeys(plan.objectives, 0)
    totals = {name: sum(step.objective == name for step in plan) for name in plan.objectives}
    for step in plan:
        name = step.objective
        assert stage.own_index(step.index) == counts[name]
        peak = 0.1 * ("abc".index(name) + 1)
        assert list(step.lr.values()) == pytest.approx(
            [peak * (1 - counts[name] / totals[name])] * len(step.lr)
        )
        assert set(step.lr) == set(plan.groups_of(name))
        assert all(plan.lr(group)[step.index] == 0 for group in plan.groups if group not in step.lr)
        counts[name] += 1
        index = [turn.objective for turn in stage.turns].index(name)
        assert stage.own_updates(index, step.index + 1) == counts[name]


@given(TURNS, st.integers(1, 9), st.data())
def test_a_step_depends_on_its_number_alone(turns: list[tuple[int, int]], rounds: int, data: Any) -> None:
    """`plan[t]` is what iteration gives, whichever t is asked for, and every trainable set is its objective's own."""
    plan = taking_turns(turns, 10 * rounds)
    steps = list(plan)
    t = data.draw(st.integers(0, len(steps) - 1))
    assert plan[t] == steps[t]
    assert plan[t].trainable == {name for group in plan[t].lr for name in plan.groups[group]}


def test_an_objective_that_never_has_its_turn_is_refused() -> None:
    """A stage that is over before an objective's first turn is refused with the objective's place."""
    with pytest.raises(
        RecipeError, match=r"stages\.0\.objectives\.1\.every: 'b' never has its turn in 1 steps"
    ):
        taking_turns([(1, 1), (1, 1)], 100, length="1 step")


WAITING = Recipe(
    [
        Stage(
            "5 epochs", train="head", lr=0.01, until="train_error < 0.8", every="5 steps", schedule=constant()
        ),
        Stage("2 epochs", train="all", lr=0.1, schedule=warmup("4 steps") >> cosine()),
    ],
    batch_size=32,
)


@given(st.integers(1, 50))
def test_a_decision_changes_nothing_before_it(step: int) -> None:
    """A plan with a decision is the same before it, to the bit, and goes on with the next stage from its start."""
    plan = resolve(WAITING, NET, samples=320)
    after = plan.decided(Decision(0, step, "end", 0.5))
    assert [after[t] for t in range(step)] == [plan[t] for t in range(step)]
    moved = [plan[50 + t] for t in range(20)]
    found = [after[step + t] for t in range(20)]
    assert [dict(one.lr) for one in found] == [dict(one.lr) for one in moved]
    assert [one.trainable for one in found] == [one.trainable for one in moved]
    epochs = -(-step // 10)
    assert [one.epoch for one in found] == [one.epoch - 5 + epochs for one in moved]
    assert (after.total_steps, after.total_epochs) == (step + 20, epochs + 2)


def test_decisions_are_an_input_of_the_plan(tmp_path: Any) -> None:
    """A plan with decisions is a value: it saves and loads, and its hash is another; the same ones in the same order
    give the same plan.
    """
    plan = resolve(WAITING, NET, samples=320)
    decision = Decision(0, 35, "end", 0.79)
    after = plan.decided(decision)
    assert after == plan.decided(decision) != plan
    assert after.hash != plan.hash
    after.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == after
    assert list(Plan.load(tmp_path / "plan.json")) == list(after)
    assert "decided: stage 1 ended after step 35, at 0.79" in str(after)
    assert "70 steps at the most; " in str(plan)
    assert "55 steps; " in str(after)  # nothing is open any more


@pytest.mark.parametrize("bad", [(0, 0), (0, 51), (1, 50), (2, 60), (-1, 5)])
def test_a_place_that_is_none_is_refused(bad: tuple[int, int]) -> None:
    """A decision at a step that its stage does not have is refused."""
    with pytest.raises(RecipeError, match="no such place"):
        resolve(WAITING, NET, samples=320).decided(Decision(*bad, "end", 0.5))


def test_cooling() -> None:
    """From the step of each reduction on, the rates are the factor lower, on top of the schedule and above min_lr."""
    stage = Stage(
        "4 epochs", train="all", lr=0.1, until="valid_loss plateaus 1 epoch", reduce=0.5, schedule=linear(0.5)
    )
    plan = resolve(Recipe([stage], batch_size=32, min_lr=0.01), NET, samples=320)
    cooled = plan.decided(Decision(0, 20, "reduce", 1.0)).decided(Decision(0, 30, "reduce", 1.0))
    factors = (plan.lr("all") - 0.01) / 0.09
    expected = 0.01 + 0.09 * factors * np.repeat([1.0, 0.5, 0.25], [20, 10, 10])
    np.testing.assert_allclose(cooled.lr("all"), expected, rtol=1e-12)
    assert cooled.total_steps == plan.total_steps


def on_the_runs_clock(gate: int) -> PlannedStage:
    recipe = Recipe(
        [
            Stage("50 steps", train="all", lr=0.01, until="train_error < 0.8", schedule=constant()),
            Stage("200 steps", train="all", lr=0.1, clock="run", schedule=step_decay(at=["100 steps", "150 steps"])),
            Stage("1 epoch", train="head", lr=0.1),
        ],
        batch_size=32,
    )  # fmt: skip
    plan = resolve(recipe, NET, samples=320).decided(Decision(0, gate, "end", 0.7))
    rates = plan.lr("head") if "head" in plan.groups else plan.lr(next(iter(plan.groups)))
    expected = [0.01] * gate + [0.1] * (100 - gate) + [0.01] * 50 + [0.001] * 50
    assert rates[:200].tolist() == pytest.approx(expected)
    return plan.stages[2]


@pytest.mark.parametrize("gate", [1, 20, 50])
def test_the_runs_clock(gate: int) -> None:
    """With clock = "run" a stage's length and schedule are counted from the run's first step, wherever it begins."""
    after = on_the_runs_clock(gate)
    assert (after.start, after.stop) == (200, 210)


def test_the_runs_clock_may_have_run_out() -> None:
    """A stage on the run's clock that would end before it begins is refused with the step."""
    stages = [Stage("50 steps", train="all", lr=0.1), Stage("40 steps", train="all", lr=0.1, clock="run")]
    with pytest.raises(RecipeError, match=r"stages\.1\.length: .*ends at step 40, .*last until step 50"):
        resolve(Recipe(stages), NET, samples=320)


def test_a_check_that_never_comes_is_refused() -> None:
    """A condition that would be checked only after the stage is over is refused."""
    stage = Stage("5 steps", train="all", lr=0.1, until="train_error < 0.8", every="6 steps")
    with pytest.raises(RecipeError, match=r"stages\.0\.every: 6 steps, and the stage has 5 at the most"):
        resolve(Recipe([stage]), NET, samples=320)


def test_one_name_is_one_optimizer() -> None:
    """An objective that stands in two stages with two optimizers is refused; with one it is the same one."""
    one, two = Objective("d", train="head", lr=0.1), Objective("d", train="head", lr=0.1, optimizer="sgd")
    stages = [Stage("1 epoch", objectives=[one]), Stage("1 epoch", objectives=[two])]
    with pytest.raises(RecipeError, match=r"stages\.1\.objectives\.0\.optimizer: 'd' has another optimizer"):
        resolve(Recipe(stages), NET, samples=320)
    same = [stages[0], replace(stages[0], length="2 epochs")]
    plan = resolve(Recipe(same), NET, samples=320)
    assert list(plan.objectives) == ["d"]
    assert list(plan.groups) == ["d/head"]


def test_the_page_says_who_takes_which_turn() -> None:
    """The plan's page has each objective's schedule in its own updates, and how many it makes an epoch."""
    page = str(taking_turns([(1, 2), (2, 1)], 100))
    assert "a: linear()\n     = linear 60 updates; on each batch, 2 times: 20 updates of the 25 steps" in page
    assert "b: linear()\n     = linear 15 updates; on one batch in 2: 5 updates of the 25 steps" in page


def test_until_metrics_of_objectives_have_a_name() -> None:
    """In a stage with objectives a metric of the training says whose it is."""
    objectives = [Objective("d", train="head", lr=0.1), Objective("g", train="body", lr=0.1)]
    stage = Stage("1 epoch", objectives=objectives, until="train_error < 0.5")
    with pytest.raises(
        RecipeError, match=r"stages\.0\.until: 'train_error' is of no objective; .*train_d_loss"
    ):
        resolve(Recipe([stage]), NET, samples=320)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s["turns"][0].update(repeat=2**30), "steps in an epoch, and its turns make"),
        (lambda s: s.update(rounds_per_epoch=2**30, steps_per_epoch=2**30), "steps in an epoch that objectives share"),
        (lambda s: s["turns"][0].update(objective=""), "an objective that the plan does not have"),
        (lambda s: s["turns"][0].update(objective="x"), "an objective that the plan does not have"),
        (lambda s: s.update(turns=s["turns"] * 100), "turns"),
        (lambda s: s.update(until="x"), "no condition"),
        (lambda s: s.update(cooled=[-1]), "cooled"),
        (lambda s: s.update(cooled=[7, 5], reductions=9), "cooled: not rising"),
        (lambda s: s.update(cooled=[5, 7], reductions=1), "cooled: not rising within the stage, or more often"),
    ],
)  # fmt: skip
def test_a_file_with_turns_that_cannot_be_is_refused(change: Any, said: str, tmp_path: Any) -> None:
    """A plan's file whose hash is right, and whose turns would take any amount of memory or mean nothing, is refused."""
    plan = taking_turns([(1, 1)], 100)
    plain = json.loads(json.dumps(plan.to_dict()).replace("Infinity", '"inf"'))
    change(plain["stages"][0])
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"format": plan_json.FORMAT, "hash": plan_json.content_hash(plain), **plain}))
    with pytest.raises(RecipeError, match=said):
        Plan.load(path)


def test_a_turn_without_a_name_has_no_company(tmp_path: Any) -> None:
    """An ordinary stage of a plan's file whose one turn would repeat itself is refused."""
    plain = json.loads(json.dumps(resolve(WAITING, NET, samples=320).to_dict()).replace("Infinity", '"inf"'))
    stage = plain["stages"][0]
    stage["turns"][0]["repeat"], stage["steps_per_epoch"] = 2, 2 * stage["steps_per_epoch"]
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"format": plan_json.FORMAT, "hash": plan_json.content_hash(plain), **plain}))
    with pytest.raises(RecipeError, match="one without a name is the only one"):
        Plan.load(path)


def test_a_file_with_a_decision_at_no_step_is_refused(tmp_path: Any) -> None:
    """A decision of a stage that a plan's file does not have, or outside of it, is refused when it is read."""
    plain = json.loads(json.dumps(resolve(WAITING, NET, samples=320).to_dict()).replace("Infinity", '"inf"'))
    for stage, step in ((99, 5), (0, 0), (0, 51)):
        plain["decisions"] = [{"stage": stage, "step": step, "kind": "end", "value": 0.5}]
        path = tmp_path / "plan.json"
        path.write_text(
            json.dumps({"format": plan_json.FORMAT, "hash": plan_json.content_hash(plain), **plain})
        )
        with pytest.raises(RecipeError, match=r"decisions\.0: at no step of its stage"):
            Plan.load(path)


def test_rounds_that_are_nobodys_take_no_memory() -> None:
    """The turns of an epoch take memory for the updates that there are, however many rounds are nobody's."""
    (stage,) = taking_turns([(1, 1)], 100).stages
    rare = replace(stage.turns[0], every=2**31 - 1)
    huge = replace(
        stage, rounds_per_epoch=2**31 - 1, steps_per_epoch=1, turns=(rare, rare), start=0, stop=1, span=1
    )
    assert huge.turn_at(0) == 0


def test_the_runs_clock_knows_no_epochs_of_a_stage() -> None:
    """A schedule that holds through epochs is refused on the run's clock, where these may begin anywhere; a check may be as
    far apart as the stage is long where the one before ends at once.
    """
    first = Stage("50 steps", train="all", lr=0.1, until="train_error < 0.8")
    second = Stage("60 steps", train="all", lr=0.1, clock="run", until="train_error < 0.1", every="40 steps")
    assert resolve(Recipe([first, second]), NET, samples=320).stages[1].every == 40
    with pytest.raises(
        RecipeError, match=r"stages\.1\.schedule: cosine\(per=\"epoch\"\) holds through epochs"
    ):
        resolve(Recipe([first, replace(second, schedule=cosine(per="epoch"))]), NET, samples=320)
