"""Random numbers in a person's own data set are noticed, and whoever draws them is named."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import Dataset, Subset, TensorDataset, default_collate
from torchvision import transforms as v1
from torchvision.datasets import FakeData
from torchvision.transforms import v2

from lehr.data import Transform, drawing, open_data
from lehr.data.datasets import pure
from lehr.data.drawing import Collating, Watched, can_draw, probe, who_draws
from lehr.run.randomness import Randomness
from lehr.run.sampler import feed

PIXELS = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
AS_TENSOR = v1.ToTensor()


class Drawn(Dataset[Any]):
    """Samples that `change` makes of their index."""

    def __init__(self, change: Callable[[int], float], transform: Any = None) -> None:
        self.change, self.transform = change, transform

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Any:
        made = PIXELS if self.transform is None else self.transform(PIXELS)
        made = made if isinstance(made, torch.Tensor) else AS_TENSOR(made)
        return made + self.change(index), index % 3


def nothing(_: int) -> float:
    return 0.0


def changed(transform: Any) -> Drawn:
    return Drawn(nothing, transform)


class Private(Drawn):
    """Has a generator of its own, and changes one sample in `one_in`."""

    def __init__(self, one_in: int) -> None:
        self.generator = random.Random(5)
        super().__init__(lambda _: float(self.generator.randrange(one_in) == 0))


class ByName:
    """A transform of a person's own, whose name says nothing."""

    def __call__(self, image: Any) -> Any:
        return image if random.random() < 0.999 else image.rotate(3)


RARE = 1e-3
DRAWING = {
    "torch": (Drawn(lambda _: float(torch.rand(()) < RARE)), "Drawn draws random numbers"),
    "random": (Drawn(lambda _: float(random.random() < RARE)), "Drawn draws random numbers"),
    "numpy": (Drawn(lambda _: float(np.random.rand() < RARE)), "Drawn draws random numbers"),
    "a normal of numpy": (Drawn(lambda _: np.random.randn() * 1e-9), "Drawn draws random numbers"),
    "v1 flip": (
        changed(v1.Compose([v1.Resize(8), v1.RandomHorizontalFlip(RARE), AS_TENSOR])),
        "Drawn draws random numbers (RandomHorizontalFlip)",
    ),
    "v2, two of them": (
        changed(v2.Compose([v2.RandomResizedCrop(8), v2.Compose([v2.ColorJitter(0.1)])])),
        "Drawn draws random numbers (RandomResizedCrop, ColorJitter)",
    ),
    "erasing": (
        changed(v1.Compose([v1.RandomCrop(8), AS_TENSOR, v1.RandomErasing(0.02)])),
        "Drawn draws random numbers (RandomErasing)",
    ),
    "sequential": (changed(nn.Sequential(v2.RandomCrop(6))), "Drawn draws random numbers (RandomCrop)"),
    "one of one's own": (
        changed(v1.Compose([v1.Resize(8), ByName()])),
        "Drawn draws random numbers (ByName)",
    ),
    "torchvision's own": (
        FakeData(12, (3, 8, 8), transform=v1.Compose([v1.RandomVerticalFlip(RARE), AS_TENSOR])),
        "FakeData draws random numbers (RandomVerticalFlip)",
    ),
    "a part": (Subset(changed(v1.Compose([v1.RandomCrop(6)])), [3, 4]), "Drawn draws random numbers (RandomCrop)"),
}  # fmt: skip
QUIET: dict[str, Dataset[Any]] = {
    "plain": Drawn(float),
    "transforms": changed(v2.Compose([v2.Resize(8), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])),
    "tensors": TensorDataset(torch.zeros(9, 2)),
    "part of tensors": Subset(TensorDataset(torch.zeros(9, 2)), [1, 2]),
    "one sample": Subset(Drawn(float), [5]),
}


@pytest.mark.parametrize(("dataset", "words"), DRAWING.values(), ids=DRAWING)
def test_whoever_draws_is_found_and_named(dataset: Dataset[Any], words: str) -> None:
    """However rarely a sample is changed: each of the three generators tells of a draw, and the transform is named."""
    assert probe(dataset, seed=0) == words


@pytest.mark.parametrize("dataset", QUIET.values(), ids=QUIET)
def test_a_data_set_that_draws_nothing_is_left_in_peace(dataset: Dataset[Any]) -> None:
    """No false alarm: not for transforms that change a sample in the same way each time."""
    assert probe(dataset, seed=0) == ""
    assert probe(dataset, seed=0, fixed=True) == ""


def test_lehrs_own_samples_follow_from_the_view() -> None:
    """lehr's images are the same in the same view, augmented or not."""
    data = open_data("digits")
    transform = Transform((8, 8), 8, (0.5,), (0.5,), channels=1, augment=("shift", "erase"))
    assert not can_draw(data.train(transform))
    assert probe(data.train(transform), seed=0) == probe(Subset(data.valid(transform), [0, 1]), seed=0) == ""


@pytest.mark.parametrize("fixed", [True, False])
def test_a_generator_of_its_own_is_found_by_what_it_changes(fixed: bool) -> None:
    """Samples that are not the same twice are told, also where their views are fixed."""
    assert (
        probe(Private(2), seed=0, fixed=fixed)
        == "Private makes another sample each time (a generator of its own?)"
    )


def test_a_generator_of_its_own_that_changes_little_escapes() -> None:
    """The known limit: a private generator that changes a sample in a thousand is not found."""
    assert probe(Private(1000), seed=0) == ""


@pytest.mark.parametrize("dataset", [dataset for dataset, _ in DRAWING.values()], ids=DRAWING)
def test_fixed_views_need_no_quiet_data_set(dataset: Dataset[Any]) -> None:
    """What is drawn from a global generator follows from the view, so it is no trouble there."""
    assert probe(pure(dataset, seed=3), seed=0, fixed=True) == ""


def test_a_transform_that_draws_for_few_samples_is_named_by_its_name() -> None:
    """Where the sample that is made again shows nothing, names that speak of chance are told."""

    class RandomAtTimes:
        def __call__(self, image: Any) -> Any:
            return image

    assert who_draws(changed(v1.Compose([v1.Resize(8), RandomAtTimes()]))) == (
        "Drawn draws random numbers (RandomAtTimes)"
    )


def test_looking_leaves_everything_as_it_was() -> None:
    """The global random states, and the transforms of the data set, are untouched, also after an error."""
    compose = v1.Compose([v1.Resize(8), ByName()])
    own, randomness = list(compose.transforms), Randomness(torch.device("cpu"))
    before = randomness.take()
    for dataset in (changed(compose), Drawn(lambda _: 1 / 0)):
        probe(dataset, seed=0)
        who_draws(dataset)
    after = randomness.take()
    assert before.plain == after.plain
    assert all(torch.equal(tensor, after.tensors[name]) for name, tensor in before.tensors.items())
    assert all(a is b for a, b in zip(compose.transforms, own, strict=True))


def test_a_sample_that_cannot_be_had_is_left_to_the_run() -> None:
    """An error of the data set is no finding: the run tells it, with its step."""
    assert probe(Drawn(lambda _: 1 / 0), seed=0) == ""


def test_samples_of_unknown_kinds_are_judged_by_the_states() -> None:
    """What has no bytes to compare still tells of its draws."""

    class Odd(Drawn):
        def __getitem__(self, index: int) -> Any:
            self.change(index)
            return object()

    assert probe(Odd(nothing), seed=0) == ""
    assert probe(Odd(lambda _: random.random()), seed=0) == "Odd draws random numbers"


def test_another_bit_generator_of_numpy_is_compared_as_well() -> None:
    """Where a person has set numpy's global generator, its draws are noticed all the same."""
    before = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(3))
    try:
        dataset = Watched(Drawn(lambda _: float(np.random.rand())))
        assert dataset[0].drew
        assert not Watched(Drawn(nothing))[0].drew
    finally:
        np.random.set_bit_generator(before)


def test_numpys_state_is_read_where_it_lies() -> None:
    """Each kind of draw from numpy's usual generator is seen in the bytes that are read, and a new seed is."""
    assert drawing._lies_as_known()
    np.random.seed(1)
    states = [drawing._numpy_state()]
    for draw in (np.random.rand, np.random.randn, lambda: np.random.randint(5), lambda: np.random.seed(2)):
        draw()
        states.append(drawing._numpy_state())
    assert len(set(states)) == 5
    assert drawing._numpy_state() == states[-1]


# --- while samples are made ---


def test_each_sample_says_whether_something_was_drawn() -> None:
    """A mark is of the sample that drew; a batch is marked where one of its samples is."""
    dataset = Watched(Drawn(lambda index: float(torch.rand(())) if index == 7 else 0.0))
    assert [dataset[index].drew for index in (6, 7, 8)] == [False, True, False]
    assert len(dataset) == 40
    collate = pickle.loads(pickle.dumps(Collating(default_collate)))
    for indices, drew in (([6, 7], True), ([6, 8], False)):
        batch = collate([dataset[index] for index in indices])
        assert batch.drew is drew
        assert batch.made[1].tolist() == [index % 3 for index in indices]


def test_samples_given_at_once_are_marked_together() -> None:
    """A data set that gives several samples at once is asked so, and all of them carry the mark."""

    class Many(Drawn):
        def __getitems__(self, indices: list[int]) -> list[Any]:
            return [torch.tensor(index) + self.change(index) for index in indices]

    assert [mark.drew for mark in Watched(Many(nothing)).__getitems__([1, 2])] == [False, False]
    assert [mark.drew for mark in Watched(Many(lambda _: random.random())).__getitems__([1, 2])] == [
        True,
        True,
    ]
    assert [mark.drew for mark in Watched(Drawn(nothing)).__getitems__([1, 2])] == [False, False]


def test_collating_that_draws_is_noticed() -> None:
    """A batch can be changed at random as a whole."""

    def mixed(samples: list[Any]) -> Any:
        torch.rand(2)
        return default_collate(samples)

    assert Collating(mixed)([Watched(Drawn(nothing))[0]]).drew


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_watched_feed_gives_the_same_batches(workers: int) -> None:
    """lehr's own batches of a person's data set: the same samples, and who drew, once for each batch that did."""

    def rare(index: int) -> float:
        return float(torch.rand(())) if index in (13, 14, 30) else 0.0

    source = feed(Drawn(rare), seed=2, workers=workers)
    batches = [torch.arange(start, start + 10) for start in (0, 10, 20, 30)]
    told: list[str] = []
    watched, plain = list(source.batches_of(batches, 5, told.append)), list(source.batches_of(batches, 5))
    assert all(
        torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(watched, plain, strict=True)
    )
    assert told == ["Drawn draws random numbers"] * 2
