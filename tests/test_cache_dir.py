"""Features that a run leaves for the next: found again where all that made them is the same, and nowhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

from short_runs import Ran, images, net, ran, recipe, same

EXACT = {"cache_exact": True}


def again(folder: Path, *, train: TensorDataset | None = None, weight: float = 1.0, **said: Any) -> Ran:
    """A run with features kept in `folder`; its first convolution's weights are multiplied by `weight`."""
    model = net()
    with torch.no_grad():
        model.blocks[0][0].weight.mul_(weight)
    return ran(recipe(**{**EXACT, **said}), model=model, train=train, valid=None, cache_dir=folder)


def computed(found: Ran) -> int:
    """The samples whose features were computed."""
    return found.closed["train"].computed


def test_the_next_run_computes_nothing(tmp_path: Path) -> None:
    """The same model, images and settings: the features are there, and the run is the same to the bit."""
    first, second = again(tmp_path), again(tmp_path)
    assert (computed(first), computed(second)) == (24, 0)
    assert same(first, second)


def test_another_head_and_other_rates_find_them_too(tmp_path: Path) -> None:
    """What trains has no part in the features."""
    again(tmp_path)
    assert computed(again(tmp_path, length="2 epochs", optimizer="sgd", seed=3)) == 0


@pytest.mark.parametrize("image", [0, 5, 11, 17, 23])
def test_one_changed_image_is_computed_anew(tmp_path: Path, image: int) -> None:
    """The batches of a changed image are computed anew, others are not; and the result is that of a run without, whichever
    batch of the epoch it is in.
    """
    again(tmp_path)
    changed = images()
    changed.tensors[0][image] += 1.0
    found = again(tmp_path, train=changed)
    assert 0 < computed(found) < 24
    assert same(found, ran(recipe(cache="off"), train=changed, valid=None))


def test_a_changed_label_is_noticed(tmp_path: Path) -> None:
    """Labels are kept with the features, and are not taken from an older run."""
    again(tmp_path)
    changed = images()
    changed.tensors[1][:] = (changed.tensors[1] + 1) % 3
    assert same(again(tmp_path, train=changed), ran(recipe(cache="off"), train=changed, valid=None))


@pytest.mark.parametrize(
    "other",
    [
        {"weight": 1.001},
        {"train": ["head", "blocks.1"]},
        {"cache_dtype": "fp16", "cache_budget": "700 bytes"},
    ],
)
def test_other_weights_cuts_and_types_find_nothing(tmp_path: Path, other: dict[str, Any]) -> None:
    """A prefix with other weights, another cut, another type: each has features of its own."""
    again(tmp_path)
    said = {"train": None, **other}
    trained = said.pop("train")
    found = ran_with(tmp_path, trained, said) if trained else again(tmp_path, **said)
    assert computed(found) >= 24


def test_features_that_may_round_otherwise_are_not_the_exact_ones(tmp_path: Path) -> None:
    """A run that asks for the model's own bits finds nothing of one that did not, also where that had nothing to fold."""
    again(tmp_path, cache_exact=False)
    assert computed(again(tmp_path)) == 24


def ran_with(folder: Path, trained: Any, said: dict[str, Any]) -> Ran:
    return ran(recipe(trained, **EXACT, **said), valid=None, cache_dir=folder)


def test_a_folder_that_cannot_be_is_said(tmp_path: Path) -> None:
    """Where nothing can be kept there a line says so, and the features are kept for the run alone."""
    (tmp_path / "file").write_text("")
    found = again(tmp_path / "file")
    assert computed(found) == 24
    assert "features are kept for this run alone: cache_dir" in found.notes
