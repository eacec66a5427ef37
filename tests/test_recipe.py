"""Recipes: every key, every mistake in words, and TOML there and back."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from lehr.duration import Duration
from lehr.errors import RecipeError
from lehr.recipe import Recipe, Stage
from lehr.recipe_file import load_recipe, overridden, recipe_from
from lehr.recipe_values import optimizer_named
from lehr.schedules import constant, cosine, linear, warmup
from strategies import recipes

MINIMAL = {"stages": [{"length": "1 epoch", "train": "head", "lr": 1e-3}]}
STAGE_VALUES = {
    "length": "400 steps",
    "train": ["head", "norm"],
    "lr": {"head": 1e-3, "norm": 1e-4},
    "schedule": "cosine(floor=0.1)",
    "batch_size": 64,
    "accumulate": 2,
    "weight_decay": 0.0,
    "layer_decay": 0.75,
    "restore_best": True,
    "until": "train_loss plateaus 100 steps",
    "every": "50 steps",
    "reduce": {"by": 0.1, "times": 2},
    "clock": "run",
    "views": 4,
    "cache": "require",
}
RECIPE_VALUES = {
    "optimizer": {"name": "sgd", "momentum": 0.9, "nesterov": True},
    "schedule": {"warmup": "5%", "shape": "linear"},
    "batch_size": 16,
    "accumulate": 4,
    "weight_decay": 0.05,
    "no_decay": ["norm"],
    "layer_decay": 0.9,
    "min_lr": 1e-6,
    "lr_rule": "linear",
    "clip_norm": 1.0,
    "ema": 0.999,
    "label_smoothing": 0.1,
    "seed": 7,
    "monitor": "valid_accuracy",
    "patience": "3 epochs",
    "restore_best": True,
    "augment": ["flip"],
    "views": 2,
    "cache": "off",
    "cache_budget": "1.5 GiB",
    "cache_dtype": "fp16",
    "cache_exact": True,
}


def stage(**changed: Any) -> Stage:
    return Stage(**{"length": "1 epoch", "train": "head", "lr": 1e-3, **changed})


def recipe(**changed: Any) -> Recipe:
    return Recipe(**{"stages": [stage()], **changed})


# ---------------------------------------------------------------- what is understood


def test_every_key_is_read() -> None:
    """Every key of a recipe and of a stage can be written, and none is forgotten by this test."""
    assert {*STAGE_VALUES, "objectives"} == {f.name for f in fields(Stage)}
    assert {*RECIPE_VALUES, "stages"} == {f.name for f in fields(Recipe)}
    read = recipe_from({**RECIPE_VALUES, "stages": [STAGE_VALUES]})
    first = read.stages[0]
    assert (first.length, first.train, first.lr) == (
        "400 steps",
        ("head", "norm"),
        {"head": 1e-3, "norm": 1e-4},
    )
    assert (first.schedule, first.batch_size, first.accumulate) == (cosine(0.1), 64, 2)
    assert (first.weight_decay, first.layer_decay, first.restore_best) == (0.0, 0.75, True)
    assert optimizer_named(read.optimizer) == ("sgd", {"momentum": 0.9, "nesterov": True})
    assert read.schedule == warmup("5%") >> linear()
    assert (read.no_decay, read.augment, read.patience) == (("norm",), ("flip",), "3 epochs")
    plain = {key: getattr(read, key) for key in RECIPE_VALUES}
    for key in (
        "batch_size",
        "accumulate",
        "weight_decay",
        "layer_decay",
        "min_lr",
        "lr_rule",
        "clip_norm",
        "ema",
        "label_smoothing",
        "seed",
        "monitor",
        "restore_best",
    ):
        assert plain[key] == RECIPE_VALUES[key]


def test_defaults() -> None:
    """What is left out has the documented default."""
    plain = recipe()
    assert (*optimizer_named(plain.optimizer), plain.batch_size) == ("adamw", {}, 32)
    assert plain.schedule == warmup("5%") >> cosine()
    assert (plain.no_decay, plain.lr_rule, plain.min_lr, plain.weight_decay) == (
        ("norm", "bias"),
        "fixed",
        0.0,
        0.0,
    )
    assert (plain.clip_norm, plain.ema, plain.patience, plain.augment) == (None, None, None, None)
    assert (plain.monitor, plain.seed, plain.restore_best) == ("valid_loss", 0, False)


def test_python_and_table_agree() -> None:
    """The same words make the same recipe in Python and in a table; a Duration and plain tables are
    understood in Python.
    """
    assert recipe() == recipe_from(MINIMAL)
    assert stage(length=Duration.parse("1 epoch")) == stage()
    assert Recipe([{"length": "1 epoch", "train": ["head"], "lr": 0.001}]) == recipe()  # type: ignore[list-item]
    assert stage(lr=1).lr == 1.0
    assert isinstance(stage(lr=1).lr, float)


def test_frozen() -> None:
    """A recipe and a stage cannot be changed; a changed copy is made with dataclasses.replace."""
    with pytest.raises(FrozenInstanceError):
        recipe().seed = 3  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        stage().lr = 3  # type: ignore[misc]
    assert isinstance(recipe().stages, tuple)
    assert replace(recipe(), seed=3).seed == 3
    assert hash(recipe()) == hash(recipe())


DESIGN = """\
# recipe.toml
optimizer = "adamw"
weight_decay = 0.05
batch_size = 32
schedule = { warmup = "5%", shape = "cosine", floor = 0.01 }

[[stages]]
length = "5 epochs"
train = "head"
lr = 1e-3

[[stages]]
length = "15 epochs"
train = "all"
lr = { head = 1e-3, backbone = 1e-4 }
"""
DESIGNED = Recipe(
    stages=[
        Stage("5 epochs", train="head", lr=1e-3),
        Stage("15 epochs", train="all", lr={"head": 1e-3, "backbone": 1e-4}),
    ],
    optimizer="adamw",
    weight_decay=0.05,
    batch_size=32,
    schedule=warmup("5%") >> cosine(floor=0.01),
)


def _written(directory: Path, text: str, encoding: str = "utf-8") -> Path:
    path = directory / "recipe.toml"
    path.write_text(text, encoding=encoding)
    return path


def test_the_documented_recipe(tmp_path: Path) -> None:
    """The TOML example of the documentation reads as the Python example beside it."""
    assert load_recipe(_written(tmp_path, DESIGN)) == DESIGNED


@pytest.mark.parametrize(
    "line",
    [
        "schedule = 'warmup(\"5%\") >> cosine(floor=0.01)'",
        'schedule = { warmup = "5%", shape = "cosine", floor = 0.01 }',
    ],
)
def test_both_forms_of_a_schedule(tmp_path: Path, line: str) -> None:
    """A schedule in TOML is a text or a small table, in the recipe and in a stage."""
    text = f'{line}\n[[stages]]\nlength = "1 epoch"\ntrain = "head"\nlr = 1\n{line}\n'
    read = load_recipe(_written(tmp_path, text))
    assert read.schedule == read.stages[0].schedule == warmup("5%") >> cosine(0.01)


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    """A file that an editor began with a byte-order mark reads as any other."""
    assert load_recipe(_written(tmp_path, DESIGN, "utf-8-sig")) == DESIGNED


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(recipes())
def test_toml_round_trip(tmp_path_factory: pytest.TempPathFactory, any_recipe: Recipe) -> None:
    """A recipe written as TOML reads back as an equal recipe, and writes the same text again."""
    path = tmp_path_factory.mktemp("recipe") / "recipe.toml"
    path.write_text(any_recipe.to_toml(), encoding="utf-8")
    again = load_recipe(path)
    assert again == any_recipe
    assert again.to_toml() == any_recipe.to_toml()
    assert recipe_from(any_recipe.to_dict()) == any_recipe


def test_toml_says_all() -> None:
    """Defaults are written out too, so that a run's recipe means the same under other defaults; what is None is
    not. Numbers, schedules and tables look as people write them.
    """
    text = recipe(stages=[stage(lr={"head": 1e-2, "b*": 0.5})]).to_toml()
    keys = {line.split(" = ")[0] for line in text.split("\n[[stages]]\n")[0].splitlines()}
    assert keys == {f.name for f in fields(Recipe) if f.default is not None} - {"stages"}
    assert "schedule = 'warmup(\"5%\") >> cosine()'" in text
    assert text.endswith(
        '\n\n[[stages]]\nlength = "1 epoch"\ntrain = "head"\nlr = { head = 1e-2, "b*" = 0.5 }\n'
    )
    assert "restore_best = false" in recipe(stages=[stage(restore_best=False)]).to_toml()
    assert "weight_decay = 0.0" in recipe(stages=[stage(weight_decay=0)]).to_toml()
    assert "augment = []" in recipe(augment=[]).to_toml()
    assert "no_decay = []" in recipe(no_decay=[]).to_toml()


def test_a_tuple_of_the_optimizer_is_a_list() -> None:
    """Betas written as a tuple are the list that TOML and the plan have, so that they compare equal after a
    round trip.
    """
    said = recipe(optimizer={"name": "adamw", "betas": (0.9, 0.95)})
    assert said == recipe(optimizer={"name": "adamw", "betas": [0.9, 0.95]})
    assert recipe_from(said.to_dict()) == said


# ---------------------------------------------------------------- files and --set


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    """A missing file, a folder, bytes that are no text and a text that is no TOML are refused with the path
    and the reason.
    """
    with pytest.raises(RecipeError, match=r"gone\.toml: cannot be read: No such file.*lehr init DATA"):
        load_recipe(tmp_path / "gone.toml")
    with pytest.raises(RecipeError, match=r"cannot be read: Is a directory"):
        load_recipe(tmp_path)
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\x00x")
    with pytest.raises(RecipeError, match=r"bytes\.toml: cannot be read: it is not UTF-8 text"):
        load_recipe(tmp_path / "bytes.toml")
    with pytest.raises(RecipeError, match=r"recipe\.toml: not TOML: .*line 1"):
        load_recipe(_written(tmp_path, "optimizer = = 5"))


def test_a_file_names_itself_in_its_mistakes(tmp_path: Path) -> None:
    """A mistake in a file is told with the file and the key."""
    path = _written(tmp_path, DESIGN.replace('"5 epochs"', "5"))
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(f"{path}: stages.0.length: 5 has no unit")


def test_settings_over_a_file(tmp_path: Path) -> None:
    """Settings lie over the file: numbers, bare words, tables, durations, new keys, entries of lists."""
    read = load_recipe(
        _written(tmp_path, DESIGN),
        settings=[
            "stages.0.lr=1e-2",
            "stages.1.lr.head = 5e-3",
            "optimizer=sgd",
            "stages.1.length=3 epochs",
            "min_lr=1e-6",
            "schedule.floor=0.1",
            'stages.0.train=["head", "norm"]',
            "restore_best=true",
            "stages.0.batch_size=8",
        ],
    )
    assert read.stages[0].lr == 1e-2
    assert read.stages[1].lr == {"head": 5e-3, "backbone": 1e-4}
    assert read.stages[1].length == "3 epochs"
    assert read.stages[0].train == ("head", "norm")
    assert (read.optimizer, read.min_lr, read.restore_best, read.stages[0].batch_size) == (
        "sgd",
        1e-6,
        True,
        8,
    )
    assert read.schedule == warmup("5%") >> cosine(0.1)


def test_settings_change_a_copy() -> None:
    """The table that settings are laid over stays as it was."""
    table = {"stages": [{"lr": {"head": 1.0}}]}
    assert overridden(table, ["stages.0.lr.head=2.0", "stages.0={}", "optimizer.name=sgd"]) == {
        "stages": [{}],
        "optimizer": {"name": "sgd"},
    }
    assert table == {"stages": [{"lr": {"head": 1.0}}]}


@pytest.mark.parametrize(
    ("setting", "helpful"),
    [
        ("seed", "--set seed: expected KEY=VALUE, for example --set stages.0.lr=1e-3"),
        ("=5", "--set =5: expected KEY=VALUE"),
        ("stages.2.lr=1", "--set stages.2.lr=1: there are 2 entries, 0 to 1; '2' is none of them"),
        ("stages.last.lr=1", "'last' is none of them"),
        ("stages.²=1", "'²' is none of them"),
        ("stages.-1=1", "'-1' is none of them"),
        (
            "optimizer.momentum=0.9",
            "--set optimizer.momentum=0.9: optimizer is a single value, so 'momentum' cannot be set inside "
            "it",
        ),
        ("optimizer.a.b=1", "'a' lies inside a single value; set that value as a whole"),
        ("stages.0.lrr=1", 'stages.0.lrr: no such key in a stage; did you mean "lr"?'),
        ("seed=x", "seed: 'x'; expected a whole number"),
    ],
)
def test_settings_refused(tmp_path: Path, setting: str, helpful: str) -> None:
    """A setting that cannot be laid over the recipe is refused with the setting and what there is."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(_written(tmp_path, DESIGN), settings=[setting])
    assert helpful in str(caught.value)


def test_a_stage_may_have_its_own_schedule() -> None:
    """A stage's schedule is its own; without one it is None here and the recipe's in the plan."""
    assert stage(schedule=constant()).schedule == constant()
    assert stage().schedule is None
