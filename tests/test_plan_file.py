"""A plan as a value that travels: its hash, its file, its page."""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lehr.errors import RecipeError
from lehr.plan_json import content_hash
from lehr.planning import Plan, Step
from lehr.recipe import Recipe, Stage
from lehr.resolving import resolve
from lehr.schedules import constant, cosine, warmup
from plans import NET, TWO_STAGES, plan_of

GOLDEN = Path(__file__).parent / "golden" / "plan.txt"

# ---------------------------------------------------------------- hash and file

CHANGES: list[Callable[[Recipe], Recipe]] = [
    lambda r: replace(r, seed=1),
    lambda r: replace(r, batch_size=31),
    lambda r: replace(r, batch_size=16, accumulate=2),
    lambda r: replace(r, weight_decay=0.06),
    lambda r: replace(r, no_decay=["norm"]),
    lambda r: replace(r, layer_decay=0.9),
    lambda r: replace(r, min_lr=1e-9),
    lambda r: replace(r, clip_norm=1.0),
    lambda r: replace(r, ema=0.9),
    lambda r: replace(r, label_smoothing=0.1),
    lambda r: replace(r, monitor="valid_accuracy"),
    lambda r: replace(r, patience="2 epochs"),
    lambda r: replace(r, restore_best=True),
    lambda r: replace(r, optimizer="sgd"),
    lambda r: replace(r, optimizer={"name": "adamw", "eps": 1e-7}),
    lambda r: replace(r, schedule=warmup("20%") >> cosine(floor=0.02)),
    lambda r: replace(r, stages=r.stages[:1]),
    lambda r: replace(r, stages=[replace(r.stages[0], lr=1.1e-3), r.stages[1]]),
    lambda r: replace(r, stages=[replace(r.stages[0], length="21 steps"), r.stages[1]]),
    lambda r: replace(r, stages=[replace(r.stages[0], train="norm"), r.stages[1]]),
    lambda r: replace(r, stages=[replace(r.stages[0], schedule=constant()), r.stages[1]]),
    lambda r: replace(r, views=1),
    lambda r: replace(r, stages=[replace(r.stages[0], views=4), r.stages[1]]),
]
WITHOUT_EFFECT: list[Callable[[Recipe], Recipe]] = [
    lambda r: replace(r, cache="off"),
    lambda r: replace(r, stages=[replace(r.stages[0], cache="require"), r.stages[1]]),
    lambda r: replace(r, cache_budget="1 MiB"),
    lambda r: replace(r, cache_dtype="bf16"),
    lambda r: replace(r, cache_exact=True),
]


def test_the_hash_changes_with_everything_of_effect() -> None:
    """Each change of the recipe, the data or the model gives another hash; words that mean the same give the
    same.
    """
    base = resolve(TWO_STAGES, NET, samples=320)
    plans = [resolve(change(TWO_STAGES), NET, samples=320) for change in CHANGES]
    plans += [
        resolve(TWO_STAGES, NET, samples=319),
        resolve(TWO_STAGES, NET, samples=320, batches=11),
        resolve(replace(TWO_STAGES, augment=["flip"]), NET, samples=320),
        resolve(TWO_STAGES, replace(NET, parameters=NET.parameters[1:]), samples=320),
    ]
    hashes = [plan.hash for plan in [base, *plans]]
    assert len(set(hashes)) == len(hashes)
    assert resolve(replace(TWO_STAGES, lr_rule="linear"), NET, samples=320).hash == base.hash
    assert resolve(TWO_STAGES, replace(NET, name="Other"), samples=320).hash == base.hash
    assert resolve(TWO_STAGES, replace(NET, understood=("another sentence",)), samples=320).hash == base.hash


@pytest.mark.parametrize("change", WITHOUT_EFFECT)
def test_the_hash_does_not_see_caches(change: Callable[[Recipe], Recipe]) -> None:
    """How what stays the same is kept may change as a run goes on: the plan is another value, with the same hash."""
    base, changed = (resolve(r, NET, samples=320) for r in (TWO_STAGES, change(TWO_STAGES)))
    assert changed != base
    assert changed.hash == base.hash


def test_equal_plans_have_equal_hashes() -> None:
    """Numbers that are equal hash equally, whether they were written 2 or 2.0."""
    one, two = (
        plan_of(Stage("1 epoch", train="all", lr=lr), schedule=f"polynomial({power})")
        for lr, power in [(1, "2"), (1.0, "2.0")]
    )
    assert one == two
    assert one.hash == two.hash


SCRIPT = """
import pickle, sys
from lehr.resolving import resolve
recipe, facts = pickle.load(open(sys.argv[1], "rb"))
plan = resolve(recipe, facts, samples=320)
print(plan.hash, sorted(plan[37].trainable), dict(plan[37].lr))
"""


def test_the_same_in_every_process(tmp_path: Path) -> None:
    """Another process with another hash seed gives the same hash and the same step."""
    (tmp_path / "said.pickle").write_bytes(pickle.dumps((TWO_STAGES, NET)))
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "said.pickle")]
    said = [
        subprocess.Popen(
            command,
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("1", "4242")
    ]
    answers = [process.communicate(timeout=120)[0].strip() for process in said]
    plan = resolve(TWO_STAGES, NET, samples=320)
    assert answers == [f"{plan.hash} {sorted(plan[37].trainable)} {dict(plan[37].lr)}"] * 2


def test_golden_hash() -> None:
    """The hash of a fixed plan is what it was: a change would refuse every plan that was saved."""
    written = GOLDEN.read_text(encoding="utf-8")
    assert f"hash {resolve(TWO_STAGES, NET, samples=320).hash[:12]}" in written


def test_save_and_load(tmp_path: Path) -> None:
    """A saved plan loads as an equal plan: infinities, tables of the optimizer, notes and what caches may take included."""
    head, everything = TWO_STAGES.stages
    recipe = replace(
        TWO_STAGES,
        stages=[replace(head, views=1, cache="require"), replace(everything, views=3, cache="off")],
        optimizer={"name": "sgd", "momentum": 0.9, "betas": (0.9, 0.99)},
        monitor="inf",
        cache_budget="3 MB",
        cache_dtype="bf16",
        cache_exact=True,
    )
    plan = resolve(recipe, replace(NET, name="inf"), samples=320)
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == plan
    assert again.hash == plan.hash
    assert (again.patience, again.objectives[""].clip_norm, again.monitor, again.model) == (
        math.inf,
        math.inf,
        "inf",
        "inf",
    )
    assert list(again) == list(plan)
    again.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "plan.json").read_bytes()


def test_a_plan_can_be_copied_and_pickled() -> None:
    """A copy and a pickle of a plan are the plan, before and after it was read from."""
    plan = resolve(TWO_STAGES, NET, samples=320)
    assert pickle.loads(pickle.dumps(plan)) == plan
    assert plan[3] == copy.deepcopy(plan)[3]
    assert pickle.loads(pickle.dumps(plan))[3] == plan[3]


@pytest.mark.parametrize("copied", [lambda step: pickle.loads(pickle.dumps(step)), copy.deepcopy, copy.copy])
def test_a_step_can_be_copied_and_pickled(copied: Callable[[Step], Step]) -> None:
    """A copy and a pickle of a step are the step, and as read-only."""
    step = resolve(TWO_STAGES, NET, samples=320)[37]
    again = copied(step)
    assert again == step
    assert hash(again) == hash(step)
    with pytest.raises(TypeError):
        again.lr["head"] = 1.0  # type: ignore[index]


def test_plans_are_keys() -> None:
    """Plans, stages and steps can stand in a set: equal ones have equal hashes."""
    one, two = (resolve(TWO_STAGES, NET, samples=320) for _ in range(2))
    other = resolve(TWO_STAGES, NET, samples=319)
    assert len({one, two, other}) == 2
    assert len({*one.stages, *two.stages}) == 2
    assert len({one[3], two[3], one[4]}) == 2


def test_the_hash_does_not_see_how_a_length_was_written() -> None:
    """The same steps written as a share, as epochs or as steps are the same rates, so one hash; the page
    shows each person's words.
    """
    written = [
        f'{warmup} >> one_cycle("{up}") >> hold("{held}")'
        for warmup, up, held in [
            ('warmup("0%")', "50%", "50%"),
            ('warmup("0 steps")', "5 steps", "10 steps"),
            ('warmup("0 epochs")', "0.5 epochs", "1 epoch"),
        ]
    ]
    plans = [plan_of(schedule=text) for text in written]
    assert len({plan.hash for plan in plans}) == 1
    assert str(plans[0].stages[0].turns[0].schedule) == (
        'one_cycle(up="5 steps", length="10 steps") >> hold("10 steps")'
    )
    for plan in plans:
        assert plan.lr("all").tolist() == plans[0].lr("all").tolist()
        assert f"  1  {plan.said[0][0]}\n     = one_cycle 10 steps (0 to 10), then hold" in str(plan)
    assert plan_of(schedule='warmup("10 steps") >> cosine()').hash != plans[0].hash


def _damage(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    plain = json.loads(path.read_text(encoding="utf-8"))
    change(plain)
    path.write_text(json.dumps(plain), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "helpful"),
    [
        (
            lambda plain: plain["stages"][0]["peak_lr"].update(head=0.5),
            "does not have the hash that it says, so it was changed or damaged",
        ),
        (lambda plain: plain.update(seed=1), "does not have the hash that it says"),
        (lambda plain: plain.update(ema=math.nan), "does not have the hash that it says"),
        (lambda plain: plain.update(hash=None), "does not have the hash that it says"),
        (lambda plain: plain.pop("hash"), "does not have the hash that it says"),
        (lambda plain: plain.update(ema=math.nan, hash=None), "does not have the hash that it says"),
        (lambda plain: plain.update(format=2), "not a plan of format 3"),
        (lambda plain: plain.clear(), "not a plan of format 3"),
    ],
)
def test_a_changed_file_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], helpful: str
) -> None:
    """A plan that was changed after it was written is refused, with the path and what to do."""
    path = tmp_path / "plan.json"
    resolve(TWO_STAGES, NET, samples=320).save(path)
    _damage(path, change)
    with pytest.raises(RecipeError) as caught:
        Plan.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert helpful in str(caught.value)
    assert "make it again with `lehr plan --json`" in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "null", '"plan"', "[" * 100_000, "\ufffe"])
def test_no_plan_at_all(tmp_path: Path, text: str) -> None:
    """A file that holds no plan is refused, whatever it holds."""
    path = tmp_path / "plan.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match=r"plan\.json: not (JSON|a plan)"):
        Plan.load(path)


def test_a_cut_file_and_no_file(tmp_path: Path) -> None:
    """A file that was cut short, one that is no text, and none at all are refused with the path."""
    path = tmp_path / "plan.json"
    resolve(TWO_STAGES, NET, samples=320).save(path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(RecipeError, match="not JSON"):
        Plan.load(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match="not JSON"):
        Plan.load(path)
    with pytest.raises(RecipeError, match=r"gone\.json: cannot be read: No such file"):
        Plan.load(tmp_path / "gone.json")


def test_a_plan_with_a_right_hash_and_missing_parts(tmp_path: Path) -> None:
    """A file whose hash is right but which lacks a part of a plan is refused too."""
    path = tmp_path / "plan.json"
    path.write_text(
        json.dumps({"format": 3, "hash": content_hash({"model": "x"}), "model": "x"}), encoding="utf-8"
    )
    with pytest.raises(RecipeError, match=r"plan\.json: not a plan: .*make it again"):
        Plan.load(path)


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda plain: plain["stages"][0].update(views=0), "stages.0.views"),
        (lambda plain: plain["stages"][0].update(views=2**31), "stages.0.views"),
        (lambda plain: plain["stages"][0].update(views=True), "stages.0.views"),
        (lambda plain: plain["stages"][0].update(views="all"), "stages.0.views"),
        (lambda plain: plain["stages"][1].update(cache="on"), "stages.1.cache"),
        (lambda plain: plain["caching"].update(budget=0), "caching.budget"),
        (lambda plain: plain["caching"].update(budget=2**62 + 1), "caching.budget"),
        (lambda plain: plain["caching"].update(dtype="fp8"), "caching.dtype"),
        (lambda plain: plain["caching"].update(exact=1), "caching.exact"),
        (lambda plain: plain["caching"].pop("exact"), "caching.exact"),
        (lambda plain: plain.pop("caching"), "caching"),
    ],
)
def test_a_file_with_views_or_caches_that_cannot_be_is_refused(
    change: Callable[[dict[str, Any]], None], place: str, tmp_path: Path
) -> None:
    """A plan's file whose hash is right, and whose views or caches no recipe could have, is refused with the place."""
    plain = json.loads(
        json.dumps(resolve(TWO_STAGES, NET, samples=320).to_dict()).replace("Infinity", '"inf"')
    )
    change(plain)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"format": 3, "hash": content_hash(plain), **plain}), encoding="utf-8")
    with pytest.raises(RecipeError, match=rf"not a plan: {re.escape(place)}"):
        Plan.load(path)


# ---------------------------------------------------------------- the page


def test_the_page() -> None:
    """print(plan) is the golden page: stages, what trains, rates, unit conversions, notes."""
    assert str(resolve(TWO_STAGES, NET, samples=320)) + "\n" == GOLDEN.read_text(encoding="utf-8")


def test_the_page_says_the_rest() -> None:
    """Settings that are not at their default are on the page, each in words."""
    page = str(
        plan_of(
            min_lr=1e-3,
            clip_norm=1.0,
            ema=0.99,
            label_smoothing=0.1,
            monitor="valid_accuracy",
            patience="3 epochs",
            restore_best=True,
            accumulate=2,
            optimizer={"name": "sgd", "momentum": 0.9},
        )
    )
    for words in (
        "Lowest rate 0.001 (min_lr)",
        "Gradients clipped at norm 1",
        "Moving average of the weights, decay 0.99",
        "Label smoothing 0.1",
        "Best by valid_accuracy",
        "Restores the best weights after stage 1",
        "Stops after 3 epochs of the last stage without a new best",
        "32 x 2",
        "sgd, momentum=0.9",
        "100.0 %",
    ):
        assert words in page
    assert all(line == line.rstrip() for line in page.splitlines())


def test_the_page_names_what_trains() -> None:
    """Each stage names the shortest modules that cover what it trains, three at most, and how many more."""

    def names(*train: str) -> str:
        lines = str(plan_of(Stage("2 epochs", train=list(train), lr=0.1))).splitlines()
        return next(line for line in lines if line.startswith("     = "))

    assert names("head") == "     = fc"
    assert names("all") == "     = the whole model"
    assert names("all", "!body.bias") == "     = stem, bn, body.weight and 1 more"
    assert names("bias", "stem") == "     = stem, bn.bias, body.bias and 1 more"


def test_the_page_counts_parts_of_epochs() -> None:
    """A stage of one and a half epochs is 15 steps and 1.5 epochs on the page, though it begins two."""
    page = str(plan_of(Stage("1.5 epochs", train="head", lr=1)))
    row = next(line for line in page.splitlines() if line.startswith("  1  head"))
    assert row.split()[2:7] == ["0", "to", "15", "15", "1.5"]
    assert "1 stage, 2 epochs, 15 steps" in page
