"""Fixed views: which version of a sample an epoch shows, and what a plan says of it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

import lehr
from lehr.data import Transform, open_data
from lehr.data.datasets import PLAIN, ImageSamples, pure
from lehr.errors import RecipeError
from lehr.plan_changes import plan_differences
from lehr.planned_stage import PlannedStage
from lehr.recipe import Objective, Recipe, Stage
from lehr.replanning import check_continuation
from lehr.resolving import resolve
from lehr.run.randomness import Randomness
from lehr.run.sampler import Feed, feed, view_of
from plans import NET, TWO_STAGES, plan_of

TRANSFORM = Transform((8, 8), 8, (0.5,), (0.25,), channels=1, augment=("shift", "erase"))
HEAD, ALL = TWO_STAGES.stages


def images(seed: int = 3) -> ImageSamples:
    return open_data("digits").train(TRANSFORM, seed=seed)


class Noisy(Dataset[Any]):
    """A person's own data set, which draws."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([index, float(torch.rand(())), random.random()])


def stages(views: Any, samples: int, *, before: str = "3 epochs") -> Sequence[PlannedStage]:
    """Two stages, of which the second has these views."""
    first = Stage(before, train="head", lr=0.1)
    second = Stage("9 epochs", train="head", lr=0.1, views=views)
    return resolve(Recipe([first, second], batch_size=5), NET, samples=samples).stages


def epochs(source: Feed, stage: PlannedStage) -> list[torch.Tensor]:
    """What each epoch of a stage shows, sample by sample in the order of the data set."""
    out = []
    for epoch, *_ in stage.epoch_ranges():
        windows = list(source.windows(stage, epoch))
        order = torch.cat(source.indices(stage, epoch))
        rows = torch.cat([_inputs(batch) for window in windows for batch, _ in window])
        out.append(rows[order.argsort()])
    return out


def _inputs(batch: Any) -> torch.Tensor:
    tensor = batch[0] if isinstance(batch, list) else batch
    return tensor.flatten(1)


# --- which view an epoch shows ---


@given(st.integers(2, 50) | st.just("fresh"), st.integers(0, 10**6))
def test_the_view_is_the_epoch_or_one_of_a_fixed_number_in_turn(views: Any, epoch: int) -> None:
    """`view_of` depends on the epoch of the run alone; consecutive epochs go through all views."""
    stage = replace(stages("fresh", 20)[0], views=views)
    view = view_of(stage, epoch)
    assert view == (epoch if views == "fresh" else epoch % views)
    if views != "fresh":
        assert {view_of(stage, epoch + k) for k in range(views)} == set(range(views))


def test_one_view_is_the_plain_one() -> None:
    """With one view no epoch shows a random change."""
    stage = stages(1, 20)[1]
    assert {view_of(stage, epoch) for epoch in range(9)} == {PLAIN}


@pytest.mark.parametrize("views", [2, 4, "fresh"])
def test_fixed_views_of_images_come_again(views: Any) -> None:
    """With k views the epochs e and e + k of a stage show the same images to the bit, those between others; `fresh` never
    shows one again."""
    source, stage = feed(images(), seed=3), stages(views, len(images()))[1]
    shown = epochs(source, stage)
    for a in range(len(shown)):
        for b in range(a):
            same = views != "fresh" and (a - b) % views == 0
            assert torch.equal(shown[a], shown[b]) is same


def test_one_view_is_what_is_validated() -> None:
    """`views = 1` trains on the validation transform, whatever the augmentation."""
    source, stage = feed(images(), seed=3), stages(1, len(images()))[1]
    plain = open_data("digits")
    wanted = ImageSamples(images().items, plain.read, TRANSFORM.valid())
    wanted_rows = torch.stack([wanted[i][0] for i in range(len(wanted))]).flatten(1)
    assert all(torch.equal(rows, wanted_rows) for rows in epochs(source, stage))


def test_the_plain_view_of_one_image_draws_nothing() -> None:
    """It equals the validation transform, differs from the others, and leaves the random state alone."""
    samples = images()
    before = torch.get_rng_state()
    plain, label = samples.sample(4, PLAIN)
    assert torch.equal(before, torch.get_rng_state())
    assert label == samples[4][1]
    assert torch.equal(plain, samples[4, PLAIN][0])
    assert not torch.equal(plain, samples.sample(4, 0)[0])
    part = pure(Subset(samples, [4, 5]), seed=0)
    assert torch.equal(part.sample(0, PLAIN)[0], plain)


@pytest.mark.parametrize("views", [1, 2, 3])
def test_fixed_views_of_a_data_set_of_ones_own(views: int) -> None:
    """What it draws from the global generators follows from the view, so it comes again; with one view, always."""
    shown = epochs(feed(Noisy(), seed=3), stages(views, 12)[1])
    for a in range(len(shown)):
        for b in range(a):
            assert torch.equal(shown[a], shown[b]) is ((a - b) % views == 0)


def test_the_only_view_of_a_data_set_of_ones_own_is_its_first() -> None:
    """It has no version without random changes; its view 0 stands for it."""
    noisy = pure(Noisy(), seed=3)
    assert torch.equal(noisy.sample(5, PLAIN), noisy.sample(5, 0))


@pytest.mark.parametrize("views", [1, 2, "fresh"])
def test_tensors_have_any_views(views: Any) -> None:
    """Tensors in memory draw nothing: all views are the same."""
    data = TensorDataset(torch.randn(12, 3), torch.arange(12))
    shown = epochs(feed(data, seed=3), stages(views, 12)[1])
    assert all(torch.equal(rows, data.tensors[0]) for rows in shown)


def test_the_order_of_an_epoch_does_not_depend_on_the_views() -> None:
    """Views decide what a sample looks like, not when it comes."""
    source = feed(images(), seed=3)
    orders = [
        [batch.tolist() for batch in source.indices(stages(views, len(images()))[1], 5)]
        for views in (1, 4, "fresh")
    ]
    assert orders[0] == orders[1] == orders[2]


def test_an_epoch_goes_on_in_its_own_view() -> None:
    """What is left of an epoch after a stop is what the whole epoch has there."""
    source, stage = feed(images(), seed=3), stages(4, len(images()))[1]
    whole = list(source.windows(stage, 7))
    rest = list(source.windows(stage, 7, 2))
    for window, wanted in zip(rest, whole[2:], strict=True):
        assert torch.equal(window[0][0][0], wanted[0][0][0])


# --- a person's own loader, by its indices ---


@pytest.mark.parametrize("done", [0, 1, 3])
@pytest.mark.parametrize("way", ["tapped", "only_indices"])
def test_a_tapped_epoch_goes_on_as_the_plain_one(way: str, done: int) -> None:
    """In the middle of an epoch a person's loader is drawn again from the epoch's beginning, whichever way: the rest is
    the rest of the same epoch, and the states afterwards are those of now."""
    stage = stages("fresh", 22)[0]
    rest, states = [], []
    for draw in (None, way):
        loader = DataLoader(
            TensorDataset(torch.arange(22)), batch_size=5, shuffle=True, generator=_generator()
        )
        source = feed(loader, seed=0)
        randomness = Randomness(torch.device("cpu"), source.generators)
        torch.manual_seed(1)
        begun = randomness.take()
        if done:  # the epoch was begun, and stopped
            list(source.windows(stage, 0))
        drawn = None if draw is None else lambda _, source=source: _first(getattr(source, way)())
        windows = source.windows(stage, 0, done, randomness.rewound(begun), draw=drawn)
        rest.append(
            [batch.tolist() if draw else batch[0].tolist() for window in windows for batch, _ in window]
        )
        states.append(randomness.take())
    assert rest[0] == rest[1]
    assert len(rest[0]) == 5 - done
    assert all(torch.equal(t, states[1].tensors[name]) for name, t in states[0].tensors.items())


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(4)


def _first(drawn: Any) -> Any:
    return (one[0] if isinstance(one, tuple) else one for one in drawn)


def test_fixed_views_of_a_loader_are_refused() -> None:
    """A DataLoader cannot be asked for a view, so a number of them that nothing would follow is refused."""
    loader = DataLoader(TensorDataset(torch.randn(8, 4), torch.arange(8) % 2), batch_size=4)
    recipe = partial(Recipe, [Stage("1 epoch", train="all", lr=0.1)], batch_size=4)
    with pytest.raises(RecipeError, match=r'^views: stage 1 says 2, and a DataLoader .* say views="fresh"$'):
        lehr.fit(nn.Linear(4, 2), loader, recipe=recipe(views=2), device="cpu")
    lehr.fit(nn.Linear(4, 2), loader, recipe=recipe(), device="cpu")


# --- in a plan ---


def test_a_stage_has_its_own_views_or_the_recipes() -> None:
    """What a stage leaves out it takes from the recipe, `fresh` being a word like the numbers."""
    made = [HEAD, replace(HEAD, views=1), replace(HEAD, views="fresh", cache="off")]
    plan = resolve(replace(TWO_STAGES, stages=made, views=3, cache_budget="1 kB"), NET, samples=320)
    assert [stage.views for stage in plan.stages] == [3, 1, "fresh"]
    assert [stage.cache for stage in plan.stages] == ["auto", "auto", "off"]
    assert (plan.caching.budget, plan.caching.dtype, plan.caching.exact) == (1000, "fp32", False)


def test_the_page_says_which_stages_have_fixed_views() -> None:
    """Only where views are not fresh, in a line for each number."""
    assert "view" not in str(plan_of())
    assert "random changes" not in str(plan_of())
    made = [replace(HEAD, views=4), HEAD, replace(HEAD, views=1), replace(HEAD, views=4)]
    page = str(resolve(replace(TWO_STAGES, stages=made), NET, samples=320))
    assert "\n4 fixed views of each sample in stage 1 and 4, one an epoch in turn\n" in page
    assert "\nEach sample as it is, without random changes, in stage 3" in page


@pytest.mark.parametrize(
    ("stage", "why"),
    [
        (Stage("2 epochs", train="all", lr=0.1), "it trains the whole model, so nothing stays the same"),
        (Stage("1 epoch", train="head", lr=0.1), "in 1 epoch no view of a sample comes again"),
        (Stage("4 epochs", train="head", lr=0.1, views=4), "in 4 epochs no view of a sample comes again"),
        (
            Stage("4 epochs", objectives=[Objective("d", train="head", lr=0.1)]),
            "objectives take turns, and each freezes other parts",
        ),
    ],
    ids=["all", "one epoch", "as many views", "objectives"],
)
def test_a_cache_that_could_be_of_no_use_is_not_required(stage: Stage, why: str) -> None:
    """`require` is refused where it is known beforehand that nothing can be kept or used again, with the way out."""
    words = f'^stages.1.cache: "require", but {why}; say cache = "auto" in this stage$'
    for said in (replace(stage, cache="require"), stage):
        recipe = Recipe([HEAD, said], cache="auto" if said.cache else "require")
        with pytest.raises(RecipeError, match=words):
            resolve(recipe, NET, samples=320)
    resolve(Recipe([HEAD, stage]), NET, samples=320)


def test_a_cache_can_be_required() -> None:
    """Where part of the model is frozen, and views come again."""
    stage = Stage("5 epochs", train="head", lr=0.1, views=4, cache="require")
    assert plan_of(stage).stages[0].cache == "require"


# --- going on with other views ---


def test_other_views_are_a_difference_and_caches_are_none() -> None:
    """Views have an effect and are told; what caches may take has none."""
    was = resolve(TWO_STAGES, NET, samples=320)
    views = resolve(replace(TWO_STAGES, stages=[replace(HEAD, views=4), ALL]), NET, samples=320)
    assert plan_differences(was, views) == ("stage 1: views 4, was fresh",)
    assert plan_differences(views, was) == ("stage 1: views fresh, was 4",)
    caches = replace(TWO_STAGES, cache="off", cache_budget="1 MB", cache_dtype="bf16", cache_exact=True)
    assert plan_differences(was, resolve(caches, NET, samples=320)) == ()


def test_a_stage_that_has_begun_keeps_its_views() -> None:
    """Other views of a stage some of whose steps are done are refused, in words; of one to come they are not, nor are
    other caches."""
    was = resolve(replace(TWO_STAGES, stages=[replace(HEAD, views=4), ALL]), NET, samples=320)
    now = resolve(TWO_STAGES, NET, samples=320)
    check_continuation(was, now, stage=0, epoch=0, step=0)
    with pytest.raises(
        RecipeError, match="has begun with 4 fixed views of each sample, the plan has fresh views; "
    ):
        check_continuation(was, now, stage=0, epoch=1, step=10)
    with pytest.raises(
        RecipeError, match="has begun with fresh views, the plan has 4 fixed views of each sample; "
    ):
        check_continuation(now, was, stage=0, epoch=1, step=10)
    other = replace(TWO_STAGES, cache="off", cache_budget="9 MB", cache_exact=True)
    check_continuation(now, resolve(other, NET, samples=320), stage=0, epoch=1, step=13)
