"""The order of the data is a pure function, and nothing depends on who loads the samples."""

from __future__ import annotations

import os
import random
import signal
from collections import namedtuple
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, SubsetRandomSampler, TensorDataset

from lehr.errors import DataError, FeedError
from lehr.planning import PlannedStage
from lehr.recipe import Recipe, Stage
from lehr.resolving import resolve
from lehr.run.facts import inspect
from lehr.run.randomness import Randomness
from lehr.run.sampler import Feed, Window, cut, died, feed, order, samples_in, size_of

FORKS = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


class Noisy(Dataset[Any]):
    """A person's own data set, which draws its augmentation from all three generators."""

    def __init__(self, samples: int = 21) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        noise = torch.rand(()) + random.random() + np.random.rand()
        return torch.tensor([float(index), float(noise)]), index % 3


def stage(
    *, samples: int, length: str = "2 epochs", batch_size: int = 4, accumulate: int = 1
) -> PlannedStage:
    facts = inspect(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3)))
    one = Stage(length, train="all", lr=0.1, batch_size=batch_size, accumulate=accumulate)
    return resolve(Recipe([one]), facts, samples=samples).stages[0]


def of_epoch(source: Feed, batch_size: int, epoch: int) -> Iterator[Any]:
    """The batches of an epoch in a stage without fixed views."""
    return source.batches_of(cut(order(source.samples, source.seed, epoch), batch_size), epoch)


def drawn(source: Feed, *, epoch: int = 0, batch_size: int = 4) -> list[torch.Tensor]:
    return [inputs for inputs, _ in of_epoch(source, batch_size, epoch)]


@given(st.integers(1, 300), st.integers(0, 2**63), st.integers(0, 10**6))
def test_the_order_is_a_permutation_that_two_numbers_decide(samples: int, seed: int, epoch: int) -> None:
    """`order` visits every sample once, and is the same whatever was drawn before."""
    first = order(samples, seed, epoch)
    torch.rand(3)
    assert torch.equal(order(samples, seed, epoch), first)
    assert torch.equal(first.sort().values, torch.arange(samples))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    """No two of a hundred epochs, and no two of a hundred seeds, share an order; torch's own generator is
    left alone."""
    before = torch.get_rng_state()
    orders = {tuple(order(50, seed, epoch).tolist()) for seed in range(100) for epoch in range(100)}
    assert len(orders) == 100 * 100
    assert torch.equal(torch.get_rng_state(), before)


def test_the_order_stays_from_version_to_version() -> None:
    """A recorded order: a change of it would make old runs impossible to repeat."""
    assert order(10, seed=0, epoch=0).tolist() == [8, 1, 0, 7, 9, 4, 2, 3, 6, 5]


@given(st.integers(1, 200), st.integers(1, 64))
def test_batches_cover_the_order_and_none_is_a_lone_sample(samples: int, batch_size: int) -> None:
    """`cut` keeps every sample in order; a batch of one exists only where there is nothing to join, or it
    was asked for."""
    batches = cut(torch.arange(samples), batch_size)
    assert torch.equal(torch.cat(batches), torch.arange(samples))
    sizes = [len(batch) for batch in batches]
    assert all(size == batch_size for size in sizes[:-1])
    assert sizes[-1] <= batch_size + 1
    if batch_size > 1 and samples > 1:
        assert 1 not in sizes


@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 5))
@settings(deadline=None, max_examples=60)
def test_the_windows_of_an_epoch_are_the_steps_of_the_plan(samples: int, size: int, accumulate: int) -> None:
    """An epoch gives exactly as many windows as the plan has steps, over every sample once; only the last
    may be short."""
    planned = stage(samples=samples, batch_size=size, accumulate=accumulate)
    data = feed(TensorDataset(torch.arange(samples)), seed=3)
    windows = list(data.windows(planned, epoch=1))
    assert len(windows) == planned.steps_per_epoch
    assert all(len(window) == accumulate for window in windows[:-1])
    assert sum(samples_in(window) for window in windows) == samples
    seen = torch.cat([batch[0] for window in windows for batch, _ in window])
    assert torch.equal(seen, order(samples, 3, 1))


def test_tensors_in_memory_and_any_other_data_set_give_the_same_batches() -> None:
    """What is gathered at once from a `TensorDataset` equals, to the bit and in form, what sample by
    sample gives."""
    tensors = TensorDataset(torch.randn(1100, 3), torch.arange(1100))
    one_by_one = feed(Subset(tensors, range(1100)), seed=1)
    fast, slow = list(of_epoch(feed(tensors, seed=1), 4, 2)), list(of_epoch(one_by_one, 4, 2))
    assert len(fast) == len(slow) == 275
    for a, b in zip(fast, slow, strict=True):
        assert type(a) is type(b) is list
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])


@FORKS
def test_workers_change_nothing() -> None:
    """With 0, 1 and 2 workers, batches and a person's own random augmentation are the same, and no
    generator has moved."""
    torch_state, python_state, numpy_state = torch.get_rng_state(), random.getstate(), np.random.get_state()
    runs = []
    for workers in (0, 1, 2):
        data = feed(Noisy(), seed=5, workers=workers)
        runs.append([torch.cat(drawn(data, epoch=epoch)) for epoch in (0, 1, 0)])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))
    first, second, again = runs[0]
    assert torch.equal(first, again)
    noise = [{int(i): float(n) for i, n in epoch} for epoch in (first, second)]
    assert all(noise[0][i] != noise[1][i] for i in range(21)), "an epoch is a view of its own"
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == python_state
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), numpy_state, strict=True))


@FORKS
def test_an_epoch_that_is_left_halfway_does_not_reach_into_the_next() -> None:
    """Workers that had read ahead when a stage ended in the middle of an epoch start the next one cleanly."""
    runs = []
    for workers in (0, 2):
        data = feed(Noisy(40), seed=2, workers=workers)
        batches = of_epoch(data, 4, 0)
        begun = [next(batches)[0] for _ in range(3)]
        runs.append([*begun, *drawn(data, epoch=1, batch_size=6)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert len(runs[0]) == 3 + 7


def test_validation_sees_every_sample_once_in_order_and_always_alike() -> None:
    """`sequential` gives the whole set in its own order, the same samples every time, for any batch size."""
    data = feed(Noisy(), seed=0, what="valid")
    once = torch.cat([inputs for inputs, _ in data.sequential(4)])
    again = torch.cat([inputs for inputs, _ in data.sequential(21)])
    assert torch.equal(once, again)
    assert once[:, 0].tolist() == list(range(21))
    assert [len(inputs) for inputs, _ in data.sequential(5)] == [5, 5, 5, 5, 1]


def test_a_persons_loader_decides_batches_and_order() -> None:
    """A `DataLoader` is drawn from as it is, with its own length."""
    loader = DataLoader(TensorDataset(torch.arange(10)), batch_size=4)
    data = feed(loader, seed=0)
    assert (data.loader, data.samples, data.batches) == (loader, 10, 3)
    windows = list(data.windows(stage(samples=10, accumulate=2), epoch=7))
    assert [[size for _, size in window] for window in windows] == [[4, 4], [2]]
    assert torch.cat([batch[0] for batch in data.sequential(99)]).tolist() == list(range(10))


def test_a_loader_over_a_part_counts_that_part() -> None:
    """A `DataLoader` whose sampler draws 6 of 10 samples has 6 samples."""
    loader = DataLoader(TensorDataset(torch.arange(10)), batch_size=4, sampler=SubsetRandomSampler(range(6)))
    assert feed(loader, seed=0).samples == 6


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


class Endless(Dataset[int]):
    def __getitem__(self, index: int) -> int:
        return index


@pytest.mark.parametrize(
    ("data", "what", "message"),
    [
        (Stream(), "train", "train: Stream has no samples by index; pass a map-style data set"),
        (DataLoader(Stream()), "train", "train: Stream has no samples by index"),
        (3, "valid", "valid: int has no samples by index"),
        (Endless(), "train", "train: Endless has no length.*give it __len__"),
        ([], "train", "train: empty; there is nothing to train on"),
        ([], "valid", "valid: empty; there is nothing to validate with"),
        (DataLoader([1, 2], batch_size=4, drop_last=True), "train", "train: empty"),
        (
            DataLoader(list(range(10)), batch_size=4, drop_last=True),
            "valid",
            r"valid: the DataLoader would leave out the last 2 of 10 samples.*drop_last=False",
        ),
    ],
    ids=[
        "stream",
        "loader of a stream",
        "number",
        "endless",
        "empty",
        "no validation",
        "all dropped",
        "dropped",
    ],
)
def test_data_that_cannot_be_planned_is_refused(data: Any, what: str, message: str) -> None:
    """What has no samples by index, no length, no samples, or leaves validation samples out is refused,
    saying which."""
    with pytest.raises(DataError, match=message):
        feed(data, seed=0, what=what)


def test_a_loader_may_drop_what_it_trains_on() -> None:
    """`drop_last` on a training loader is the person's choice, and on a validation loader it is where
    nothing is lost."""
    loader = DataLoader(list(range(10)), batch_size=5, drop_last=True)
    assert feed(loader, seed=0, what="valid").batches == 2
    assert feed(DataLoader(list(range(9)), batch_size=5, drop_last=True), seed=0).batches == 1


Pair = namedtuple("Pair", "names images")


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        (torch.zeros(5, 2), 5),
        (torch.tensor(1.0), 1),
        ([torch.zeros(4), torch.zeros(4)], 4),
        ({"text": ["a", "b", "c"], "ids": torch.zeros(3, 7)}, 3),
        ((("a.png", "b.png"), [{"image": torch.zeros(2, 3)}]), 2),
        (Pair(("a", "b"), torch.zeros(2)), 2),
    ],
    ids=["tensor", "scalar", "list", "texts first", "nested", "named"],
)
def test_the_size_of_a_batch_is_that_of_its_first_tensor(batch: Any, size: int) -> None:
    """Samples are counted by the first tensor, wherever in the batch it lies and whatever stands before
    it."""
    assert size_of(batch) == size


def test_a_mapping_that_is_no_dict_has_a_size() -> None:
    """Batches of a tokenizer are mappings of their own kind; their samples are counted, too."""
    from collections import UserDict

    assert size_of(UserDict(ids=torch.zeros(6, 2))) == 6


@pytest.mark.parametrize("batch", ["text", ["a", "b"], {}, 3])
def test_a_batch_without_a_tensor_is_refused(batch: Any) -> None:
    """A batch in which there is no tensor is an error that says what it is."""
    with pytest.raises(DataError, match=f"a batch is a {type(batch).__name__} without a tensor"):
        size_of(batch)


# --- in the middle of an epoch ---


def tail_of(source: Feed, planned: PlannedStage, done: int, epoch: int = 1) -> list[Window]:
    return list(source.windows(planned, epoch, done))


def same(a: list[Window], b: list[Window]) -> bool:
    """Equal batches, of tensors to the bit, with equal sizes."""
    return len(a) == len(b) and all(
        size == other and all(torch.equal(torch.as_tensor(x), torch.as_tensor(y)) for x, y in zip(one, two, strict=True))
        for window, wanted in zip(a, b, strict=True)
        for (one, size), (two, other) in zip(window, wanted, strict=True)
    )  # fmt: skip


@given(st.integers(1, 50), st.integers(1, 9), st.integers(1, 4), st.data())
@settings(deadline=None, max_examples=40)
def test_an_epoch_gone_on_with_is_the_rest_of_it(
    samples: int, size: int, accumulate: int, data: st.DataObject
) -> None:
    """After `done` steps, of tensors and of any data set alike, come the windows that the whole epoch has then."""
    planned = stage(samples=samples, batch_size=size, accumulate=accumulate)
    done = data.draw(st.integers(0, planned.steps_per_epoch))
    epoch = data.draw(st.integers(0, 5))
    for source in (feed(TensorDataset(torch.arange(samples)), seed=3), feed(Noisy(samples), seed=3)):
        whole = tail_of(source, planned, 0, epoch)
        rest = tail_of(source, planned, done, epoch)
        assert len(whole) == planned.steps_per_epoch
        assert same(rest, whole[done:])


@FORKS
def test_an_epoch_gone_on_with_by_other_workers_is_the_rest_of_it() -> None:
    """Whoever loads the samples, and however many there are, before and after."""
    planned = stage(samples=26, accumulate=2)
    whole = tail_of(feed(Noisy(26), seed=5), planned, 0)
    for workers in (1, 2):
        source = feed(Noisy(26), seed=5, workers=workers)
        for done in (3, 1, 4, 0):  # also after an epoch that was not finished
            assert same(tail_of(source, planned, done), whole[done:])


class Counted(TensorDataset):
    """Tells which samples were read."""

    def __init__(self, samples: int) -> None:
        super().__init__(torch.arange(samples))
        self.read: list[int] = []

    def __getitem__(self, index: Any) -> Any:
        self.read.append(int(index))
        return super().__getitem__(index)


def test_what_is_done_is_not_read_again() -> None:
    """Of a data set only what is still to come is read."""
    source = Counted(20)
    windows = tail_of(feed(source, seed=0), stage(samples=20), done=3)
    assert source.read == order(20, 0, 1)[12:].tolist()
    assert len(windows) == 2


@pytest.mark.parametrize("own", [True, False], ids=["own generator", "global generator"])
def test_a_persons_loader_is_drawn_again_from_the_epochs_beginning(own: bool) -> None:
    """A shuffling loader, from the random states of the epoch's beginning, gives the rest of the same epoch,
    with the random numbers that its samples draw; and the states afterwards are those of now."""

    class Drawing(TensorDataset):
        def __getitem__(self, index: Any) -> Any:
            return (*super().__getitem__(index), torch.rand(()))

    generator = torch.Generator().manual_seed(4) if own else None
    loader = DataLoader(Drawing(torch.arange(22)), batch_size=4, shuffle=True, generator=generator)
    source, planned = feed(loader, seed=0), stage(samples=22, accumulate=2)
    assert source.generators == ((generator,) if own else ())
    randomness = Randomness(torch.device("cpu"), source.generators)
    states, whole = [randomness.take()], list[Window]()
    for window in source.windows(planned, 0):
        whole.append(window)
        states.append(randomness.take())
    assert len(whole) == 3
    for done in range(4):
        randomness.put(states[done])
        assert same(list(source.windows(planned, 0, done, randomness.rewound(states[0]))), whole[done:])
        assert all(torch.equal(t, states[3].tensors[name]) for name, t in randomness.take().tensors.items())


# --- what cannot be had ---


class Breaking(Dataset[Any]):
    """Fails at one index, in the way that it is told."""

    def __init__(self, bad: int, how: Any) -> None:
        self.bad, self.how = bad, how

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Any:
        return self.how() if index == self.bad else torch.tensor(index)


def gone() -> Any:
    raise OSError("a.png: gone")


def place_of(index: int, *, epoch: int = 1) -> int:
    """The step of the run in which an index comes, in batches of 4."""
    return 10 * epoch + order(40, 0, epoch).tolist().index(index) // 4


@FORKS
@pytest.mark.parametrize("workers", [0, 2])
def test_a_sample_that_cannot_be_had_names_the_step(workers: int) -> None:
    """The windows before it come whole; then the error says the step and what the sample's own error said, in
    plain words also from another process."""
    planned = stage(samples=40)
    source = feed(Breaking(7, gone), seed=0, workers=workers)
    step = place_of(7)
    windows = source.windows(planned, 1)
    before = [next(windows) for _ in range(step - 10)]
    assert sum(samples_in(window) for window in before) == 4 * (step - 10)
    with pytest.raises(FeedError, match=rf"^step {step}: a\.png: gone$") as failed:
        next(windows)
    assert isinstance(failed.value.__cause__, OSError)


def test_the_step_is_counted_from_where_the_epoch_goes_on() -> None:
    """Also where some steps were done before, and windows have several batches."""
    planned = stage(samples=40, accumulate=2)
    step = 5 + order(40, 0, 1).tolist().index(7) // 8
    for done in range(step - 5 + 1):
        with pytest.raises(FeedError, match=rf"^step {step}: a\.png: gone$"):
            list(feed(Breaking(7, gone), seed=0).windows(planned, 1, done))


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (lambda: "a text", "expected Tensor as element . in argument 0, but got str"),
        (lambda: torch.zeros(3), "stack expects each tensor to be equal size"),
        (lambda: 1 / 0, "division by zero"),
        (lambda: [][0], "list index out of range"),
    ],
    ids=["another type", "another shape", "a mistake", "no index"],
)
def test_a_bad_sample_is_one_error(how: Any, words: str) -> None:
    """Whatever is wrong with a sample comes as one kind of error, with the step and the first reason."""
    with pytest.raises(FeedError, match=rf"^step {place_of(7)}: .*({words})"):
        list(feed(Breaking(7, how), seed=0).windows(stage(samples=40), 1))


def test_a_batch_without_a_tensor_in_mid_run_is_one_error() -> None:
    """A batch that cannot be counted names its step, too."""

    class Texts(Breaking):
        def __getitem__(self, index: int) -> Any:
            return "text"

    with pytest.raises(FeedError, match=r"^step 10: a batch is a list without a tensor"):
        list(feed(Texts(0, gone), seed=0).windows(stage(samples=40), 1))


def test_a_persons_loader_that_fails_names_the_step() -> None:
    """While it gives batches, and while those that were done are drawn again."""
    loader = DataLoader(Breaking(7, gone), batch_size=4)
    planned = stage(samples=40)
    with pytest.raises(FeedError, match=r"^step 11: a\.png: gone$"):
        list(feed(loader, seed=0).windows(planned, 1))
    with pytest.raises(FeedError, match=r"^step 15: a\.png: gone$"):
        list(feed(loader, seed=0).windows(planned, 1, done=5))


def test_a_sample_that_cannot_be_validated_says_so() -> None:
    """There is no step in a validation."""
    for data in (Breaking(7, gone), DataLoader(Breaking(7, gone))):
        with pytest.raises(FeedError, match=r"^validation: a\.png: gone$"):
            list(feed(data, seed=0, what="valid").sequential(4))


def killed() -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


@FORKS
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_worker_that_dies_names_the_step() -> None:
    """Killed, for want of memory for example, it is told with its end, and with what to do."""
    first = int(order(40, 0, 1)[0])
    with pytest.raises(
        FeedError, match=r"^step 10: DataLoader worker .*(exited unexpectedly|killed by signal)"
    ) as failed:
        list(feed(Breaking(first, killed), seed=0, workers=1).windows(stage(samples=40), 1))
    assert str(failed.value).endswith(
        "; a process that loads samples died, often for want of memory: try fewer workers, or none (workers=0, --workers 0)"
    )


def test_other_errors_are_no_deaths() -> None:
    """Only torch's own words for it count."""
    assert "fewer workers" in died(
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. \nmore")
    )
    assert not died(RuntimeError("CUDA error"))
    assert not died(ValueError("DataLoader worker"))
