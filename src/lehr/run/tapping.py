"""A person's own `DataLoader`, drawn from so that the indices of each batch are known; or by its indices alone.

Whichever way it is drawn, and in whatever turn, it moves the random states as it would by itself, so that the order of
every later epoch is the same. It must not know what the indices are for.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    default_collate,
    get_worker_info,
)

from lehr.data.drawing import Collating, Watched, can_draw, who_draws
from lehr.data.purity import preserved
from lehr.errors import DataError
from lehr.untrusted import brief

Watch = Callable[[str], None]
"""Told who draws random numbers while samples are made."""
_PIPES = getattr(torch.utils.data, "MapDataPipe", ())
_GIVE_INDICES = (SequentialSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


class Tap:
    """Draws from `loader`, which is never changed for longer than a call.

    `plain` gives what iterating it gives; `tapped` the same with the indices of each batch; `only_indices` the indices
    alone, without a sample being loaded. An iteration begins when it is called for, not at its first batch.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._loader = loader
        self._beside: DataLoader[Any] | None = None
        self._recorder = _Recorder(getattr(loader, "batch_sampler", None))
        self._is_watched = self._has_begun = False

    def plain(self) -> Iterator[Any]:
        """The batches of the next epoch."""
        self._beside = None  # its workers need not wait for a turn that will not come
        return self._begun(self._loader) if self._has_begun else iter(self._loader)

    def tapped(self, watch: Watch | None = None) -> Iterator[tuple[torch.Tensor, Any]]:
        """The batches of the next epoch, each with the indices of its samples, always in order.

        Args:
            watch: is told of each batch that drew random numbers while it was made: who did.
        """
        if not can_draw(self._loader.dataset) and self._loader.collate_fn is default_collate:
            watch = None
        if self._beside is None or self._is_watched != bool(watch):
            self._beside, self._is_watched = self._copy(watched=bool(watch)), bool(watch)
        batches = self._begun(self._beside)
        handed_out = self._recorder.handed_out

        def indexed(batch: Any) -> tuple[torch.Tensor, Any]:
            return _as_indices(handed_out.popleft()), batch

        if watch is None:
            return map(indexed, batches)
        return map(indexed, map(partial(unmarked, self._loader.dataset, watch), batches))

    def only_indices(self) -> Iterator[torch.Tensor]:
        """The indices of each batch of the next epoch."""
        loader = self._loader
        batches = iter(self._recorder)
        if not self._goes_on:
            torch.empty((), dtype=torch.int64).random_(generator=loader.generator)  # its workers' seed
            if loader.num_workers:
                batches = iter(self._recorder)  # new workers begin it anew
        self._has_begun = True
        ahead = deque(islice(batches, (loader.prefetch_factor or 0) * loader.num_workers))
        return self._looked_ahead(ahead, batches) if loader.num_workers else map(_as_indices, batches)

    def collated(self, indices: torch.Tensor, watch: Watch | None = None) -> Any:
        """The batch of these samples, made by this process, whose random states stay; `watch` as in `tapped`."""
        with preserved():
            samples = Watched(self._loader.dataset).__getitems__(indices.tolist())
            return unmarked(
                self._loader.dataset, watch or _unheard, Collating(self._loader.collate_fn)(samples)
            )

    def _looked_ahead(self, ahead: deque[Any], batches: Iterator[Any]) -> Iterator[torch.Tensor]:
        """Workers are handed indices some batches before theirs are taken, and another whenever one is."""
        while ahead:
            first = ahead.popleft()
            ahead.extend(islice(batches, 1))
            yield _as_indices(first)

    @property
    def _goes_on(self) -> bool:
        """Whether the person's loader would have workers by now that go on, so that it draws no seed for new ones."""
        has_workers = self._has_begun or getattr(self._loader, "_iterator", None) is not None
        return self._loader.persistent_workers and has_workers

    def _begun(self, loader: DataLoader[Any]) -> Iterator[Any]:
        """A new iteration of either loader, which draws a seed only where the person's would."""
        unseeded = self._goes_on and getattr(loader, "_iterator", None) is None
        self._has_begun = True
        with _generator_apart(loader) if unseeded else nullcontext():
            return iter(loader)

    def _copy(self, *, watched: bool) -> DataLoader[Any]:
        """The same loader, in order, whose batch sampler tells what it hands out."""
        loader, more = self._loader, dict[str, Any]()
        if loader.num_workers:
            more = {
                "prefetch_factor": loader.prefetch_factor,
                "persistent_workers": loader.persistent_workers,
            }
            more["multiprocessing_context"] = loader.multiprocessing_context
        if device := getattr(loader, "pin_memory_device", ""):
            more["pin_memory_device"] = device
        dataset: Dataset[Any] = Watched(loader.dataset) if watched else loader.dataset
        return DataLoader(
            dataset, batch_sampler=self._recorder, num_workers=loader.num_workers,
            collate_fn=Collating(loader.collate_fn) if watched else loader.collate_fn,
            pin_memory=loader.pin_memory, timeout=loader.timeout,
            worker_init_fn=Beginning(loader.worker_init_fn) if watched and loader.worker_init_fn else loader.worker_init_fn,
            generator=loader.generator, **more,
        )  # fmt: skip


class Beginning:
    """A person's `worker_init_fn`, which finds the data set that it knows in `get_worker_info()`; it can be sent to another
    process where that can.
    """

    def __init__(self, begin: Callable[[int], object]) -> None:
        self._begin = begin

    def __call__(self, number: int) -> None:
        """Begin worker `number`."""
        info = get_worker_info()
        if info is not None and isinstance(info.dataset, Watched):
            object.__setattr__(info, "dataset", info.dataset.dataset)  # it lets nobody set it
        self._begin(number)


def _unheard(_: str) -> None:
    """Nobody wants to know."""


def untappable(loader: DataLoader[Any]) -> str:
    """Why the indices of a loader's batches cannot be known, in words; "" where they can.

    A batch sampler that is not one of torch's is asked for its first batch: a copy of it is, so that nothing of it moves.
    """
    if type(loader) is not DataLoader:
        return f"{type(loader).__name__} is a DataLoader of its own kind, and the indices of its batches are not known"
    if loader.batch_sampler is None:
        return "the DataLoader makes no batches (batch_size=None), so their indices are not known"
    if isinstance(loader.dataset, _PIPES):
        return "the DataLoader has a data pipe, and the indices of its batches are not known"
    if type(loader.batch_sampler) is BatchSampler and type(loader.batch_sampler.sampler) in _GIVE_INDICES:
        return ""
    try:
        with preserved():
            first = next(iter(copy.deepcopy(loader.batch_sampler, {id(loader.dataset): loader.dataset})))
        _as_indices(first)
    except DataError as why:
        return str(why)
    except Exception as error:
        name = type(loader.batch_sampler).__name__
        return f"the batch sampler {name} cannot be looked at beforehand ({type(error).__name__})"
    return ""


class _Recorder:
    """Another batch sampler, that keeps what it hands out; the newest iteration's, in order."""

    def __init__(self, batches: Any) -> None:
        self._batches = batches
        self.handed_out: deque[Any] = deque()

    def __iter__(self) -> Iterator[Any]:
        self.handed_out = deque()
        return self._recorded(iter(self._batches), self.handed_out)

    def __len__(self) -> int:
        return len(self._batches)

    def _recorded(self, batches: Iterator[Any], handed_out: deque[Any]) -> Iterator[Any]:
        for batch in batches:
            handed_out.append(batch)
            yield batch


def _as_indices(batch: Any) -> torch.Tensor:
    """What a batch sampler gave, as a tensor of indices.

    Raises:
        DataError: for anything but whole numbers of 0 or more.
    """
    try:
        found = torch.as_tensor(batch if isinstance(batch, torch.Tensor) else list(batch))
    except (TypeError, ValueError, RuntimeError):
        found = torch.empty(())
    if found.ndim != 1 or found.is_floating_point() or found.dtype == torch.bool or bool((found < 0).any()):
        raise DataError(f"the batch sampler gives {brief(batch, 80)}, which is no list of indices")
    return found.to(torch.int64)


def unmarked(dataset: Dataset[Any], watch: Watch, batch: Any) -> Any:
    """The batch without its mark, which `watch` is told of."""
    if batch.drew:
        watch(who_draws(dataset))
    return batch.made


@contextmanager
def _generator_apart(loader: DataLoader[Any]) -> Iterator[None]:
    """Within this context the loader draws seeds from a generator that nobody else has."""
    own = loader.generator
    loader.generator = torch.Generator()
    try:
        yield
    finally:
        loader.generator = own
