"""A person's own loader, drawn so that the indices of its batches are known: the same order, the same random states."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    Sampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lehr.errors import DataError
from lehr.run.randomness import Randomness, RandomState
from lehr.run.sampler import feed
from lehr.run.tapping import Tap, untappable

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
SAMPLES = 22


class Numbers(Dataset[Any]):
    """Each sample is its index."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([index, index])


class Hasty(Sampler[int]):
    """Draws its order from all three global generators, as soon as it is iterated."""

    def __init__(self, _: Any = None) -> None:
        self.epochs = 0

    def __len__(self) -> int:
        return SAMPLES

    def __iter__(self) -> Iterator[int]:
        self.epochs += 1
        return iter([*torch.randperm(11).tolist(), *random.sample(range(11), 5), *np.random.permutation(6)])


class Lazy(Sampler[int]):
    """Draws each index when it is asked for."""

    def __len__(self) -> int:
        return SAMPLES

    def __iter__(self) -> Iterator[int]:
        return (int(torch.randint(0, SAMPLES, ())) for _ in range(SAMPLES))


class Batches(Sampler[list[int]]):
    """A batch sampler of one's own, of uneven batches."""

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(SAMPLES).tolist()
        return iter([order[:5], order[5:6], order[6:]])


def own() -> torch.Generator:
    return torch.Generator().manual_seed(4)


ONE = {"batch_size": 4}
TWO_WORKERS = {"num_workers": 2, **ONE}
STAYING = {"persistent_workers": True, **TWO_WORKERS}
LOADERS: dict[str, Callable[[], DataLoader[Any]]] = {
    "in order": lambda: DataLoader(Numbers(), **ONE),
    "shuffled": lambda: DataLoader(Numbers(), shuffle=True, **ONE),
    "own generator": lambda: DataLoader(Numbers(), shuffle=True, generator=own(), **ONE),
    "drop last": lambda: DataLoader(Numbers(), shuffle=True, drop_last=True, **ONE),
    "weighted": lambda: DataLoader(Numbers(), sampler=WeightedRandomSampler([1.0, 2.0] * 11, 30), **ONE),
    "subset sampler": lambda: DataLoader(Numbers(), sampler=SubsetRandomSampler(range(3, 17)), **ONE),
    "with replacement": lambda: DataLoader(
        Numbers(), sampler=RandomSampler(Numbers(), replacement=True, num_samples=50, generator=own()), **ONE
    ),
    "subset": lambda: DataLoader(Subset(Numbers(), range(15)), shuffle=True, **ONE),
    "hasty": lambda: DataLoader(Numbers(), sampler=Hasty(), **ONE),
    "lazy": lambda: DataLoader(Numbers(), sampler=Lazy(), **ONE),
    "own batches": lambda: DataLoader(Numbers(), batch_sampler=Batches()),
    "batches of hasty": lambda: DataLoader(Numbers(), batch_sampler=BatchSampler(Hasty(), 3, True)),
    "workers": lambda: DataLoader(Numbers(), shuffle=True, **TWO_WORKERS),
    "workers, own generator": lambda: DataLoader(Numbers(), shuffle=True, generator=own(), **TWO_WORKERS),
    "workers, hasty": lambda: DataLoader(Numbers(), sampler=Hasty(), **TWO_WORKERS),
    "workers, lazy": lambda: DataLoader(Numbers(), sampler=Lazy(), prefetch_factor=1, **TWO_WORKERS),
    "workers, own batches": lambda: DataLoader(Numbers(), batch_sampler=Batches(), num_workers=2),
    "staying": lambda: DataLoader(Numbers(), shuffle=True, **STAYING),
    "staying, lazy": lambda: DataLoader(Numbers(), sampler=Lazy(), generator=own(), **STAYING),
}  # fmt: skip
TURNS = {
    "tapped": "ttt",
    "by its indices": "iii",
    "in turns": "tipti",
    "plain first": "ptip",
    "left halfway": "tTtIi",
}


def random_state(loader: DataLoader[Any]) -> RandomState:
    return Randomness(torch.device("cpu"), feed(loader, seed=0).generators).take()


def equal(a: RandomState, b: RandomState) -> bool:
    return a.plain == b.plain and all(torch.equal(t, b.tensors[name]) for name, t in a.tensors.items())


def seeded() -> None:
    torch.manual_seed(1)
    random.seed(2)
    np.random.seed(3)


def epoch(tap: Tap, how: str, *, at_each: Callable[[], None]) -> list[list[int]]:
    """The indices of an epoch's batches; only two of them where `how` is a capital."""
    drawn: list[list[int]] = []
    batches: Iterator[Any] = {"t": tap.tapped, "i": tap.only_indices, "p": tap.plain}[how.lower()]()
    for batch in batches:
        at_each()
        if how.lower() == "t":
            indices, made = batch
            assert torch.equal(indices, made[:, 0])
            drawn.append(indices.tolist())
        else:
            drawn.append(batch.tolist() if how.lower() == "i" else batch[:, 0].tolist())
        if how.isupper() and len(drawn) == 2:
            break
    return drawn


def run(loader: DataLoader[Any], turns: str) -> tuple[list[list[list[int]]], list[RandomState]]:
    """The epochs, drawn in these ways, and the random states at each batch and at the end; with a model that draws
    random numbers in between."""
    seeded()
    states: list[RandomState] = []

    def at_each() -> None:
        torch.rand(2)
        states.append(random_state(loader))

    tap = Tap(loader)
    epochs = [epoch(tap, way, at_each=at_each) for way in turns]
    return epochs, [*states, random_state(loader)]


@pytest.mark.parametrize("turns", TURNS.values(), ids=TURNS)
@pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS)
def test_each_way_gives_the_same_epochs(make: Callable[[], DataLoader[Any]], turns: str) -> None:
    """Whichever way a loader is drawn, and in whatever turn, each epoch has the batches of the loader by itself, and
    the random states are the same at each of them."""
    plain, wanted = run(make(), "".join("P" if way.isupper() else "p" for way in turns))
    drawn, states = run(make(), turns)
    assert drawn == plain
    assert len(states) == len(wanted)
    assert all(equal(a, b) for a, b in zip(states, wanted, strict=True))


@pytest.mark.parametrize("turns", ["ttt", "iii", "tit"])
def test_a_loader_out_of_order_becomes_one_in_order(turns: str) -> None:
    """Where a loader gives batches as they come, they come in the order of its sampler, and the states move alike."""

    def make(**more: Any) -> DataLoader[Any]:
        return DataLoader(Numbers(), shuffle=True, **STAYING, **more)

    drawn, states = run(make(in_order=False), turns)
    assert drawn == run(make(), "p" * len(turns))[0]
    assert equal(states[-1], run(make(in_order=False), "p" * len(turns))[1][-1])


def test_what_a_loader_draws_without_lehr_is_seen() -> None:
    """A loader whose workers stay, and that was iterated before, has drawn their seed already."""
    loaders = [DataLoader(Numbers(), shuffle=True, **STAYING) for _ in range(3)]
    seen = []
    for loader, way in zip(loaders, "pti", strict=True):
        list(loader)
        seeded()
        seen.append((epoch(Tap(loader), way, at_each=lambda: None), random_state(loader)))
    assert all(epochs == seen[0][0] and equal(state, seen[0][1]) for epochs, state in seen)


def test_samples_are_made_as_the_loader_makes_them() -> None:
    """`collated` uses the loader's own way to make a batch, and the data set's own way to give several samples."""

    class Many(Numbers):
        def __getitems__(self, indices: list[int]) -> list[torch.Tensor]:
            return [torch.tensor([index, 100]) for index in indices]

    for dataset, second in ((Numbers(), 7), (Many(), 100)):
        loader = DataLoader(dataset, batch_size=4, collate_fn=lambda samples: torch.stack(samples).sum(1))
        assert Tap(loader).collated(torch.tensor([7, 2])).tolist() == [
            7 + second,
            2 + (second if second == 100 else 2),
        ]


def test_a_watched_loader_gives_the_same_batches_and_tells_who_draws() -> None:
    """Who draws random numbers is told of the batch in which it happens, from this process and from workers; the batches
    are the same."""

    class Rare(Numbers):
        def __getitem__(self, index: int) -> torch.Tensor:
            return super().__getitem__(index) + (0 * int(torch.rand(()) * 9) if index == 13 else 0)

    for workers in (0, 2):
        told: list[str] = []
        tap = Tap(DataLoader(Rare(), batch_size=4, num_workers=workers))
        after = [
            (indices.tolist(), batch[:, 0].tolist(), len(told)) for indices, batch in tap.tapped(told.append)
        ]
        assert [indices for indices, *_ in after] == [batch for _, batch, _ in after] == list_of_fours()
        assert [count for *_, count in after] == [0, 0, 0, 1, 1, 1]
        assert told == ["Rare draws random numbers"]
        assert [indices.tolist() for indices, _ in tap.tapped()] == list_of_fours()


def list_of_fours() -> list[list[int]]:
    return [list(range(start, min(start + 4, SAMPLES))) for start in range(0, SAMPLES, 4)]


# --- what cannot be known ---


class Keys(Batches):
    def __iter__(self) -> Iterator[Any]:
        return iter([["a", "b"], ["c"]])


class Closed(Batches):
    def __deepcopy__(self, _: Any) -> Any:
        raise TypeError("not to be copied")


class OwnLoader(DataLoader[Any]):
    pass


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: OwnLoader(Numbers()), "OwnLoader is a DataLoader of its own kind"),
        (lambda: DataLoader(Numbers(), batch_size=None), r"makes no batches \(batch_size=None\)"),
        (
            lambda: DataLoader(Numbers(), batch_sampler=Keys()),
            r"the batch sampler gives \['a', 'b'\], which is no list of indices",
        ),
        (
            lambda: DataLoader(Numbers(), batch_sampler=Closed()),
            r"the batch sampler Closed cannot be looked at beforehand \(TypeError\)",
        ),
    ],
    ids=["own kind", "no batches", "keys", "closed"],
)
def test_a_loader_whose_indices_cannot_be_known_says_why(
    make: Callable[[], DataLoader[Any]], words: str
) -> None:
    """A loader of another kind, without batches, or with a batch sampler that gives other things, is told in words."""
    assert re.match(f".*{words}", feed(make(), seed=0).untappable)


@pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS)
def test_looking_at_a_sampler_moves_nothing(make: Callable[[], DataLoader[Any]]) -> None:
    """A sampler of one's own is asked through a copy: neither it nor a random state is changed."""
    loader = make()
    seeded()
    before = random_state(loader)
    assert untappable(loader) == ""
    assert equal(random_state(loader), before)
    assert getattr(loader.sampler, "epochs", 0) == 0


def test_lehrs_own_batches_are_always_known() -> None:
    """A data set has no such trouble."""
    assert feed(Numbers(), seed=0).untappable == ""


def test_a_sampler_that_gives_something_else_later_is_an_error() -> None:
    """What was promised by the first batch is asked of each."""

    class Later(Batches):
        def __iter__(self) -> Iterator[Any]:
            return iter([[1, 2], [-3, 4]])

    tap = Tap(DataLoader(Numbers(), batch_sampler=Later()))
    with pytest.raises(DataError, match=r"gives \[-3, 4\], which is no list of indices"):
        list(tap.only_indices())
