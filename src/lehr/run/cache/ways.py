"""The short way of a batch through a model: which prefix, proved on a real batch, and what has to be kept of a sample.

It changes nothing, and must not know where samples come from or rows are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from lehr.free_room import size_text
from lehr.run.allocator import give_back, sparing
from lehr.run.batches import leaves
from lehr.run.cache.calling import Calling, StandIn, calling
from lehr.run.cache.store import Column
from lehr.run.facts import unwrap
from lehr.run.memory import part
from lehr.run.precision import Arithmetic
from lehr.run.prefix.analysis import Halves, analyse
from lehr.run.prefix.cuts import Call, CannotSplit, Cut, choose
from lehr.run.prefix.proof import Judged, prove
from lehr.run.prefix.unmoved import refuse_sparse, undone, unmoved
from lehr.run.untouched import state_kept, without_compiling
from lehr.run.update import Loss, Returned, scalar_loss

_LOOKED_AT = 3  # samples of a real batch by which places to cut are looked for
LEAST_SHARE = 0.2
"""Of the arithmetic: a prefix with less is not worth its bytes (the study's measured break-even, with slack)."""
LEAST_WORK = 2e10
"""Floating-point operations that must be saved in all before it is worth a second of tracing and proving."""
_TOO_LITTLE = "there is too little to save"
NARROW = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": None}


class Halfway(NamedTuple):
    """A batch behind the cut: what crosses it, the batch that the loss function gets, without the inputs, and the slots of
    its samples.
    """

    features: tuple[torch.Tensor, ...]
    batch: Any
    slots: torch.Tensor


@dataclass(frozen=True)
class Wanted:
    """What a person allows: bytes for `rows` rows (`views` of each sample), the narrowest type, whether every bit must be
    the model's own, and whether it is to be done even if it is little work (`required`). `passes` is how often a row is
    read.
    """

    budget: int
    rows: int
    views: int
    passes: float
    dtype: str = "fp32"
    exact: bool = False
    required: bool = False


@dataclass(frozen=True)
class Way:
    """A proved prefix and suffix, how the loss function calls the model, and the columns of a row. `forms` are shape
    and type of a batch's leaves, without the batch; `rows` is how many of
    the rows fit the budget; `work` the arithmetic of a whole forward pass, in operations a sample.
    """

    wanted: Wanted
    halves: Halves
    calling: Calling
    columns: tuple[Column, ...]
    forms: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    rows: int
    route: str
    stilled: tuple[str, ...]
    work: float
    folded: bool

    @property
    def cut(self) -> Cut:
        """Where the model is cut."""
        return self.halves.cut

    @property
    def narrow(self) -> bool:
        """Whether something is stored in a narrower type."""
        return any(column.narrow for column in self.columns)

    def kept(self, batch: Any) -> list[torch.Tensor]:
        """What is kept of a whole batch: what crosses the cut, and the leaves that the loss function reads."""
        call, own = self.calling.call(batch), leaves(batch)
        if [(tuple(t.shape[1:]), t.dtype) for t in own] != list(self.forms):
            raise CannotSplit(
                "samples of another shape or type have come than those that were looked at first"
            )
        return [*self.halves.prefix(*call.args, **call.kwargs), *(own[n] for n in self.calling.kept)]

    def halfway(self, kept: list[torch.Tensor], slots: torch.Tensor) -> Halfway:
        """The batch of which that was kept, of the samples in these slots."""
        count = len(kept) - len(self.calling.kept)
        return Halfway(tuple(kept[:count]), self.calling.without_inputs(kept[count:], kept[0]), slots)


@sparing()
def find_way(
    model: nn.Module, loss: Loss, batch: Any, *, trained: frozenset[str], wanted: Wanted, on: Arithmetic
) -> tuple[Way, list[torch.Tensor]]:
    """The way of batches like this one, through `model` in the mode it is in, proved on it; and what is kept of it.

    Raises:
        CannotSplit: where there is none, or none that pays; in words for the person.
    """
    check_worth(model, batch, wanted)
    _refuse_parallel(model)
    refuse_sparse(unwrap(model))
    with _as_it_was(model, loss, on), without_compiling(model), on.autocast():
        with unmoved(unwrap(model)):
            seen = calling(model, loss, batch)
            with undone(unwrap(model)):
                work = _work(model, seen.call(part(batch, 1)))
                if not wanted.required and work * wanted.rows * wanted.passes < LEAST_WORK:
                    raise TooLittle(_TOO_LITTLE)
                analysis = analyse(model, seen.call(part(batch, _LOOKED_AT)), trained=trained)
        give_back()  # small blocks, too
        beside = sum(leaves(batch)[n][:1].nbytes for n in seen.kept)
        cut, narrow, rows = _chosen(analysis.cuts, wanted, beside)
        if cut.share < LEAST_SHARE and not wanted.required:
            raise CannotSplit(
                f"only {cut.share:.0%} of the arithmetic lies before what trains (up to {cut.after}); nothing is cached"
            )
        halves = analysis.split(cut)
        judged, call = _judged(model, loss, seen, batch), seen.call(batch)
        with unmoved(unwrap(model)):
            proved, features = _proved(model, halves, call, loss=judged, narrow=narrow, exact=wanted.exact)
    kept = [*features, *(leaves(batch)[n] for n in seen.kept)]
    columns = tuple(Column.like(t, narrow if n < len(features) else None) for n, t in enumerate(kept))
    forms = tuple((tuple(t.shape[1:]), t.dtype) for t in leaves(batch))
    way = Way(
        wanted, proved, seen, columns, forms, rows, analysis.route, analysis.stilled, work, folded=proved is not halves
    )  # fmt: skip
    return way, kept


def through_suffix(way: Way, loss: Loss) -> Loss:
    """`loss` for batches of samples and for those that are halfway through the model, which run the suffix alone. It raises
    `CannotSplit` where the model is called otherwise than on the batch that was looked at first.
    """

    def shortened(model: nn.Module, batch: Any) -> Returned:
        if not isinstance(batch, Halfway):
            return loss(model, batch)
        features = tuple(batch.features)

        def suffix(*args: Any, **kwargs: Any) -> Any:
            way.calling.check_same((args, kwargs), batch.batch)
            return way.halves.suffix(features)

        return loss(StandIn(model, _once(suffix)), batch.batch)  # type: ignore[arg-type]

    return shortened


def _once(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run`, for one call: what crosses the cut is of one call of the model."""
    calls = iter((run,))

    def called(*args: Any, **kwargs: Any) -> Any:
        for first in calls:
            return first(*args, **kwargs)
        raise CannotSplit('the loss function calls the model more than once a batch; say cache = "off"')

    return called


def check_worth(model: nn.Module, batch: Any, wanted: Wanted) -> None:
    """Refuse what cannot be worth it, from sizes alone: neither the loss function nor a data set is asked for more.

    Raises:
        TooLittle: where there is too little to save.
    """
    if not wanted.required and _at_most(model, batch) * wanted.rows * wanted.passes < LEAST_WORK:
        raise TooLittle(_TOO_LITTLE)


class TooLittle(CannotSplit):
    """There is nothing to gain: no news for a person who did not ask."""


def _chosen(cuts: tuple[Cut, ...], wanted: Wanted, beside: int) -> tuple[Cut, torch.dtype | None, int]:
    """The cut that fits the budget for all rows; else, stored narrower where that is allowed; else the cheapest, for as
    many rows as fit.
    """
    most = wanted.budget // max(1, wanted.rows) - beside
    narrow = NARROW[wanted.dtype]
    for dtype in dict.fromkeys((None, narrow)):
        if most > 0 and (cut := choose(cuts, most=most, dtype=dtype)):
            return cut, dtype, wanted.rows
    cut = choose(cuts, dtype=narrow)
    if cut is None:
        raise CannotSplit("nothing of the model lies before what trains, so there is nothing to cache")
    size = cut.bytes_in(narrow) + beside
    if size > wanted.budget:
        raise CannotSplit(
            f"a sample would take {size_text(size)}, and {size_text(wanted.budget)} of cache_budget are left for it"
        )
    return cut, narrow, min(wanted.rows, wanted.budget // size)


def _judged(model: nn.Module, loss: Loss, seen: Calling, sample: Any) -> Callable[[Any], torch.Tensor]:
    """The loss as a function of what stands in for the model; only the model itself is given the inputs."""
    own = leaves(sample)
    without = seen.without_inputs([own[n] for n in seen.kept], own[0])

    def judged(f: Any) -> torch.Tensor:
        if f is model:
            return scalar_loss(loss(model, sample))
        return scalar_loss(loss(StandIn(model, _once(f)), without))  # type: ignore[arg-type]

    return judged


def _refuse_parallel(model: nn.Module) -> None:
    if isinstance(model, (DataParallel, DistributedDataParallel)):
        raise CannotSplit("a model that is spread over several devices or processes is not cut")


def _proved(
    model: nn.Module, halves: Halves, call: Call, *, loss: Judged, narrow: torch.dtype | None, exact: bool
) -> tuple[Halves, tuple[torch.Tensor, ...]]:
    """The halves in their fast form where that is allowed and holds, else as they are; and the features of the call."""
    if not exact:
        with suppress(CannotSplit):
            fast = halves.fast()
            return fast, prove(model, fast, call, loss=loss, store=narrow)
    return halves, prove(model, halves, call, loss=loss, store=narrow)


def _work(model: nn.Module, call: Call) -> float:
    """Floating-point operations of a forward pass."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False  # no statistics move
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(*call.args, **call.kwargs)
    except Exception as error:
        raise CannotSplit(f"the model could not be run on a sample ({type(error).__name__})") from error
    finally:
        for module, mode in modes:
            module.training = mode
    return float(counter.get_total_flops())


def _at_most(model: nn.Module, batch: Any) -> float:
    """More than the operations of a forward pass for a sample: each weight at each element of the largest input."""
    weights = sum(p.numel() for p in model.parameters())
    return (
        2.0
        * weights
        * max((t[:1].numel() for t in leaves(batch) if isinstance(t, torch.Tensor) and t.ndim), default=1)
    )


@contextmanager
def _as_it_was(model: nn.Module, loss: Loss, on: Arithmetic) -> Iterator[None]:
    """Random states and buffers are afterwards as they were before, those of a loss function that is a module, too."""
    with (
        state_kept(model, on.device),
        state_kept(loss, on.device) if isinstance(loss, nn.Module) else nullcontext(),
    ):
        yield
