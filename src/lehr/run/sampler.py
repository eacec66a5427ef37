"""The order of the data: a pure function of (seed, epoch), and the batches that follow from it.

`Feed` is what the loop draws from. It hides whether samples come from tensors in memory, from a data set
(with any number of worker processes) or from a data loader that the person made. It must not know models,
losses or devices.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, default_collate

from lehr.data.datasets import PLAIN, Pure, pure
from lehr.data.drawing import Collating, Watched, can_draw
from lehr.data.purity import seed_of
from lehr.errors import DataError, FeedError, is_from_worker, plain_words
from lehr.planned_stage import PlannedStage
from lehr.planning import batches_in
from lehr.run.batches import gathered
from lehr.run.tapping import Tap, Watch, unmarked, untappable

Window = list[tuple[Any, int]]
_ORDER = 1  # sets the seeds of orders apart from those of augmentation, (seed, view, index), unless seed is 1 itself
_AS_IT_IS = nullcontext()
_MOST = 256  # batches gathered at once from tensors in memory, and the most bytes:
_CHUNK = 1 << 20  # so small that what lies ready is nothing beside a step; so large that calls do not count


def order(samples: int, seed: int, epoch: int) -> torch.Tensor:
    """The order in which epoch `epoch` (0-based) visits the samples: a permutation, int64, shape [samples].

    Example:
        >>> bool((order(10, seed=0, epoch=3).sort().values == torch.arange(10)).all())
        True
    """
    generator = torch.Generator().manual_seed(seed_of(_ORDER, seed, epoch))
    return torch.randperm(samples, generator=generator)


def cut(indices: torch.Tensor, batch_size: int) -> list[torch.Tensor]:
    """Batches of an order: `batch_size` each, the last short; a lone last sample joins the batch before it.

    Example:
        >>> [len(batch) for batch in cut(torch.arange(9), 4)]
        [4, 5]
    """
    count = batches_in(len(indices), batch_size)
    ends = [*(batch_size * k for k in range(1, count)), len(indices)]
    return [indices[a:b] for a, b in zip([0, *ends], ends, strict=False)]


def view_of(stage: PlannedStage, epoch: int) -> int:
    """The view of each sample in an epoch of a stage: the epoch itself, or one of a fixed number in turn; where that is 1,
    the view without random changes (`PLAIN`).
    """
    if stage.views == "fresh":
        return epoch
    return PLAIN if stage.views == 1 else epoch % stage.views


@dataclass(frozen=True)
class Feed:
    """Where batches come from: `samples` in one pass, drawn by `workers` processes (0: by this one)."""

    source: Dataset[Any] | DataLoader[Any]
    samples: int
    seed: int = 0
    workers: int = 0
    pin: bool = False

    @property
    def loader(self) -> DataLoader[Any] | None:
        """The person's own data loader, where there is one."""
        return self.source if isinstance(self.source, DataLoader) else None

    @property
    def _beside(self) -> bool:
        """Whether samples are loaded by other processes."""
        return bool(self.workers if self.loader is None else self.loader.num_workers)

    @property
    def batches(self) -> int | None:
        """Batches in one pass over the person's own loader; None where the plan decides."""
        return None if self.loader is None else len(self.loader)

    def windows(
        self,
        stage: PlannedStage,
        epoch: int,
        done: int = 0,
        rewound: AbstractContextManager[object] = _AS_IT_IS,
        *,
        draw: Callable[[int], Iterator[Any]] | None = None,
    ) -> Iterator[Window]:
        """The batches of each round of an epoch, each with its number of samples; the last may be short.

        Args:
            stage: has the size of batches and windows.
            epoch: decides order and augmentation.
            done: rounds of the epoch to leave out. lehr's own batches of them are not even read; from a person's
                loader they are drawn again and dropped.
            rewound: the random states of the epoch's beginning, in which that is done.
            draw: gives other batches than the samples', in the same order, without so many; from a person's loader all.

        Raises:
            FeedError: for a sample that cannot be had, with the step.
        """
        begins = stage.start + (epoch - stage.first_epoch) * stage.steps_per_epoch
        number = done
        batches: Iterator[Any] | None = None
        while True:
            try:
                if batches is None:
                    batches = self._from(stage, epoch, done, rewound, draw)
                window = [(batch, size_of(batch)) for batch in islice(batches, stage.accumulate)]
            except Exception as error:
                step = begins + stage.first_of_round(number)
                raise FeedError(
                    f"step {step}: {died(error, beside=self._beside) or plain_words(error)}"
                ) from error
            if not window:
                return
            yield window
            number += 1

    def _from(
        self,
        stage: PlannedStage,
        epoch: int,
        done: int,
        rewound: AbstractContextManager[object],
        draw: Callable[[int], Iterator[Any]] | None,
    ) -> Iterator[Any]:
        skipped = done * stage.accumulate
        if self.loader is None:
            if draw:
                return draw(skipped)
            return self.batches_of(self.indices(stage, epoch)[skipped:], view_of(stage, epoch))
        if not skipped:
            return draw(0) if draw else self._tap.plain()
        with rewound:
            batches = draw(0) if draw else self._tap.plain()
            for _ in islice(batches, skipped):
                pass
        return batches

    def indices(self, stage: PlannedStage, epoch: int) -> list[torch.Tensor]:
        """The samples of each of lehr's own batches of an epoch, in order."""
        return cut(order(self.samples, self.seed, epoch), stage.batch_size)

    @property
    def generators(self) -> tuple[torch.Generator, ...]:
        """The generators that the person's own loader draws its order from, each once."""
        loader = self.loader
        if loader is None:
            return ()
        samplers = (loader, loader.sampler, getattr(loader.batch_sampler, "sampler", None))
        found = [g for s in samplers if isinstance(g := getattr(s, "generator", None), torch.Generator)]
        return tuple({id(generator): generator for generator in found}.values())

    def sequential(
        self, batch_size: int, *, draw: Callable[[Sequence[torch.Tensor]], Iterator[Any]] | None = None
    ) -> Iterator[Any]:
        """Every sample once, in order: for validation. `draw` gives other batches than the samples', of their indices.

        Raises:
            FeedError: for a sample that cannot be had.
        """
        try:
            batches = list(torch.split(torch.arange(self.samples), batch_size))
            if draw:
                yield from draw(batches)
            elif self.loader is not None:
                yield from self._tap.plain()
            else:
                yield from self.batches_of(batches, 0)
        except Exception as error:
            raise FeedError(
                f"validation: {died(error, beside=self._beside) or plain_words(error)}"
            ) from error

    def batches_of(
        self, batches: Sequence[torch.Tensor], view: int, watch: Watch | None = None
    ) -> Iterator[Any]:
        """The batches of these samples, each in that view; not of a person's own loader. `watch` is told who draws random
        numbers while samples are made.
        """
        if type(self.source) is TensorDataset:
            return _of_tensors(self.source, batches, pin=self.pin)
        self._keys.keys = [[(index, view) for index in batch.tolist()] for batch in batches]
        if watch is None or not can_draw(self.dataset):
            return iter(self._by_key)
        return map(partial(unmarked, self.dataset, watch), self._watched_by_key)

    @cached_property
    def untappable(self) -> str:
        """Why the indices of a batch cannot be known, in words; "" where they can, as for lehr's own batches."""
        return "" if self.loader is None else untappable(self.loader)

    def tapped(self, watch: Watch | None = None) -> Iterator[tuple[torch.Tensor, Any]]:
        """The batches of the next epoch of a person's own loader, each with the indices of its samples; where that is
        not `untappable`. `watch` is told who draws random numbers while samples are made.
        """
        return self._tap.tapped(watch)

    def only_indices(self) -> Iterator[torch.Tensor]:
        """The indices that the batches of the next epoch of a person's own loader would have, without one being loaded."""
        return self._tap.only_indices()

    def made_here(self, indices: torch.Tensor, view: int = 0, watch: Watch | None = None) -> Any:
        """The batch of these samples, made by this process; in that view, unless they are of a person's own loader."""
        if self.loader is not None:
            return self._tap.collated(indices, watch)
        if type(self.source) is TensorDataset:
            return next(_of_tensors(self.source, [indices], pin=self.pin))
        dataset = pure(self.dataset, self.seed)
        return default_collate([dataset.sample(index, view) for index in indices.tolist()])

    @cached_property
    def _tap(self) -> Tap:
        assert self.loader is not None
        return Tap(self.loader)

    @property
    def dataset(self) -> Dataset[Any]:
        """The samples themselves."""
        return self.source.dataset if isinstance(self.source, DataLoader) else self.source

    @cached_property
    def _keys(self) -> _Keys:
        return _Keys()

    @cached_property
    def _by_key(self) -> DataLoader[Any]:
        """Draws samples by (index, view). Its workers live as long as the feed; with a generator of its own
        it leaves torch's global one untouched, so that nothing depends on how many workers there are.
        """
        return self._keyed(pure(self.dataset, self.seed), default_collate, stay=True)

    @property
    def _watched_by_key(self) -> DataLoader[Any]:
        """The same, whose batches tell whether random numbers were drawn; for some epochs, so its workers do not stay."""
        dataset = Pure(Watched(self.dataset), seed=self.seed, draws=True)
        return self._keyed(dataset, Collating(default_collate), stay=False)

    def _keyed(
        self, dataset: Dataset[Any], collate: Callable[[list[Any]], Any], *, stay: bool
    ) -> DataLoader[Any]:
        return DataLoader(
            dataset, batch_sampler=self._keys, pin_memory=self.pin, collate_fn=collate,
            num_workers=self.workers, persistent_workers=stay and self.workers > 0,
            worker_init_fn=_quietly, generator=torch.Generator().manual_seed(self.seed),
        )  # fmt: skip


def _quietly(_: int) -> None:
    """A Ctrl-C in a terminal, and its closing, reach the workers as well; the step under way still needs their
    samples.
    """
    for number in signal.Signals:
        if number.name in ("SIGINT", "SIGHUP"):
            signal.signal(number, signal.SIG_IGN)


def died(error: Exception, *, beside: bool = False) -> str:
    """What to say where a process that loads samples has died; empty where an error is another.

    torch raises this one in the middle of whatever the program does at that moment. What is seen first may be a
    connection that breaks: where there are such processes (`beside`), to one of them.
    """
    said = plain_words(error)
    broke = beside and isinstance(error, (ConnectionError, EOFError)) and not is_from_worker(error)
    if not broke and (not isinstance(error, RuntimeError) or "DataLoader worker" not in said):
        return ""
    return (
        f"{said.splitlines()[0]}; a process that loads samples died, often for want of memory: try fewer "
        "workers, or none (workers=0, --workers 0)"
    )


class _Keys:
    """The batch sampler of the workers: the keys of the epoch that is about to begin."""

    def __init__(self) -> None:
        self.keys: list[list[tuple[int, int]]] = []

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter(self.keys)

    def __len__(self) -> int:
        return len(self.keys)


def _of_tensors(
    source: TensorDataset, batches: Sequence[torch.Tensor], *, pin: bool = False
) -> Iterator[Any]:
    """Batches of tensors in memory: gathered in large pieces, which costs a tenth of one at a time; in memory from which a
    GPU copies by itself (`pin`), where they are not there already.
    """
    if not batches:
        return
    a_batch = max(len(batch) for batch in batches) * sum(t[:1].nbytes for t in source.tensors)
    chunk = max(1, min(_MOST, _CHUNK // max(1, a_batch)))
    for first in range(0, len(batches), chunk):
        some = batches[first : first + chunk]
        if len(some) == 1:  # held by nobody but who has asked for it
            yield [gathered(tensor, some[0], pin=pin) for tensor in source.tensors]
            continue
        sizes = [len(batch) for batch in some]
        together = torch.cat(list(some))
        yield from (
            list(parts)
            for parts in zip(
                *(torch.split(gathered(t, together, pin=pin), sizes) for t in source.tensors), strict=True
            )
        )


def feed(data: Any, *, seed: int, workers: int = 0, pin: bool = False, what: str = "train") -> Feed:
    """A feed over a map-style data set or a data loader.

    Raises:
        DataError: for data without a length, without `__getitem__`, or empty; for a validation loader that
            leaves samples out.
    """
    loader = data if isinstance(data, DataLoader) else None
    dataset: Any = data if loader is None else loader.dataset
    if isinstance(dataset, IterableDataset) or not callable(getattr(dataset, "__getitem__", None)):
        raise DataError(
            f"{what}: {type(dataset).__name__} has no samples by index; "
            "pass a map-style data set or a DataLoader over one"
        )
    sized: Any = dataset if loader is None else loader.sampler  # a sampler may draw a part of its data set
    try:
        samples = len(sized)
    except TypeError:
        raise DataError(
            f"{what}: {type(sized).__name__} has no length, so an epoch cannot be planned; give it __len__"
        ) from None
    if not samples or (loader is not None and not len(loader)):
        raise DataError(
            f"{what}: empty; there is nothing to {'train on' if what == 'train' else 'validate with'}"
        )
    left_out = (
        samples % loader.batch_size if loader is not None and loader.drop_last and loader.batch_size else 0
    )
    if left_out and what == "valid":
        raise DataError(
            f"valid: the DataLoader would leave out the last {left_out} of {samples} samples, "
            "and a validation set is used whole; make it with drop_last=False"
        )
    return Feed(data, samples - left_out, seed, workers, pin)


def size_of(batch: Any) -> int:
    """The number of samples in a batch: the length of the first tensor found in it.

    Raises:
        DataError: for a batch without a tensor.
    """
    first = _first_tensor(batch)
    if first is None:
        raise DataError(
            f"a batch is a {type(batch).__name__} without a tensor; "
            "expected tensors, or lists and dicts of them"
        )
    return len(first) if first.ndim else 1


def _first_tensor(batch: Any) -> torch.Tensor | None:
    if isinstance(batch, torch.Tensor):
        return batch
    parts = (
        batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else ()
    )
    return next((found for part in parts if (found := _first_tensor(part)) is not None), None)


def samples_in(window: Window) -> int:
    """The samples of a window of batches."""
    return sum(size for _, size in window)
