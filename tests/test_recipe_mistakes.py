"""Recipes: every mistake that a person can make, in words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest

from lehr.errors import RecipeError
from lehr.recipe import Recipe, Stage
from lehr.recipe_file import recipe_from

MINIMAL = {"stages": [{"length": "1 epoch", "train": "head", "lr": 1e-3}]}


def stage(**changed: Any) -> Stage:
    return Stage(**{"length": "1 epoch", "train": "head", "lr": 1e-3, **changed})


def recipe(**changed: Any) -> Recipe:
    return Recipe(**{"stages": [stage()], **changed})


# ---------------------------------------------------------------- what is refused

STAGE_KEYS = ", ".join(f.name for f in fields(Stage))
MISTAKES: list[tuple[Callable[[], object], str]] = [
    # length
    (
        lambda: stage(length=5),
        'Stage: length: 5 has no unit; write "5 epochs" or "5 steps"',
    ),
    (lambda: stage(length="5"), 'Stage: length: \'5\' has no unit; write "5 epochs" or "5 steps"'),
    (lambda: stage(length="5 epoches"), "unknown unit 'epoches'; did you mean \"epochs\""),
    (
        lambda: stage(length="50%"),
        'Stage: length: "50%" is a share, but of what? A stage\'s length is in "epochs" or "steps"',
    ),
    (
        lambda: stage(length="0 epochs"),
        'length: "0 epochs" is no stage at all; leave the stage out, or give it at least one step',
    ),
    (lambda: stage(length="-1 epochs"), "is negative; a duration is 0 or more"),
    (lambda: stage(length="1.5 steps"), "write a whole number of steps"),
    (lambda: stage(length=None), "length: None is not a duration"),
    # train
    (
        lambda: stage(train=[]),
        'Stage: train: [] trains nothing; name what to train, for example "head" or "all"',
    ),
    (lambda: stage(train=5), 'Stage: train: 5; expected a pattern such as "head", or a list of patterns'),
    (lambda: stage(train=["head", 5]), "train: ['head', 5]; expected a pattern"),
    (lambda: stage(train=""), "train: ''; expected a pattern"),
    # views and caches
    (
        lambda: stage(views=0),
        'Stage: views: 0; expected how many fixed views each sample has, 1 or more, or "fresh"',
    ),
    (lambda: stage(views=True), "Stage: views: True; expected how many fixed views"),
    (lambda: stage(views=2.0), "Stage: views: 2.0; expected how many fixed views"),
    (lambda: recipe(views="all"), "Recipe: views: 'all'; expected how many fixed views"),
    (lambda: stage(cache="on"), "Stage: cache: 'on'; expected 'auto', 'off' or 'require'"),
    (lambda: recipe(cache=True), "Recipe: cache: True; expected 'auto', 'off' or 'require'"),
    (lambda: recipe(cache_budget=4), 'Recipe: cache_budget: 4 has no unit; write "4 GiB" or "4 MiB"'),
    (
        lambda: recipe(cache_budget="4 GiBs"),
        "Recipe: cache_budget: '4 GiBs': unknown unit 'GiBs'; did you mean \"GiB\"",
    ),
    (lambda: recipe(cache_budget="0 MB"), "Recipe: cache_budget: '0 MB' is nothing at all"),
    (
        lambda: recipe(cache_dtype="float16"),
        "Recipe: cache_dtype: 'float16'; expected 'fp32', 'fp16' or 'bf16'",
    ),
    (lambda: recipe(cache_exact=1), "Recipe: cache_exact: 1; expected true or false"),
    (lambda: stage(cache_budget="1 GiB"), "no such key in a stage; it belongs to the recipe"),
    # lr
    (lambda: stage(lr=0), "Stage: lr: 0; expected a rate above 0, a number such as 1e-3"),
    (lambda: stage(lr="1e-3"), "lr: '1e-3'; expected a rate above 0, a number such as 1e-3"),
    (lambda: stage(lr=float("nan")), "lr: nan; expected a rate above 0"),
    (lambda: stage(lr=float("inf")), "lr: inf; expected a rate above 0"),
    (lambda: stage(lr=True), "lr: True; expected a rate above 0"),
    (
        lambda: stage(lr={}),
        "lr: {} gives no rate; write a number, or a rate for each pattern: { head = 1e-3, backbone = 1e-4 }",
    ),
    (lambda: stage(lr={"head": -1}), "lr: -1; expected a rate of 'head' above 0"),
    # numbers
    (lambda: stage(batch_size=0), "Stage: batch_size: 0; expected 1 or more"),
    (lambda: stage(batch_size=2.0), "batch_size: 2.0; expected a whole number"),
    (lambda: stage(batch_size="8"), "batch_size: '8'; expected a whole number"),
    (lambda: stage(batch_size=True), "batch_size: True; expected a whole number"),
    (lambda: stage(accumulate=0), "accumulate: 0; expected 1 or more"),
    (lambda: stage(weight_decay=-0.1), "weight_decay: -0.1; expected 0 or more"),
    (lambda: stage(weight_decay=float("inf")), "weight_decay: inf; expected a finite number"),
    (lambda: stage(layer_decay=0), "layer_decay: 0; expected more than 0"),
    (lambda: stage(layer_decay=1.1), "layer_decay: 1.1; expected 1 or less"),
    (lambda: stage(layer_decay=float("nan")), "layer_decay: nan"),
    (lambda: stage(restore_best=1), "restore_best: 1; expected true or false"),
    (lambda: stage(restore_best="yes"), "restore_best: 'yes'; expected true or false"),
    (lambda: recipe(batch_size=-3), "Recipe: batch_size: -3"),
    (lambda: recipe(min_lr=-1), "min_lr: -1; expected 0 or more"),
    (lambda: recipe(clip_norm=0), "clip_norm: 0; expected more than 0"),
    (lambda: recipe(ema=1.0), "ema: 1.0; expected less than 1"),
    (lambda: recipe(ema=0), "ema: 0; expected more than 0"),
    (lambda: recipe(ema=float("nan")), "ema: nan"),
    (lambda: recipe(label_smoothing=1), "label_smoothing: 1; expected less than 1"),
    (lambda: recipe(label_smoothing=float("nan")), "label_smoothing: nan"),
    (lambda: recipe(seed=-1), "seed: -1; expected 0 or more"),
    (lambda: recipe(seed=1.5), "seed: 1.5; expected a whole number"),
    (lambda: recipe(weight_decay="0.1"), "weight_decay: '0.1'; expected a number"),
    # words
    (lambda: recipe(lr_rule="square"), "lr_rule: 'square'; expected 'fixed' or 'linear'"),
    (lambda: recipe(monitor=""), "monitor: ''; expected a text that is not empty"),
    (lambda: recipe(monitor=5), "monitor: 5; expected a text"),
    (lambda: recipe(no_decay=5), "no_decay: 5; expected a pattern"),
    (lambda: recipe(augment={"flip": 1}), "augment: {'flip': 1}; expected a pattern"),
    # patience
    (lambda: recipe(patience=3), 'patience: 3 has no unit; write "3 epochs"'),
    (
        lambda: recipe(patience="1.5 epochs"),
        'the data are validated once an epoch, so write whole epochs, for example "3 epochs"',
    ),
    (lambda: recipe(patience="100 steps"), "so write whole epochs"),
    (lambda: recipe(patience="0 epochs"), "so write whole epochs"),
    # the optimizer
    (
        lambda: recipe(optimizer=5),
        'optimizer: 5; expected a name such as "adamw", or a table { name = "sgd", momentum = 0.9 }',
    ),
    (lambda: recipe(optimizer=""), "optimizer: ''; expected a name"),
    (lambda: recipe(optimizer={"momentum": 0.9}), "optimizer: {'momentum': 0.9}; expected a name"),
    (
        lambda: recipe(optimizer={"name": "sgd", "lr": 1}),
        "optimizer: 'lr' does not stand in the optimizer; it is said in the stage's `lr`",
    ),
    (
        lambda: recipe(optimizer={"name": "sgd", "weight_decay": 1}),
        "it is said in the recipe's `weight_decay`",
    ),
    (lambda: recipe(optimizer={"name": "sgd", "params": 1}), "it is said in the stage's `train`"),
    (
        lambda: recipe(optimizer={"name": "sgd", "foreach": None}),
        "foreach=None; expected a finite number, a text, true or false, or a "
        "list of them; leave out what is None",
    ),
    (lambda: recipe(optimizer={"name": "sgd", "eps": float("inf")}), "eps=inf; expected a finite number"),
    # schedules
    (
        lambda: stage(schedule="cosin()"),
        "Stage: schedule: no schedule is called 'cosin'; did you mean \"cosine\"?",
    ),
    (
        lambda: recipe(schedule={"shape": "cosine", "flor": 0}),
        "Recipe: schedule: cosine has no setting 'flor'; did you mean \"floor\"?",
    ),
    (lambda: recipe(schedule="cosine() >> linear()"), "both take what the others leave"),
    (lambda: recipe(schedule=5), "Recipe: schedule: '5' is not a schedule; expected a text such as"),
    # keys
    (lambda: stage(lrr=1), f'Stage: lrr: no such key in a stage; did you mean "lr"? Known: {STAGE_KEYS}'),
    (lambda: stage(seed=1), "Stage: seed: no such key in a stage; it belongs to the recipe."),
    (lambda: recipe(lr=1), "Recipe: lr: no such key in a recipe; it belongs to the stage."),
    (lambda: recipe(batchsize=1), 'Recipe: batchsize: no such key in a recipe; did you mean "batch_size"'),
    (lambda: recipe(colour=1), "Recipe: colour: no such key in a recipe"),
    (lambda: Stage(), 'length: missing; how long is the stage? For example length = "5 epochs"'),
    (lambda: Stage("5 epochs"), 'train: missing; what does it train? For example train = "head"'),
    (lambda: Stage("5 epochs", train="head"), "lr: missing; at which peak rate? For example lr = 1e-3"),
    (
        lambda: Stage("5 epochs", "head", 1e-3),
        "'head'; only 'length' may stand without its name: write train='head' or the like",
    ),
    (
        lambda: Stage("5 epochs", "head", 1e-3),
        "0.001; only 'length' may stand without its name: write lr=0.001 or the like",
    ),
    # stages
    (
        lambda: Recipe(),
        "stages: missing; a recipe needs at least one stage: [[stages]] in TOML, stages=[lehr.Stage(...)] "
        "in Python",
    ),
    (
        lambda: Recipe([]),
        "stages: []; a recipe needs at least one stage, for example Stage('5 epochs', train='head', lr=1e-3)",
    ),
    (
        lambda: Recipe(stage()),
        "expected a list of stages: [[stages]] in TOML, stages=[lehr.Stage(...)] in Python",
    ),
    (lambda: Recipe("head"), "stages: 'head'; expected a list of stages"),
    (lambda: Recipe([5]), "stages.0: 5; expected a stage: a table with length, train and lr"),
    (
        lambda: recipe(stages=[stage(), {"length": "5%", "train": "head", "lr": 1}]),
        'Recipe: stages.1.length: "5%" is a share',
    ),
]


@pytest.mark.parametrize(
    ("make", "helpful"), MISTAKES, ids=[f"{i}-{text[:40]}" for i, (_, text) in enumerate(MISTAKES)]
)
def test_mistakes(make: Callable[[], object], helpful: str) -> None:
    """Each mistake is a RecipeError that names the key, what was found and what would do."""
    with pytest.raises(RecipeError) as caught:
        make()
    assert helpful in str(caught.value)
    assert not any(words in str(caught.value) for words in ("pydantic", "nput should", "tring should"))


def test_a_bare_number_is_not_told_of_shares() -> None:
    """Only units that would be accepted in that place are proposed for a number without one."""
    for wrong in (lambda: stage(length=5), lambda: stage(length="2.5"), lambda: recipe(patience=3)):
        with pytest.raises(RecipeError) as caught:
            wrong()
        assert "%" not in str(caught.value)
    assert str(caught.value) == 'Recipe: patience: 3 has no unit; write "3 epochs"'


def test_all_mistakes_at_once() -> None:
    """A table with several mistakes lists them all, a line each, with their places."""
    table = {
        **MINIMAL,
        "batch_size": 0,
        "shedule": "x",
        "stages": [{"length": 5, "train": "head", "lr": 1, "seed": 2}, {}],
    }
    with pytest.raises(RecipeError) as caught:
        recipe_from(table, where="my.toml")
    lines = str(caught.value).splitlines()
    assert all(line.startswith("my.toml: ") for line in lines)
    places = {line.split(": ")[1] for line in lines}
    assert places == {
        "batch_size",
        "shedule",
        "stages.0.length",
        "stages.0.seed",
        "stages.1.length",
        "stages.1.train",
        "stages.1.lr",
    }


@pytest.mark.parametrize(
    "table", [{}, {"stages": []}, {"stages": {"length": "1 epoch"}}, {"stages": "head"}, {"stages": 5}]
)
def test_no_stages(table: dict[str, object]) -> None:
    """A table without a list of stages says how stages are written."""
    with pytest.raises(RecipeError, match=r"^recipe: stages.*stage"):
        recipe_from(table)


def test_a_hundred_mistakes_are_said_in_twenty_lines() -> None:
    """However many mistakes a recipe has, its error fits on a screen, and counts what it leaves out."""
    with pytest.raises(RecipeError) as caught:
        recipe_from({"stages": [{"length": "1 epoch", "train": "all", "lr": -1}] * 100})
    lines = str(caught.value).split("\n")
    assert len(lines) == 21
    assert lines[-1] == "recipe: and 80 more"


@pytest.mark.parametrize("length", ["1e30 steps", "100000001 steps", "1e7 epochs"])
def test_a_stage_longer_than_any_run_is_refused(length: str) -> None:
    """A slip of the exponent is a mistake in the recipe, not a plan that fills the memory."""
    with pytest.raises(RecipeError, match="longer than any run"):
        Stage(length, train="all", lr=1e-3)


@pytest.mark.parametrize(
    "said",
    [
        {"lr": 10**400},
        {"batch_size": 10**400},
        {"optimizer": {"name": "sgd", "momentum": 10**5000}},
        {"length": 10**5000},
    ],
)
def test_numbers_beyond_every_type_are_refused(said: dict[str, Any]) -> None:
    """An integer of any length, as TOML and Python have them, is refused in words."""
    stage = {"length": "1 epoch", "train": "all", "lr": 0.1}
    recipe = {"stages": [stage | {k: v for k, v in said.items() if k != "optimizer"}]}
    with pytest.raises(RecipeError):
        recipe_from(recipe | {k: v for k, v in said.items() if k == "optimizer"})
