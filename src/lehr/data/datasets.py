"""Map-style datasets whose samples are pure: (seed, view, index) decides every bit of them.

`ImageSamples` is what `Data.train` and `Data.valid` give; `pure` makes any other map-style dataset behave the
same. Both take an index (view 0) or a pair (index, view), so a sampler of pairs drives them through a
DataLoader. This file must not know how an image is stored, nor who draws the indices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias, final

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

from lehr.data.augment import Pipeline
from lehr.data.listing import Item
from lehr.data.purity import preserved, preserved_torch, seed_all, seed_of, seed_torch
from lehr.errors import DataError

Key: TypeAlias = "int | tuple[int, int]"
Reader: TypeAlias = "Callable[[str, int], Image.Image]"

PLAIN = -1
"""The view without random changes, as in validation. Another data set than lehr's own has none: it is its view 0."""


@final
class ImageSamples(Dataset[tuple[Tensor, int]]):
    """Images of one half and their class indices: `samples[i]`, `samples[i, view]`, `samples.sample(i,
    view)`.

    `items` are the samples in order and `pipeline` what is done to each; both are for reading only. An index
    may be negative, as in a list. The global random states are left as they were.
    """

    def __init__(self, items: Sequence[Item], read: Reader, pipeline: Pipeline, *, seed: int = 0) -> None:
        self.items = tuple(items)
        self.pipeline = pipeline
        self.seed = seed
        self._read = read
        self._plain = replace(pipeline, augment=frozenset())

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: Key) -> tuple[Tensor, int]:
        index, view = key if isinstance(key, tuple) else (key, 0)
        return self.sample(index, view)

    def sample(self, index: int, view: int = 0) -> tuple[Tensor, int]:
        """The tensor and the class index of sample `index`, augmented as that view of it always is; not at all in the
        view `PLAIN`.

        Raises:
            IndexError: for an index outside the half.
            DataError: for a file that can no longer be read.
        """
        item = self.items[index]
        image = self._read(item.path, self.pipeline.transform.channels)
        if view == PLAIN or not self.pipeline.augment:
            return self._plain(image), item.label
        with preserved_torch():  # the pipeline draws from torch alone
            seed_torch(seed_of(self.seed, view, index % len(self.items)))
            return self.pipeline(image), item.label

    def part(self, indices: Sequence[int]) -> ImageSamples:
        """The samples of `indices`, in that order, as a dataset of its own; they are numbered anew."""
        return ImageSamples([self.items[i] for i in indices], self._read, self.pipeline, seed=self.seed)

    @property
    def targets(self) -> tuple[int, ...]:
        """The class index of every sample, without reading an image."""
        return tuple(item.label for item in self.items)


@final
class Pure(Dataset[Any]):
    """Another dataset, made pure by `pure`: three generators are seeded before each sample is taken."""

    def __init__(self, dataset: Dataset[Any], *, seed: int, draws: bool) -> None:
        self.dataset = dataset
        self.seed = seed
        self._draws = draws
        self._length = len(dataset)  # type: ignore[arg-type]  # `pure` has asked for it

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, key: Key) -> Any:
        index, view = key if isinstance(key, tuple) else (key, 0)
        return self.sample(index, view)

    def __getitems__(self, keys: Sequence[Key]) -> list[Any]:
        """The samples of one batch: a DataLoader calls this, and the random states are kept but once."""
        pairs = [key if isinstance(key, tuple) else (key, 0) for key in keys]
        if not self._draws:
            return [self.dataset[index] for index, _ in pairs]
        with preserved():
            return [self._seeded(index, view) for index, view in pairs]

    def sample(self, index: int, view: int = 0) -> Any:
        """What the dataset gives for `index`, its own random choices made as in that view of it always."""
        if not self._draws:
            return self.dataset[index]
        with preserved():
            return self._seeded(index, view)

    def _seeded(self, index: int, view: int) -> Any:
        seed_all(seed_of(self.seed, max(view, 0), index % max(1, self._length)))
        return self.dataset[index]


def pure(dataset: Dataset[Any], seed: int) -> ImageSamples | Pure:
    """`dataset` with samples that depend on (seed, view, index) alone.

    lehr's own are pure already and come back as they are; so does a `Subset` of them, as a half of its own.

    What a dataset draws from torch's CPU generator, `random` or `numpy.random` becomes repeatable; generators
    that it keeps for itself do not. A `TensorDataset` draws nothing and is not seeded.

    Raises:
        DataError: for a dataset without a length, or one that can only be iterated.
    """
    if isinstance(dataset, ImageSamples | Pure):
        return dataset
    if type(dataset) is Subset and isinstance(dataset.dataset, ImageSamples):
        return dataset.dataset.part(dataset.indices)  # a Subset asks for single indices, so for view 0 alone
    try:
        if isinstance(dataset, IterableDataset):
            raise TypeError("it can only be iterated")
        len(dataset)  # type: ignore[arg-type]
        if not callable(type(dataset).__getitem__):
            raise TypeError("it has no samples by index")
    except (TypeError, AttributeError, NotImplementedError) as error:
        raise DataError(
            f"a dataset of type {type(dataset).__name__} ({error}); expected a map-style one, with "
            "len(dataset) and dataset[index], because the order of samples is planned before they are read"
        ) from error
    return Pure(dataset, seed=seed, draws=type(dataset) is not TensorDataset)
