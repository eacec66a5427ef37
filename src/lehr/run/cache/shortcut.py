"""A data set's samples on their short way through a model: the prefix once for each, the suffix alone from then on.

`Shortcut` stands between a feed and the loop, for one stage and one mode: where the loop draws batches of samples it
draws batches that are halfway through the model. Where there is no short way it hands on the samples, and says why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from importlib import metadata
from itertools import islice, starmap
from typing import Any, NamedTuple

import torch
from torch import nn

from lehr._version import __version__
from lehr.errors import RequestError
from lehr.free_room import size_text
from lehr.planned_stage import PlannedStage
from lehr.run.allocator import Ceiling
from lehr.run.batches import leaves
from lehr.run.cache.clock import Clock
from lehr.run.cache.kept import Kept, digests_of, key_of
from lehr.run.cache.known import Known
from lehr.run.cache.store import Store, merged, place_for, row_bytes
from lehr.run.cache.terms import Terms
from lehr.run.cache.ways import Halfway, TooLittle, Way, check_worth, find_way, through_suffix
from lehr.run.layout import laid_out
from lehr.run.prefix.cuts import CannotSplit
from lehr.run.sampler import Feed, Window, view_of
from lehr.run.untouched import rewound_after
from lehr.run.update import Loss, Returned, placed


class Drawn(NamedTuple):
    """A batch as it is drawn: the slots of its samples, which of them are `missing` in the cache, and a batch of those."""

    slots: torch.Tensor
    missing: torch.Tensor
    batch: Any


class Shortcut:
    """The samples of `feed`, for `loss(model, batch)`; `terms` say what for."""

    def __init__(self, model: nn.Module, feed: Feed, loss: Loss, terms: Terms) -> None:
        self.feed, self.way = feed, None
        self.clock = Clock(terms.on.device)
        self.samples = feed.samples
        self._model, self._loss, self._terms = model, loss, terms
        self._store: Store | None = None
        self._kept: Kept | None = None
        self._is_off = self._has_overflown = self._leaves_holes = False
        self._ends, self._view = "", 0
        self._ceiling = Ceiling(terms.on.device.type)
        self._never = torch.zeros(0, dtype=torch.bool)  # slots whose rows cannot be stored
        self._known: list[Known] = []
        self._with_buffers = [module for module in model.modules() if module._buffers]

    way: Way | None

    def loss(self, model: nn.Module, batch: Any) -> Returned:
        """The person's loss function, on a batch of samples or on one that is halfway through; where it calls the model
        otherwise than at first, it is called again, with the samples.
        """
        if not isinstance(batch, Halfway):
            return self._loss(model, batch)
        assert self.way is not None
        if self._leaves_holes:  # a pass without gradients leaves others than a step can use
            self._leaves_holes = False
            self._ceiling.allow()
        if name := self._terms.layout():
            batch = batch._replace(features=laid_out(batch.features, name))
        try:
            with rewound_after(CannotSplit, self._with_buffers, self._terms.on.device):
                return through_suffix(self.way, self._loss)(model, batch)
        except CannotSplit as why:
            self._ends = str(why)
        return self._loss(model, placed(self._samples_in(batch.slots), self._terms.on.device))

    def windows(
        self, stage: PlannedStage, epoch: int, done: int, rewound: AbstractContextManager[object]
    ) -> Iterator[Window]:
        """What `Feed.windows` gives, halfway through the model where there is a short way."""
        self._judge()
        self._check_unchanged()
        if not self._is_off:
            self._catch_up(stage, epoch, done)
            self._check_unchanged()  # what is seen now was seen before by a run that was not stopped
        if self._is_off:
            yield from self.feed.windows(stage, epoch, done, rewound)
            return
        self.clock.begin_epoch()
        draw = partial(self._drawn, stage, epoch)
        for window in self.feed.windows(stage, epoch, done, rewound, draw=draw):
            if any(drawn.missing.any() for drawn, _ in window):
                self._drop_gradients()
            halfway = [(self._through(drawn), size) for drawn, size in window]
            window.clear()  # the samples themselves are of no more use, and large
            yield halfway

    def _drop_gradients(self) -> None:
        """Those of the last update go now and not with the next: a pass through the prefix can use their room."""
        for parameter in self._model.parameters():
            parameter.grad = None

    def sequential(self, batch_size: int) -> Iterator[Any]:
        """What `Feed.sequential` gives, halfway through the model where there is a short way."""
        self.clock.begin_epoch()  # a GPU's times are read, which would gather otherwise
        self._check_unchanged()
        if self._is_off:
            yield from self.feed.sequential(batch_size)
            return
        for drawn in self.feed.sequential(batch_size, draw=self._in_order):
            yield self._through(drawn)

    def close(self) -> None:
        """Let go of what is kept."""
        if self._kept:
            self._kept.close()
        self._store, self._kept, self._is_off = None, None, True

    def _catch_up(self, stage: PlannedStage, epoch: int, done: int) -> None:
        """Compute what an interrupted run had computed before this place, in the batches in which it was computed; so a
        sample's features are the same bits. Where a person's own loader has drawn them this cannot be known.
        """
        if self.feed.loader is not None:
            return
        first = first_with_view(stage, epoch, fixed=self._terms.views == 1)
        draw = partial(self._drawn, stage, first)
        until = done if first == epoch else -(-len(self.feed.indices(stage, first)) // stage.accumulate)
        if not any(self._lacks(slots) for slots in self._slots(stage, first)[: until * stage.accumulate]):
            return
        if self.way:
            self._terms.said(f"what epoch {first + 1} had computed of the frozen part is computed once more")
        for window in islice(self.feed.windows(stage, first, 0, draw=draw), until):
            for drawn, _ in window:
                self._through(drawn)

    def _drawn(self, stage: PlannedStage, epoch: int, skipped: int = 0) -> Iterator[Drawn]:
        if self.feed.loader is not None:
            return self._theirs()
        self._view = view_of(stage, epoch)
        slots = self._slots(stage, epoch)[skipped:]
        return self._own(self.feed.indices(stage, epoch)[skipped:], slots, self._view)

    def _slots(self, stage: PlannedStage, epoch: int) -> list[torch.Tensor]:
        """Where the samples of an epoch's batches lie: those of a view are spread, that each part of the slots has all."""
        row = view_of(stage, epoch) if self._terms.views > 1 else 0
        return [indices * self._terms.views + row for indices in self.feed.indices(stage, epoch)]

    def _lacks(self, slots: torch.Tensor) -> bool:
        """Whether rows are missing for which there would be room."""
        if self._store is None:
            return True
        inside = slots[slots < self._store.slots]
        return bool((self._missing(inside) & ~self._never[inside]).any())

    def _in_order(self, batches: Sequence[torch.Tensor]) -> Iterator[Drawn]:
        return self._theirs() if self.feed.loader is not None else self._own(batches, batches, 0)

    def _own(
        self, batches: Sequence[torch.Tensor], slots: Sequence[torch.Tensor], view: int
    ) -> Iterator[Drawn]:
        """lehr's own batches of indices; only what is missing is loaded."""
        missing = [self._missing(of_batch) for of_batch in slots]
        wanted = [indices[m] for indices, m in zip(batches, missing, strict=True) if m.any()]
        loaded = iter(self.feed.batches_of(wanted, view, self._watch) if wanted else ())
        for of_batch, m in zip(slots, missing, strict=True):
            began = self.clock.now()
            drawn = [Drawn(of_batch, m, next(loaded) if m.any() else None)]
            self.clock.loaded(since=began)
            yield drawn.pop()  # held by nobody but who has asked for it

    def _theirs(self) -> Iterator[Drawn]:
        """The batches of a person's own loader; as indices alone when most are there already."""
        if self._store is not None and 2 * int(self._store.filled.sum()) >= self.samples:
            for indices in self.feed.only_indices():
                missing = self._missing(indices)
                yield Drawn(
                    indices,
                    missing,
                    self.feed.made_here(indices[missing], watch=self._watch) if missing.any() else None,
                )
        else:
            yield from starmap(self._whole, self.feed.tapped(self._watch))

    def _whole(self, indices: torch.Tensor, batch: Any) -> Drawn:
        """A batch of a person's own loader: all of it is missing, or nothing."""
        return Drawn(indices, torch.full((len(indices),), bool(self._missing(indices).any())), batch)

    @property
    def _watch(self) -> Callable[[str], None] | None:
        return self._drew if self._terms.is_fresh and not self._is_off else None

    def _drew(self, who: str) -> None:
        """A sample drew random numbers after all: it will be another one in the next epoch."""
        self._ends = f"{who}, in a sample that was not looked at before"

    def _missing(self, slots: torch.Tensor) -> torch.Tensor:
        return torch.ones(len(slots), dtype=torch.bool) if self._store is None else ~self._store.has(slots)

    def _through(self, drawn: Drawn) -> Any:
        """The batch, as far through the model as it goes without what trains."""
        proved = self._find(drawn.batch) if self.way is None and not self._is_off else None
        if self.way is None or self._store is None:
            return drawn.batch
        if drawn.missing.any():
            self._ceiling.allow()
            return self._computed(drawn, self.way, self._store, proved)
        self._ceiling.hold()
        began = self.clock.now()
        halfway = self.way.halfway(self._store.get(drawn.slots), drawn.slots)
        self.clock.read(len(drawn.slots), since=began)
        return halfway

    def _computed(self, drawn: Drawn, way: Way, store: Store, proved: list[torch.Tensor] | None) -> Any:
        """The batch where rows of it are missing; `proved` is what is kept of it, if it is the one on which the way was proved."""
        slots, began = drawn.slots[drawn.missing], self.clock.now(on_device=True)
        digests = digests_of(leaves(drawn.batch)) if self._kept else None
        if self._kept and digests is not None and self._kept.take(slots, digests):
            self.clock.read(len(slots))
            return way.halfway(store.get(drawn.slots), drawn.slots)
        try:
            with self._terms.on.autocast():
                kept = proved or way.kept(placed(drawn.batch, self._terms.on.device))
        except Exception as why:  # the long way is there; where that fails as well it says so itself
            self._ends = (
                str(why) if isinstance(why, CannotSplit) else f"the frozen part failed ({type(why).__name__})"
            )
            return drawn.batch if drawn.missing.all() else self._samples_in(drawn.slots)
        self._leaves_holes = True
        rounded = self._put(way, store, slots, kept)
        if self._kept and digests is not None:
            self._kept.keep(slots[store.has(slots)], digests[store.has(slots)])
        if not drawn.missing.all():
            rounded = merged(way.columns, drawn.missing, rounded, store.get(drawn.slots[~drawn.missing]))
        self.clock.computed(len(slots), since=began)
        self.clock.read(len(drawn.slots) - len(slots))
        return way.halfway(rounded, drawn.slots)

    def _put(
        self, way: Way, store: Store, slots: torch.Tensor, kept: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Store the rows; as they will come back. Those that a narrow type cannot hold are left as they are, and out."""
        if not way.narrow:
            store.put(slots, kept)
            return kept
        rounded = [c.rounded(t) for c, t in zip(way.columns, kept, strict=True)]
        # What was not finite before is the loss's to find.
        fits = torch.stack(
            [_rows(r.isfinite() | ~t.isfinite()) for r, t in zip(rounded, kept, strict=True)]
        ).all(0)
        store.put(slots[fits.cpu()], [t[fits] for t in rounded])
        if fits.all():
            return rounded
        self._overflown(slots[~fits.cpu()])
        return [
            torch.where(fits.view(-1, *[1] * (t.ndim - 1)), r, t) for r, t in zip(rounded, kept, strict=True)
        ]

    def _samples_in(self, slots: torch.Tensor) -> Any:
        """The batch of the samples in these slots, loaded by this process."""
        return self.feed.made_here(slots.cpu() // self._terms.views, self._view)

    def _overflown(self, slots: torch.Tensor) -> None:
        self._never[slots[slots < len(self._never)]] = True
        if not self._has_overflown:
            self._has_overflown = True
            self._terms.said(
                "some features are too large for the type they are stored in; their samples are computed each time "
                '(cache_dtype = "bf16" or "fp32" holds them)'
            )

    def _find(self, batch: Any) -> list[torch.Tensor] | None:
        """Look for the way on this batch; what is kept of it, None where there is no way."""
        terms = self._terms
        try:
            check_worth(self._model, batch, terms.wanted)
            why, is_news = terms.again()
            if why:
                raise (CannotSplit if is_news or terms.wanted.required else TooLittle)(why)
            way, kept = find_way(
                self._model, self._loss, placed(batch, terms.on.device), trained=terms.trained, wanted=terms.wanted,
                on=terms.on,
            )  # fmt: skip
            store = self._stored(way)
        except CannotSplit as why:
            self._lose(str(why), quietly=isinstance(why, TooLittle))
            return None
        except Exception as why:  # nothing that is tried for speed may end a run
            self._lose(f"looking for the frozen part failed ({type(why).__name__})")
            return None
        self.way, self._store = way, store
        self._known = [Known(t, by_values=terms.is_average) for t in way.halves.reads]
        self._never = torch.zeros(store.slots, dtype=torch.bool)
        terms.found(way, store)
        return kept

    def _stored(self, way: Way) -> Store:
        """Room for the rows: all that the budget allows, or as many as there is room for."""
        terms, size, rows = self._terms, row_bytes(way.columns), way.rows
        device, folder = terms.on.device, terms.folder
        if terms.cache_dir and device.type == "cpu" and rows:
            try:
                self._kept = Kept(
                    terms.cache_dir, key_of(settings_of(way, terms), way.halves.reads), way.columns, rows
                )
            except (RequestError, OSError) as error:
                terms.said(f"features are kept for this run alone: {error}")
            else:
                return self._kept.store
        while rows and (place := place_for(rows * size, device, folder)) != "nowhere":
            try:
                return Store(way.columns, rows, place=place, device=device, folder=folder)
            except OSError:
                rows //= 2
        raise CannotSplit(
            f"there is no room for {size_text(way.rows * size)}, neither in memory nor on the disk"
        )

    def _check_unchanged(self) -> None:
        """What was computed with other weights, or of samples that have changed since, is of no use."""
        if self.way and self._ends:
            self._lose(self._ends)
        if self.way and not all(known.is_as_it_was() for known in self._known):
            self._lose(
                "weights or buffers of the frozen part have been changed from outside since it was computed"
            )

    def _judge(self) -> None:
        """After a whole epoch that was read: whether it pays. What is required is not judged."""
        is_judged = not self._is_off and not self._terms.wanted.required
        if is_judged and (why := self.clock.why_not_worth_it()):
            self._lose(why)

    def _lose(self, why: str, *, quietly: bool = False) -> None:
        self.close()
        self.way = None
        if not quietly:
            self._terms.lost(why)


def settings_of(way: Way, terms: Terms) -> dict[str, object]:
    """What decides the rows besides the samples and the weights, in a form that can be hashed."""
    versions = {name: metadata.version(name) for name in ("torch", "torchvision", "timm")}
    return {
        "lehr": __version__, "versions": versions, "threads": torch.get_num_threads(), "precision": terms.on.precision,
        "data": terms.data, "route": way.route, "folded": way.folded, "after": way.cut.after, "code": way.halves.code,
        "columns": way.columns, "calling": (way.calling.taken, way.calling.kept),
        "arguments": [str(leaf) for leaf in way.calling.own],
    }  # fmt: skip


def first_with_view(stage: PlannedStage, epoch: int, *, fixed: bool) -> int:
    """The first epoch of the stage whose samples have the same view as in `epoch`; where they are `fixed`, the first."""
    if fixed:
        return stage.first_epoch
    view = view_of(stage, epoch)
    return next(e for e in range(stage.first_epoch, epoch + 1) if view_of(stage, e) == view)


def _rows(found: torch.Tensor) -> torch.Tensor:
    """Of a truth for each element, whether all of a row are true."""
    return found.flatten(1).all(1) if found.ndim > 1 else found
