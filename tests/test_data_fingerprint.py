"""Fingerprints of data sets: the same data the same, other data not, and nothing else is touched."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

import lehr.data.fingerprint as module
from lehr.data import Data, Transform, open_data
from lehr.data.datasets import ImageSamples, pure
from lehr.data.fingerprint import Fingerprint, difference, fingerprint
from lehr.errors import DataError

PLAIN = Transform((8, 8), 8, (0.3,), (0.37,), channels=1)


@dataclass
class Given(Dataset[Any]):
    """A data set whose samples a function makes."""

    make: Callable[[int], Any]
    count: int = 20

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return self.make(index)


@pytest.fixture(scope="module")
def digits() -> Data:
    return open_data("digits")


def pairs(count: int = 30) -> TensorDataset:
    return TensorDataset(torch.arange(count * 4.0).reshape(count, 4), torch.arange(count) % 3)


def said(was: Dataset[Any], now: Dataset[Any]) -> str:
    return difference(fingerprint(was), fingerprint(now))


# --- lehr's own images ---


def test_images_are_known_by_content_class_and_transform(digits: Data) -> None:
    """The same images are the same; another image, class, order, transform or augmentation is not."""
    train = digits.train(PLAIN)
    assert fingerprint(train) == fingerprint(open_data("digits").train(PLAIN))
    assert fingerprint(train).kind == "listing"
    first, *rest = train.items

    def other(*items: Any) -> ImageSamples:
        return ImageSamples(items, digits.read, train.pipeline)

    assert said(train, other(first, *rest)) == ""
    for now in (
        other(replace(first, digest="0" * 16), *rest),
        other(replace(first, label=4), *rest),
        other(*rest, first),
        digits.train(replace(PLAIN, mean=(0.31,))),
        digits.train(replace(PLAIN, augment=("shift",))),
    ):
        assert said(train, now) == "other images, classes, order or transform"
    assert said(train, other(*rest)) == "24 samples where there were 25"


def test_a_half_of_images_is_known_by_its_own_items(digits: Data) -> None:
    """A subset of images is known as a data set of these images alone."""
    valid = digits.valid(PLAIN)
    part = fingerprint(Subset(valid, [5, 3]))
    assert (part.kind, part.samples) == ("listing", 2)
    assert part == fingerprint(valid.part([5, 3])) != fingerprint(valid.part([3, 5]))


def test_images_without_digests_are_looked_at(digits: Data) -> None:
    """Where nobody took digests, samples are taken: a changed image is found among those."""
    train = digits.train(PLAIN)
    bare = ImageSamples([replace(item, digest="") for item in train.items], digits.read, train.pipeline)
    assert fingerprint(bare).kind == "probes"
    swapped = ImageSamples(bare.items[::-1], digits.read, train.pipeline)
    assert said(bare, swapped).startswith("sample 0 is not what it was")


# --- tensors ---


def test_tensors_are_known_by_every_byte() -> None:
    """One changed bit of one tensor is found; another type or shape of the same bytes as well."""
    was = pairs()
    assert fingerprint(was).kind == "tensors"
    assert said(was, pairs()) == ""
    x, y = (tensor.clone() for tensor in was.tensors)
    changed = x.clone()
    changed.view(torch.int32)[17, 2] ^= 1
    words = "tensors with other content, type or shape"
    for now in (
        TensorDataset(changed, y),
        TensorDataset(x, y.flip(0)),
        TensorDataset(x.view(torch.int32), y),
        TensorDataset(x.reshape(30, 2, 2), y),
        TensorDataset(y, x),
        TensorDataset(x),
    ):
        assert said(was, now) == words
    assert said(was, pairs(29)) == "29 samples where there were 30"


@pytest.mark.parametrize(
    "dtype",
    [torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float64, torch.complex64],
)
def test_tensors_of_any_type_and_layout_are_known(dtype: torch.dtype) -> None:
    """Every plain type is known by its content, in whatever order its bytes lie in memory."""
    values = (torch.arange(12).reshape(3, 4) % 5).to(dtype)
    laid_out_otherwise = values.t().contiguous().t()
    assert fingerprint(TensorDataset(values)) == fingerprint(TensorDataset(laid_out_otherwise))
    assert fingerprint(TensorDataset(values)) != fingerprint(TensorDataset(values.flip(0)))
    assert fingerprint(Given(lambda _: values)) == fingerprint(Given(lambda _: laid_out_otherwise))


def test_parts_of_tensors_are_known_by_their_rows() -> None:
    """A subset is known by the rows it has, in their order, also of a subset; rows beside it may change."""
    was = pairs()
    x, y = (tensor.clone() for tensor in was.tensors)
    x[20] = -1
    now = TensorDataset(x, y)
    assert fingerprint(Subset(was, range(20))) == fingerprint(Subset(now, list(range(20))))
    assert fingerprint(Subset(was, range(20))) == fingerprint(Subset(Subset(now, range(25)), range(20)))
    assert fingerprint(Subset(was, range(20))) != fingerprint(Subset(was, range(19, -1, -1)))
    assert fingerprint(Subset(was, range(10, 25))) != fingerprint(Subset(now, range(10, 25)))


def test_of_huge_tensors_rows_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the limit evenly spaced rows are read, the first and the last among them, and no others."""
    monkeypatch.setattr(module, "WHOLE", 10 * 8)
    was, rows = torch.arange(1000), {0, 111, 222, 333, 444, 555, 666, 777, 888, 999}
    for row in (0, 1, 111, 500, 999):
        now = was.clone()
        now[row] = -1
        assert (said(TensorDataset(was), TensorDataset(now)) != "") == (row in rows)


def test_tensors_without_plain_bytes_are_not_known() -> None:
    """Sparse tensors, tensors without content and rows that are not there give no fingerprint, and no error."""
    sparse = torch.eye(4).to_sparse()
    for dataset in (
        TensorDataset(sparse),
        TensorDataset(torch.empty(4, 2, device="meta")),
        Subset(TensorDataset(torch.ones(3)), [0, 7]),
    ):
        assert fingerprint(dataset).kind == "none"


def test_another_kind_of_tensor_dataset_is_looked_at() -> None:
    """A type derived from TensorDataset may change what it gives, so its samples are taken."""

    class Doubled(TensorDataset):
        def __getitem__(self, index: int) -> Any:  # type: ignore[override]
            return tuple(2 * tensor[index] for tensor in self.tensors)

    assert fingerprint(Doubled(torch.arange(4))).kind == "probes"
    assert said(Doubled(torch.arange(4)), pure(pairs(4), 0)) == "another kind of data set"


# --- any other data set ---

SAMPLES: tuple[Callable[[int], Any], ...] = (
    lambda i: i,
    lambda i: i / 7,
    lambda i: complex(i, 1),
    lambda i: i % 2 == 0,
    lambda i: f"é{i}",
    lambda i: bytes([i]),
    lambda i: None if i % 2 else 0,
    lambda i: torch.full((2, 3), float(i)),
    lambda i: torch.tensor(i),
    lambda i: np.full((2, 3), i, dtype=np.int16),
    lambda i: np.float64(i),
    lambda i: np.str_(i),
    lambda i: Image.new("RGB", (4, 3), (i, 0, 0)),
    lambda i: Image.new("P", (4, 3), i),
    lambda i: {"x": [torch.ones(2), (i, "a")], "y": {1: 2.0}},
    lambda i: (torch.empty(0), i),
)


@pytest.mark.parametrize("make", SAMPLES)
def test_samples_of_every_usual_kind_are_known(make: Callable[[int], Any]) -> None:
    """Whatever samples usually are made of is known: eight of them, evenly spaced, each by its content."""
    was = fingerprint(Given(make))
    assert was == fingerprint(Given(make))
    assert was.probes == (0, 2, 5, 8, 10, 13, 16, 19)
    assert len(was.digests) == 8
    assert all(len(digest) == 32 for digest in was.digests)
    words = difference(was, fingerprint(Given(lambda i: make(i + 1))))
    assert words.startswith("sample 0 is not what it was, and ")
    assert words.endswith(" more of the 8 that were looked at")


def test_values_that_look_alike_are_not() -> None:
    """Values of other types, and the same bytes cut otherwise, have other digests."""
    looks = [
        1,
        1.0,
        True,
        "1",
        b"1",
        [1],
        [[1]],
        {1: 1},
        [1, 1],
        ["1", ""],
        ["", "1"],
        torch.tensor(1),
        np.int64(1),
    ]
    looks += [torch.tensor([1]), torch.tensor(1, dtype=torch.int32), np.array([1]), None, "None", 0.0, -0.0]
    digests = [fingerprint(Given(lambda _, look=look: look, 1)).digests for look in looks]
    assert len(set(digests)) == len(looks)


def test_the_first_sample_that_changed_is_named() -> None:
    """A changed sample among those that are looked at is named by its index."""
    was = Given(lambda i: torch.tensor(i))
    assert said(was, Given(lambda i: torch.tensor(-1 if i == 5 else i))) == "sample 5 is not what it was"
    assert said(was, Given(lambda i: torch.tensor(-1 if i == 3 else i))) == ""  # nobody looked at it


def test_random_samples_are_known() -> None:
    """What a data set draws from the three global generators is the same each time, so it is known."""
    drawing = Given(lambda i: (i, torch.rand(2), random.random(), np.random.rand(2)))
    assert fingerprint(drawing).kind == "probes"
    assert fingerprint(drawing) == fingerprint(drawing)
    assert fingerprint(drawing) != fingerprint(drawing, seed=1)
    assert fingerprint(drawing, seed=1) == fingerprint(pure(drawing, 1))


def test_what_cannot_be_known_is_not() -> None:
    """A generator of its own, an unknown kind of value, an error, a value within itself: only the number is known."""
    rng = np.random.default_rng(0)
    itself: list[Any] = []
    itself.append(itself)

    def fails(index: int) -> int:
        raise OSError(f"no file {index}")

    for make in (
        lambda _: rng.random(),
        lambda _: object(),
        lambda _: {1, 2},
        lambda _: np.array([object()]),
        lambda _: itself,
        fails,
    ):
        assert fingerprint(Given(make)) == Fingerprint(20, "none")
    unknown, known = fingerprint(Given(fails)), fingerprint(Given(lambda i: i))
    assert difference(unknown, known) == difference(unknown, unknown) == ""
    assert difference(known, unknown) == "samples that cannot be taken, or that are no longer the same twice"
    assert difference(unknown, Fingerprint(1, "none")) == "1 sample where there were 20"


def test_small_and_empty_data_sets() -> None:
    """Fewer samples than are looked at are all looked at; none at all is a fingerprint, too."""
    assert fingerprint(Given(lambda i: i, 3)).probes == (0, 1, 2)
    assert fingerprint(Given(lambda i: i, 0)) == Fingerprint(0, "probes")
    assert fingerprint(TensorDataset(torch.empty(0, 3))).kind == "tensors"


@pytest.mark.parametrize(
    "dataset",
    [
        pairs(),
        Given(lambda i: (i, torch.rand(2), random.random(), np.random.rand(2))),
        Given(lambda i: torch.rand(2)[i]),  # raises after it drew
    ],
)
def test_no_random_state_is_touched(dataset: Dataset[Any]) -> None:
    """Taking a fingerprint leaves torch's, Python's and numpy's generators as they were."""
    states = (torch.get_rng_state(), random.getstate(), np.random.get_state())
    fingerprint(dataset)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert all(np.array_equal(was, now) for was, now in zip(states[2], np.random.get_state(), strict=True))


def test_no_random_state_is_touched_by_augmentation(digits: Data) -> None:
    """Augmented images are known by what they are made of, and nothing is drawn."""
    augmented = digits.train(replace(PLAIN, augment=("shift", "erase")))
    state = torch.get_rng_state()
    assert fingerprint(augmented).kind == "listing"
    assert torch.equal(state, torch.get_rng_state())


def test_data_sets_that_can_only_be_iterated_are_refused() -> None:
    """What cannot be planned has no fingerprint either."""

    class Stream(IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            return iter(range(3))

    with pytest.raises(DataError, match="can only be iterated"):
        fingerprint(Stream())
