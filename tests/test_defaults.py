"""The recipe of a person who said nothing, and a recipe as a file to edit."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from pathlib import Path

import pytest

from lehr.defaults import HEAD_VIEWS, UNJUDGED_VIEWS, commented, default_augment, default_recipe
from lehr.recipe import Recipe, Stage
from lehr.recipe_file import load_recipe
from lehr.resolving import resolve
from lehr.schedules import cosine, restarts, warmup
from lehr.selection import ModelFacts, ParameterFacts

BODY, HEAD = ParameterFacts("body.weight", (1000, 1000)), ParameterFacts("fc.weight", (5, 1000))
LARGE = ModelFacts("net", (BODY, HEAD), head=("fc",))
HEADLESS = ModelFacts("net", (BODY, HEAD))
TINY = ModelFacts("net", (ParameterFacts("body.weight", (9, 9)), HEAD), head=("fc",))


@pytest.mark.parametrize(
    ("samples", "batch", "epochs"),
    [(50, 4, [60, 40]), (500, 32, [60, 40]), (5_000, 32, [8, 6]), (50_000, 32, [8, 6])],
)
def test_a_pretrained_model_trains_its_head_first(samples: int, batch: int, epochs: list[int]) -> None:
    """From tens to tens of thousands of images: the head alone, then everything, the backbone slower."""
    recipe = default_recipe(LARGE, samples=samples, image_side=224)
    plan = resolve(recipe, LARGE, samples=samples)
    assert [stage.train for stage in recipe.stages] == [("head",), ("all",)]
    assert recipe.batch_size == batch
    assert [stage.epochs for stage in plan.stages] == epochs
    last = plan.stages[1].peak_lr
    assert last["backbone"] < last["head"]
    assert all(stage.steps >= 300 for stage in plan.stages)


@pytest.mark.parametrize("samples", [1, 5, 50, 500, 5_000, 50_000])
@pytest.mark.parametrize("facts", [LARGE, HEADLESS, TINY], ids=["large", "headless", "tiny"])
@pytest.mark.parametrize("pretrained", [True, False])
@pytest.mark.parametrize("validated", [True, False])
def test_every_default_can_be_planned_and_read_back(
    samples: int, facts: ModelFacts, pretrained: bool, validated: bool, tmp_path: Path
) -> None:
    """Whatever the model and the data, the default is a plan, and as a file reads back as an equal
    recipe."""
    recipe = default_recipe(
        facts, samples=samples, image_side=224, pretrained=pretrained, validated=validated
    )
    assert resolve(recipe, facts, samples=samples).total_steps > 0
    assert recipe.restore_best is validated
    (tmp_path / "recipe.toml").write_text(
        commented(recipe, request="x", file="recipe.toml"), encoding="utf-8"
    )
    assert load_recipe(tmp_path / "recipe.toml") == recipe


@pytest.mark.parametrize("samples", [50, 500, 5_000, 50_000])
def test_the_head_is_trained_on_fixed_views(samples: int) -> None:
    """What is frozen with the head alone is computed once for each view, and the views come again; the thawed stage sees
    fresh ones. Without validation there are more views, and fewer steps."""
    lengths = []
    for validated, views in ((True, HEAD_VIEWS), (False, UNJUDGED_VIEWS)):
        recipe = default_recipe(LARGE, samples=samples, image_side=224, validated=validated)
        head, everything = resolve(recipe, LARGE, samples=samples).stages
        assert head.views == views
        assert head.epochs >= 2 * views
        assert everything.views == "fresh"
        lengths.append(head.steps)
    assert lengths[0] >= lengths[1]


@pytest.mark.parametrize(("facts", "pretrained"), [(TINY, True), (HEADLESS, True), (LARGE, False)])
def test_where_nothing_large_is_frozen_views_are_fresh(facts: ModelFacts, pretrained: bool) -> None:
    """A small network is computed in no time, and where all trains nothing could be kept."""
    recipe = default_recipe(facts, samples=500, image_side=224, pretrained=pretrained)
    assert {stage.views for stage in resolve(recipe, facts, samples=500).stages} == {"fresh"}


def test_a_validated_run_never_ends_below_its_head() -> None:
    """Each stage, and so the run, ends with the best weights of all its epochs, the head's own among them."""
    plan = resolve(default_recipe(LARGE, samples=500, image_side=224), LARGE, samples=500)
    assert all(stage.restore_best for stage in plan.stages)


def test_every_key_has_a_line_of_its_own_in_the_file() -> None:
    """Whatever a recipe says, the file can say what it means."""
    changed = replace(
        default_recipe(LARGE, samples=500, image_side=224), accumulate=2, layer_decay=0.9, min_lr=1e-9, lr_rule="linear",
        ema=0.9, patience="2 epochs", views=2, cache="off", cache_budget="1 GiB", cache_dtype="bf16", cache_exact=True,
    )  # fmt: skip
    lines = commented(changed, request="x", file="r").splitlines()
    for key in _EXPLAINED:
        place = next(n for n, line in enumerate(lines) if line.startswith(f"{key} = "))
        assert lines[place - 1].startswith("# ")


_EXPLAINED = {f.name for f in fields(Recipe)} - {
    "stages",
    "optimizer",
    "schedule",
    "no_decay",
    "seed",
    "monitor",
}


def test_norms_stay_as_they_were_pretrained() -> None:
    """Where a model has norms, the default leaves them alone; where it has none, it does not speak of them."""
    normed = ModelFacts("net", (BODY, ParameterFacts("bn.weight", (9,), norm=True), HEAD), head=("fc",))
    plan = resolve(default_recipe(normed, samples=500, image_side=224), normed, samples=500)
    assert plan.trainable(plan.stages[1]) == {"body.weight", "fc.weight"}


def test_from_nothing_there_is_nothing_to_freeze() -> None:
    """Without pretrained weights everything trains from the first step."""
    recipe = default_recipe(LARGE, samples=500, image_side=224, pretrained=False)
    assert [stage.train for stage in recipe.stages] == [("all",)]


def test_a_pretrained_model_without_a_known_head_is_trained_gently() -> None:
    """Where no head is recognised all trains at once, slower than a model from nothing would."""
    gentle, fresh = (
        default_recipe(HEADLESS, samples=500, image_side=224, pretrained=p).stages for p in (True, False)
    )
    assert len(gentle) == 1
    assert gentle[0].train == ("all",)
    assert gentle[0].lr < fresh[0].lr  # type: ignore[operator]


def test_small_images_are_not_mirrored() -> None:
    """A mirrored digit is another sign: small images are shifted, larger ones cropped and mirrored."""
    assert default_augment(28) == ("shift",)
    assert "flip" in default_augment(224)
    assert default_recipe(LARGE, samples=50, image_side=28).augment == ("shift",)


ODD = Recipe(
    [
        Stage(
            "120 steps",
            train=["head", "norm"],
            lr=3e-4,
            schedule=restarts(first="10 steps"),
            batch_size=8,
            restore_best=False,
        ),
        Stage("2 epochs", train="*", lr={"blocks.1?.*": 1.5e-5, 'a"b': 0.25}, layer_decay=0.75, accumulate=2),
    ],
    optimizer={"name": "sgd", "momentum": 0.9, "nesterov": True, "betas": [0.9, 0.99]},
    schedule=warmup("3 steps", start=0.1) >> cosine(floor=1e-7),
    no_decay=[],
    augment=[],
    ema=0.999,
    patience="3 epochs",
    min_lr=1e-9,
    lr_rule="linear",
    seed=7,
)


@pytest.mark.parametrize(
    "recipe", [ODD, Recipe([Stage("1 epochs", train="all", lr=0.1)])], ids=["odd", "plain"]
)
def test_any_recipe_as_a_file_reads_back_equal(recipe: Recipe, tmp_path: Path) -> None:
    """Overrides, tables, quotes, empty lists and small numbers survive the way through the file."""
    (tmp_path / "recipe.toml").write_text(commented(recipe, request="x", file="r"), encoding="utf-8")
    assert load_recipe(tmp_path / "recipe.toml") == recipe


def test_the_file_is_a_pleasure_to_read() -> None:
    """Every key stands below a line that says what it is, no line is wider than 95 columns, rates look
    as people write them."""
    text = commented(
        default_recipe(LARGE, samples=50, image_side=224), request="fl --model net", file="r.toml"
    )
    lines = text.splitlines()
    assert max(map(len, lines)) <= 95
    assert "#   lehr plan fl --model net --recipe r.toml" in lines
    assert any(re.fullmatch(r"lr = \{ head = \de-3, backbone = \de-4 \}", line) for line in lines)
    top = lines[: lines.index("[[stages]]")]
    for number, line in enumerate(top):
        if " = " in line and not line.startswith("#"):
            assert top[number - 1].startswith("# "), line
    for key in (
        "optimizer",
        "schedule",
        "batch_size",
        "weight_decay",
        "no_decay",
        "augment",
        "monitor",
        "seed",
    ):
        assert any(line.startswith(f"{key} = ") for line in top), key


def test_a_strange_name_cannot_break_out_of_a_comment(tmp_path: Path) -> None:
    """A folder whose name holds a line break stays within the comment that names it."""
    recipe = default_recipe(LARGE, samples=50, image_side=224)
    text = commented(recipe, request="'a\nseed = 9\n'", file="r.toml")
    (tmp_path / "r.toml").write_text(text, encoding="utf-8")
    assert load_recipe(tmp_path / "r.toml").seed == 0
