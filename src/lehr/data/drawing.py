"""Random numbers in a person's own data set: noticed while samples are made, looked for in a few of them, and named.

Two ways, since each misses what the other finds. The states of torch's CPU generator, `random` and `numpy.random` tell of
every draw from them, however rarely it changes a sample. Samples that are not the same twice tell of generators
that a data set keeps for itself; one of these that changes a sample rarely can escape (a test shows it).
"""

from __future__ import annotations

import ctypes
import random
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset, Subset, TensorDataset

from lehr.data.datasets import ImageSamples, Pure
from lehr.data.fingerprint import digest_of, spaced
from lehr.data.purity import preserved, seed_all, seed_of
from lehr.untrusted import printable

_LOOKED = 3  # sets the seeds of what is looked at apart from those of orders and of augmentation
_RANDOM_NAMES = re.compile(
    "random|jitter|augment|augmix|erasing|mixup|cutmix|elastic|blur|noise|dropout", re.IGNORECASE
)
_NAMED = 3  # of the transforms that draw
_KEY_BYTES = 624 * 4  # of a Mersenne twister


class Marked(NamedTuple):
    """A sample or a batch, and whether random numbers were drawn while it was made."""

    made: Any
    drew: bool


class Watched(Dataset[Any]):
    """The samples of another data set, each `Marked`."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: Any) -> Marked:
        before = _states()
        sample = self.dataset[index]
        return Marked(sample, not _are_equal(before, _states()))

    def __getitems__(self, indices: Sequence[Any]) -> list[Marked]:
        """The samples of a batch, at once where the data set can do that."""
        many = getattr(self.dataset, "__getitems__", None)
        if many is None:
            return [self[index] for index in indices]
        before = _states()
        samples = many(indices)
        drew = not _are_equal(before, _states())
        return [Marked(sample, drew) for sample in samples]


class Collating:
    """Makes a `Marked` batch of `Marked` samples; it can be sent to another process where `collate` can."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self._collate = collate

    def __call__(self, samples: Sequence[Marked]) -> Marked:
        """The batch; whatever collating draws counts, too."""
        before = _states()
        batch = self._collate([sample.made for sample in samples])
        drew = any(sample.drew for sample in samples) or not _are_equal(before, _states())
        return Marked(batch, drew)


def can_draw(dataset: Dataset[Any]) -> bool:
    """Whether it is not known that a data set draws nothing: tensors do not, and lehr's own samples follow from the view."""
    inner = _innermost(dataset)
    return type(inner) is not TensorDataset and not isinstance(inner, ImageSamples)


def probe(dataset: Dataset[Any], seed: int, *, n: int = 8, times: int = 3, fixed: bool = False) -> str:
    """Who draws random numbers while samples are made, found by making `n` samples `times` times; "" where nobody does.

    The global random states are left as they were; a generator that a data set keeps for itself is moved on.

    Args:
        dataset: a map-style data set, as a person gave it.
        seed: decides the states that the samples are made in.
        n: how many samples, evenly spaced, 1 or more.
        times: how often each, 2 or more.
        fixed: whether each sample is always made in the same state, as in a fixed view: then only what is not the
            same for all that is told.

    Example:
        >>> probe(TensorDataset(torch.zeros(4, 2)), seed=0)
        ''
    """
    if not can_draw(dataset):
        return ""
    inner: Any = dataset.dataset if isinstance(dataset, Pure) else dataset
    with preserved():
        for index in spaced(len(inner), n):
            digests = set()
            for number in range(times):
                seed_all(seed_of(_LOOKED, seed, 0 if fixed else number, index))
                before = _states()
                try:
                    sample = inner[index]
                except Exception:  # whatever a data set raises: the run itself will say it, with the step
                    return ""
                if not fixed and not _are_equal(before, _states()):
                    return who_draws(inner, index)
                digests.add(_known_by(sample))
            if len(digests) > 1:
                return f"{_name(inner)} makes another sample each time (a generator of its own?)"
    return ""


def who_draws(dataset: Dataset[Any], index: int = 0) -> str:
    """In words that a data set draws random numbers: its type, and which of its transforms do, where that can be found.

    Sample `index` is made once more with each transform of a `Compose` watched; where that shows nothing, their names do.

    Example:
        >>> class Flowers(Dataset[int]):
        ...     transform = nn.Sequential(nn.Identity(), nn.Dropout())
        >>> who_draws(Flowers())
        'Flowers draws random numbers (Dropout)'
    """
    inner = _innermost(dataset)
    named = (type(one).__name__ for one in _transforms(inner))
    found = _caught(dataset, inner, index) or [name for name in named if _RANDOM_NAMES.search(name)]
    found = list(dict.fromkeys(found))
    which = f" ({', '.join(map(printable, found[:_NAMED]))})" if found else ""
    return f"{_name(dataset)} draws random numbers{which}"


def _name(dataset: Any) -> str:
    return printable(type(_innermost(dataset)).__name__)


def _innermost(dataset: Any) -> Any:
    while type(dataset) in (Subset, Pure, Watched):
        dataset = dataset.dataset
    return dataset


def _transforms(dataset: Any) -> Iterator[Any]:
    """The single transforms that a data set has, those within a `Compose` or the like in order."""
    for key in ("transforms", "transform", "target_transform"):
        yield from _single(getattr(dataset, key, None))


def _single(transform: Any, depth: int = 0) -> Iterator[Any]:
    within = _parts(transform)
    if within is None or depth > 8:
        if callable(transform):
            yield transform
        return
    for one in within:
        yield from _single(one, depth + 1)


def _parts(transform: Any) -> Sequence[Any] | None:
    """What a transform is made of, where it applies all of it: of one that chooses its own name says more."""
    if isinstance(transform, list | tuple):
        return transform
    if isinstance(transform, nn.Sequential):
        return list(transform)
    if (
        type(transform).__name__ == "StandardTransform"
    ):  # torchvision's pair of one for images and one for targets
        return [transform.transform, transform.target_transform]
    if _is_compose(transform):
        parts: list[Any] = transform.transforms
        return parts
    return None


def _caught(dataset: Any, inner: Any, index: int) -> list[str]:
    """The transforms of a `Compose` that draw while a sample is made, each called as it is, and watched."""
    found: list[str] = []

    def watched(transform: Any) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            before = _states()
            made = transform(*args, **kwargs)
            if not _are_equal(before, _states()):
                found.append(getattr(transform, "__name__", type(transform).__name__))
            return made

        return call

    own = [(compose, compose.transforms) for compose in _composes(getattr(inner, "transform", None))]
    try:
        for compose, transforms in own:
            compose.transforms = [one if _is_compose(one) else watched(one) for one in transforms]
        with preserved():
            dataset[index]
    except Exception:  # then nothing is named
        found.clear()
    finally:
        for compose, transforms in own:
            compose.transforms = transforms
    return found


def _composes(transform: Any) -> list[Any]:
    """A `Compose` and those within it."""
    if not _is_compose(transform):
        return []
    return [transform, *(inner for one in transform.transforms for inner in _composes(one))]


def _is_compose(transform: Any) -> bool:
    return type(transform).__name__ == "Compose" and isinstance(getattr(transform, "transforms", None), list)


def _known_by(sample: Any) -> str:
    try:
        return digest_of(sample)
    except TypeError:  # nothing to compare; the states of the generators still tell
        return ""


def _states() -> tuple[torch.Tensor, Any, Any]:
    return torch.get_rng_state(), random.getstate(), _numpy_state()


def _numpy_state() -> Any:
    """The state of numpy's global generator. Of its usual one the bytes are read where they lie: numpy takes as long to
    hand them out as many a sample takes to be made.
    """
    generator = np.random.get_bit_generator()  # type: ignore[attr-defined]  # numpy forgets to name it
    if type(generator) is np.random.MT19937 and _lies_as_known():
        return ctypes.string_at(generator.ctypes.state_address, _KEY_BYTES + 4)
    return np.random.get_state(legacy=False)


@cache
def _lies_as_known() -> bool:
    """Whether a Mersenne twister has its 624 words and then its position where `_numpy_state` reads them."""
    generator = np.random.MT19937(1)
    generator.random_raw(3)
    state = generator.state["state"]
    found = ctypes.string_at(generator.ctypes.state_address, _KEY_BYTES + 4)
    wanted: bytes = state["key"].astype(np.uint32).tobytes() + int(state["pos"]).to_bytes(4, sys.byteorder)
    return found == wanted


def _are_equal(a: tuple[torch.Tensor, Any, Any], b: tuple[torch.Tensor, Any, Any]) -> bool:
    return torch.equal(a[0], b[0]) and a[1] == b[1] and _same(a[2], b[2])


def _same(a: Any, b: Any) -> bool:
    """Of numpy's states, whichever bit generator is set: tables of numbers and arrays."""
    if isinstance(a, dict):
        return all(_same(value, b[key]) for key, value in a.items())
    return bool(np.array_equal(a, b)) if isinstance(a, np.ndarray) else bool(a == b)
