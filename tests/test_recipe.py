"""Recipes: every key, every mistake in words, and TOML there and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from strategies import recipes

from lehr.duration import Duration
from lehr.errors import RecipeError
from lehr.recipe import Recipe, Stage, load_recipe, overridden, recipe_from
from lehr.schedules import constant, cosine, linear, warmup

MINIMAL = {"stages": [{"length": "1 epoch", "train": "head", "lr": 1e-3}]}
STAGE_VALUES = {
    "length": "400 steps", "train": ["head", "norm"], "lr": {"head": 1e-3, "norm": 1e-4}, "schedule": "cosine(floor=0.1)",
    "batch_size": 64, "accumulate": 2, "weight_decay": 0.0, "layer_decay": 0.75, "restore_best": True,
}  # fmt: skip
RECIPE_VALUES = {
    "optimizer": {"name": "sgd", "momentum": 0.9, "nesterov": True}, "schedule": {"warmup": "5%", "shape": "linear"},
    "batch_size": 16, "accumulate": 4, "weight_decay": 0.05, "no_decay": ["norm"], "layer_decay": 0.9, "min_lr": 1e-6,
    "lr_rule": "linear", "clip_norm": 1.0, "ema": 0.999, "label_smoothing": 0.1, "seed": 7, "monitor": "valid_accuracy",
    "patience": "3 epochs", "restore_best": True, "augment": ["flip"],
}  # fmt: skip


def stage(**changed: Any) -> Stage:
    return Stage(**{"length": "1 epoch", "train": "head", "lr": 1e-3, **changed})


def recipe(**changed: Any) -> Recipe:
    return Recipe(**{"stages": [stage()], **changed})


# ------------------------------------------------------------------------------------ what is understood


def test_every_key_is_read() -> None:
    """Every key of a recipe and of a stage can be written, and none is forgotten by this test."""
    assert set(STAGE_VALUES) == {f.name for f in fields(Stage)}
    assert {*RECIPE_VALUES, "stages"} == {f.name for f in fields(Recipe)}
    read = recipe_from({**RECIPE_VALUES, "stages": [STAGE_VALUES]})
    first = read.stages[0]
    assert (first.length, first.train, first.lr) == ("400 steps", ("head", "norm"), {"head": 1e-3, "norm": 1e-4})
    assert (first.schedule, first.batch_size, first.accumulate) == (cosine(0.1), 64, 2)
    assert (first.weight_decay, first.layer_decay, first.restore_best) == (0.0, 0.75, True)
    assert (read.optimizer_name, read.optimizer_settings) == ("sgd", {"momentum": 0.9, "nesterov": True})
    assert read.schedule == warmup("5%") >> linear()
    assert (read.no_decay, read.augment, read.patience) == (("norm",), ("flip",), "3 epochs")
    plain = {key: getattr(read, key) for key in RECIPE_VALUES}
    for key in ("batch_size", "accumulate", "weight_decay", "layer_decay", "min_lr", "lr_rule", "clip_norm", "ema", "label_smoothing",
                "seed", "monitor", "restore_best"):  # fmt: skip
        assert plain[key] == RECIPE_VALUES[key]


def test_defaults() -> None:
    """What is left out has the documented default."""
    plain = recipe()
    assert (plain.optimizer_name, plain.optimizer_settings, plain.batch_size) == ("adamw", {}, 32)
    assert plain.schedule == warmup("5%") >> cosine()
    assert (plain.no_decay, plain.lr_rule, plain.min_lr, plain.weight_decay) == (("norm", "bias"), "fixed", 0.0, 0.0)
    assert (plain.clip_norm, plain.ema, plain.patience, plain.augment) == (None, None, None, None)
    assert (plain.monitor, plain.seed, plain.restore_best) == ("valid_loss", 0, False)


def test_python_and_table_agree() -> None:
    """The same words make the same recipe in Python and in a table; a Duration and plain tables are understood in Python."""
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
    stages=[Stage("5 epochs", train="head", lr=1e-3), Stage("15 epochs", train="all", lr={"head": 1e-3, "backbone": 1e-4})],
    optimizer="adamw", weight_decay=0.05, batch_size=32, schedule=warmup("5%") >> cosine(floor=0.01),
)  # fmt: skip


def _written(directory: Path, text: str, encoding: str = "utf-8") -> Path:
    path = directory / "recipe.toml"
    path.write_text(text, encoding=encoding)
    return path


def test_the_documented_recipe(tmp_path: Path) -> None:
    """The TOML example of the documentation reads as the Python example beside it."""
    assert load_recipe(_written(tmp_path, DESIGN)) == DESIGNED


@pytest.mark.parametrize(
    "line", ["schedule = 'warmup(\"5%\") >> cosine(floor=0.01)'", 'schedule = { warmup = "5%", shape = "cosine", floor = 0.01 }']
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


def test_toml_says_what_is_not_default() -> None:
    """Only what differs from the defaults is written out; False and 0 are written where they override."""
    assert recipe().to_toml() == '[[stages]]\nlength = "1 epoch"\ntrain = "head"\nlr = 0.001\n'
    assert "restore_best = false" in recipe(stages=[stage(restore_best=False)]).to_toml()
    assert "weight_decay = 0.0" in recipe(stages=[stage(weight_decay=0)]).to_toml()
    assert "augment = []" in recipe(augment=[]).to_toml()
    assert "no_decay = []" in recipe(no_decay=[]).to_toml()


def test_a_tuple_of_the_optimizer_is_a_list() -> None:
    """Betas written as a tuple are the list that TOML and the plan have, so that they compare equal after a round trip."""
    said = recipe(optimizer={"name": "adamw", "betas": (0.9, 0.95)})
    assert said == recipe(optimizer={"name": "adamw", "betas": [0.9, 0.95]})
    assert recipe_from(said.to_dict()) == said


# ------------------------------------------------------------------------------------ what is refused

STAGE_KEYS = ", ".join(f.name for f in fields(Stage))
MISTAKES: list[tuple[Callable[[], object], str]] = [
    # length
    (lambda: stage(length=5), 'Stage: length: 5 has no unit; write "5 epochs" or "5 steps", or a share such as "10%"'),
    (lambda: stage(length="5"), "Stage: length: '5' has no unit; write \"5 epochs\", \"5 steps\" or \"5%\""),
    (lambda: stage(length="5 epoches"), "unknown unit 'epoches'; did you mean \"epochs\""),
    (lambda: stage(length="50%"), 'Stage: length: "50%" is a share, but of what? A stage\'s length is in "epochs" or "steps"'),
    (lambda: stage(length="0 epochs"), 'length: "0 epochs" is no stage at all; leave the stage out, or give it at least one step'),
    (lambda: stage(length="-1 epochs"), "is negative; a duration is 0 or more"),
    (lambda: stage(length="1.5 steps"), "write a whole number of steps"),
    (lambda: stage(length=None), "length: None is not a duration"),
    # train
    (lambda: stage(train=[]), 'Stage: train: [] trains nothing; name what to train, for example "head" or "all"'),
    (lambda: stage(train=5), 'Stage: train: 5; expected a pattern such as "head", or a list of patterns'),
    (lambda: stage(train=["head", 5]), "train: ['head', 5]; expected a pattern"),
    (lambda: stage(train=""), "train: ''; expected a pattern"),
    # lr
    (lambda: stage(lr=0), "Stage: lr: 0; expected a rate above 0, a number such as 1e-3"),
    (lambda: stage(lr="1e-3"), "lr: '1e-3'; expected a rate above 0, a number such as 1e-3"),
    (lambda: stage(lr=float("nan")), "lr: nan; expected a rate above 0"),
    (lambda: stage(lr=float("inf")), "lr: inf; expected a rate above 0"),
    (lambda: stage(lr=True), "lr: True; expected a rate above 0"),
    (lambda: stage(lr={}), "lr: {} gives no rate; write a number, or a rate for each pattern: { head = 1e-3, backbone = 1e-4 }"),
    (lambda: stage(lr={"head": -1}), "lr: -1; expected a rate of 'head' above 0"),
    # numbers
    (lambda: stage(batch_size=0), "Stage: batch_size: 0; input should be greater than or equal to 1"),
    (lambda: stage(batch_size=2.0), "batch_size: 2.0; input should be a valid integer"),
    (lambda: stage(batch_size="8"), "batch_size: '8'; input should be a valid integer"),
    (lambda: stage(batch_size=True), "batch_size: True; input should be a valid integer"),
    (lambda: stage(accumulate=0), "accumulate: 0; input should be greater than or equal to 1"),
    (lambda: stage(weight_decay=-0.1), "weight_decay: -0.1; input should be greater than or equal to 0"),
    (lambda: stage(weight_decay=float("inf")), "weight_decay: inf; input should be a finite number"),
    (lambda: stage(layer_decay=0), "layer_decay: 0; input should be greater than 0"),
    (lambda: stage(layer_decay=1.1), "layer_decay: 1.1; input should be less than or equal to 1"),
    (lambda: stage(layer_decay=float("nan")), "layer_decay: nan"),
    (lambda: stage(restore_best=1), "restore_best: 1; input should be a valid boolean"),
    (lambda: stage(restore_best="yes"), "restore_best: 'yes'; input should be a valid boolean"),
    (lambda: recipe(batch_size=-3), "Recipe: batch_size: -3"),
    (lambda: recipe(min_lr=-1), "min_lr: -1; input should be greater than or equal to 0"),
    (lambda: recipe(clip_norm=0), "clip_norm: 0; input should be greater than 0"),
    (lambda: recipe(ema=1.0), "ema: 1.0; input should be less than 1"),
    (lambda: recipe(ema=0), "ema: 0; input should be greater than 0"),
    (lambda: recipe(ema=float("nan")), "ema: nan"),
    (lambda: recipe(label_smoothing=1), "label_smoothing: 1; input should be less than 1"),
    (lambda: recipe(label_smoothing=float("nan")), "label_smoothing: nan"),
    (lambda: recipe(seed=-1), "seed: -1; input should be greater than or equal to 0"),
    (lambda: recipe(seed=1.5), "seed: 1.5; input should be a valid integer"),
    (lambda: recipe(weight_decay="0.1"), "weight_decay: '0.1'; input should be a valid number"),
    # words
    (lambda: recipe(lr_rule="square"), "lr_rule: 'square'; input should be 'fixed' or 'linear'"),
    (lambda: recipe(monitor=""), "monitor: ''; string should have at least 1 character"),
    (lambda: recipe(monitor=5), "monitor: 5; input should be a valid string"),
    (lambda: recipe(no_decay=5), "no_decay: 5; expected a pattern"),
    (lambda: recipe(augment={"flip": 1}), "augment: {'flip': 1}; expected a pattern"),
    # patience
    (lambda: recipe(patience=3), 'patience: 3 has no unit; write "3 epochs"'),
    (lambda: recipe(patience="1.5 epochs"), "the data are validated once an epoch, so write whole epochs, for example \"3 epochs\""),
    (lambda: recipe(patience="100 steps"), "so write whole epochs"),
    (lambda: recipe(patience="0 epochs"), "so write whole epochs"),
    # the optimizer
    (lambda: recipe(optimizer=5), "optimizer: 5; expected a name such as \"adamw\", or a table { name = \"sgd\", momentum = 0.9 }"),
    (lambda: recipe(optimizer=""), "optimizer: ''; expected a name"),
    (lambda: recipe(optimizer={"momentum": 0.9}), "optimizer: {'momentum': 0.9}; expected a name"),
    (lambda: recipe(optimizer={"name": "sgd", "lr": 1}), "optimizer: 'lr' does not stand in the optimizer; it is said in the stage's `lr`"),
    (lambda: recipe(optimizer={"name": "sgd", "weight_decay": 1}), "it is said in the recipe's `weight_decay`"),
    (lambda: recipe(optimizer={"name": "sgd", "params": 1}), "it is said in the stage's `train`"),
    (lambda: recipe(optimizer={"name": "sgd", "foreach": None}), "foreach=None; expected a finite number, a text, true or false, or a "
                                                                 "list of them; leave out what is None"),
    (lambda: recipe(optimizer={"name": "sgd", "eps": float("inf")}), "eps=inf; expected a finite number"),
    # schedules
    (lambda: stage(schedule="cosin()"), "Stage: schedule: no schedule is called 'cosin'; did you mean \"cosine\"?"),
    (lambda: recipe(schedule={"shape": "cosine", "flor": 0}), "Recipe: schedule: cosine has no setting 'flor'; did you mean \"floor\"?"),
    (lambda: recipe(schedule="cosine() >> linear()"), "both take what the others leave"),
    (lambda: recipe(schedule=5), "Recipe: schedule: '5' is not a schedule; expected a text such as"),
    # keys
    (lambda: stage(lrr=1), f'Stage: lrr: no such key in a stage; did you mean "lr"? Known: {STAGE_KEYS}'),
    (lambda: stage(seed=1), "Stage: seed: no such key in a stage; it belongs to the recipe."),
    (lambda: recipe(lr=1), "Recipe: lr: no such key in a recipe; it belongs to the stage."),
    (lambda: recipe(batchsize=1), "Recipe: batchsize: no such key in a recipe; did you mean \"batch_size\""),
    (lambda: recipe(colour=1), "Recipe: colour: no such key in a recipe"),
    (lambda: Stage(), "length: missing; how long is the stage? For example length = \"5 epochs\""),
    (lambda: Stage("5 epochs"), "train: missing; what does it train? For example train = \"head\""),
    (lambda: Stage("5 epochs", train="head"), "lr: missing; at which peak rate? For example lr = 1e-3"),
    (lambda: Stage("5 epochs", "head", 1e-3), "'head'; only 'length' may stand without its name: write train='head' or the like"),
    (lambda: Stage("5 epochs", "head", 1e-3), "0.001; only 'length' may stand without its name: write lr=0.001 or the like"),
    # stages
    (lambda: Recipe(), "stages: missing; a recipe needs at least one stage: [[stages]] in TOML, stages=[lehr.Stage(...)] in Python"),
    (lambda: Recipe([]), "stages: []; a recipe needs at least one stage, for example Stage('5 epochs', train='head', lr=1e-3)"),
    (lambda: Recipe(stage()), "expected a list of stages: [[stages]] in TOML, stages=[lehr.Stage(...)] in Python"),
    (lambda: Recipe("head"), "stages: 'head'; expected a list of stages"),
    (lambda: Recipe([5]), "stages.0: 5"),
    (lambda: recipe(stages=[stage(), {"length": "5%", "train": "head", "lr": 1}]), 'Recipe: stages.1.length: "5%" is a share'),
]  # fmt: skip


@pytest.mark.parametrize(("make", "helpful"), MISTAKES, ids=[f"{i}-{text[:40]}" for i, (_, text) in enumerate(MISTAKES)])
def test_mistakes(make: Callable[[], object], helpful: str) -> None:
    """Each mistake is a RecipeError that names the key, what was found and what would do."""
    with pytest.raises(RecipeError) as caught:
        make()
    assert helpful in str(caught.value)
    assert "pydantic" not in str(caught.value)


def test_all_mistakes_at_once() -> None:
    """A table with several mistakes lists them all, a line each, with their places."""
    table = {**MINIMAL, "batch_size": 0, "shedule": "x", "stages": [{"length": 5, "train": "head", "lr": 1, "seed": 2}, {}]}
    with pytest.raises(RecipeError) as caught:
        recipe_from(table, where="my.toml")
    lines = str(caught.value).splitlines()
    assert all(line.startswith("my.toml: ") for line in lines)
    places = {line.split(": ")[1] for line in lines}
    assert places == {
        "batch_size", "shedule", "stages.0.length", "stages.0.seed", "stages.1.length", "stages.1.train", "stages.1.lr",
    }  # fmt: skip


@pytest.mark.parametrize("table", [{}, {"stages": []}, {"stages": {"length": "1 epoch"}}, {"stages": "head"}, {"stages": 5}])
def test_no_stages(table: dict[str, object]) -> None:
    """A table without a list of stages says how stages are written."""
    with pytest.raises(RecipeError, match=r"^recipe: stages.*stage"):
        recipe_from(table)


# ------------------------------------------------------------------------------------ files and --set


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    """A missing file, a folder, bytes that are no text and a text that is no TOML are refused with the path and the reason."""
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
            "stages.0.lr=1e-2", "stages.1.lr.head = 5e-3", "optimizer=sgd", "stages.1.length=3 epochs", "min_lr=1e-6",
            "schedule.floor=0.1", 'stages.0.train=["head", "norm"]', "restore_best=true", "stages.0.batch_size=8",
        ],
    )  # fmt: skip
    assert read.stages[0].lr == 1e-2
    assert read.stages[1].lr == {"head": 5e-3, "backbone": 1e-4}
    assert read.stages[1].length == "3 epochs"
    assert read.stages[0].train == ("head", "norm")
    assert (read.optimizer, read.min_lr, read.restore_best, read.stages[0].batch_size) == ("sgd", 1e-6, True, 8)
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
        ("optimizer.momentum=0.9", "--set optimizer.momentum=0.9: optimizer is a single value, so 'momentum' cannot be set inside it"),
        ("optimizer.a.b=1", "'a' lies inside a single value; set that value as a whole"),
        ("stages.0.lrr=1", "stages.0.lrr: no such key in a stage; did you mean \"lr\"?"),
        ("seed=x", "seed: 'x'; input should be a valid integer"),
    ],
)  # fmt: skip
def test_settings_refused(tmp_path: Path, setting: str, helpful: str) -> None:
    """A setting that cannot be laid over the recipe is refused with the setting and what there is."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(_written(tmp_path, DESIGN), settings=[setting])
    assert helpful in str(caught.value)


def test_a_stage_may_have_its_own_schedule() -> None:
    """A stage's schedule is its own; without one it is None here and the recipe's in the plan."""
    assert stage(schedule=constant()).schedule == constant()
    assert stage().schedule is None
