"""How a loss function calls its model, seen on one batch; and the batch that it gets when its inputs are not there.

It must not know prefixes: what stands in for the model is handed in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lehr.run.batches import leaves, rebuilt
from lehr.run.facts import unwrap
from lehr.run.prefix.cuts import Call, CannotSplit
from lehr.run.prefix.unmoved import Copies, moved
from lehr.run.update import Loss

_KEPT = 16 * 1024
"""Bytes a sample of whole numbers (tokens, masks) that are cheaper to keep than to do without."""
_AS_FUNCTION = 'compute it in the data set, or say cache = "off"'


class StandIn:
    """Called instead of the model: `run` gets the arguments. All else that is asked of it is the model's own; `touched` is called
    before.
    """

    def __init__(
        self, model: nn.Module, run: Callable[..., Any], touched: Callable[[], None] | None = None
    ) -> None:
        self.__dict__.update(_model=model, _run=run, _touched=touched)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What `run` makes of the arguments."""
        return self._run(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if self._touched:
            self._touched()
        return getattr(self._model, name)

    def __setattr__(self, name: str, value: object) -> None:
        raise CannotSplit(
            f"the loss function sets {name!r} of the model, which a model that is cut would not see"
        )


@dataclass(frozen=True)
class Calling:
    """How the model is called on batches of one form.

    `form` is a batch whose leaves are left out. `arguments` are positional and keyword arguments; of their leaves those are left
    out that are `taken` from the batch, by number, and the others stand there (None in `taken`). The batch's leaves that only
    the model reads, and that are not kept, are `unread`: shape and type without the batch.
    """

    form: Any
    arguments: tuple[tuple[Any, ...], Mapping[str, Any]]
    taken: tuple[int | None, ...]
    unread: Mapping[int, tuple[tuple[int, ...], torch.dtype]]
    count: int

    @property
    def kept(self) -> tuple[int, ...]:
        """The leaves of a batch that the loss function still gets as they are."""
        return tuple(number for number in range(self.count) if number not in self.unread)

    @property
    def own(self) -> list[Any]:
        """The arguments that are of no batch."""
        return [leaf for leaf, n in zip(leaves(self.arguments), self.taken, strict=True) if n is None]

    def call(self, batch: Any) -> Call:
        """The model's arguments for another batch."""
        own, given = leaves(batch), leaves(self.arguments)
        both = zip(given, self.taken, strict=True)
        args, kwargs = rebuilt(self.arguments, [old if n is None else own[n] for old, n in both])
        return Call(args, kwargs)

    def check_same(self, call: tuple[tuple[Any, ...], Mapping[str, Any]], batch: Any) -> None:
        """Refuse another call than the one that was looked at: what is no tensor is a part of prefix and suffix by now.

        Raises:
            CannotSplit: where an argument is another, or something else than what stands in the batch.
        """
        given, known, own = leaves(call), leaves(self.arguments), leaves(batch)
        none = [None] * len(known)
        is_same = len(given) == len(known) and rebuilt(call, none) == rebuilt(self.arguments, none)
        for number, (now, then, place) in enumerate(zip(given, known, self.taken, strict=False)):
            if is_same and not (now is own[place] if place is not None else _are_equal(now, then)):
                raise CannotSplit(
                    f"the loss function calls the model with another argument {number + 1} ({_named(now)}) than at first; say "
                    'cache = "off"'
                )
        if not is_same:
            raise CannotSplit(
                'the loss function calls the model with other arguments than at first; say cache = "off"'
            )

    def without_inputs(self, kept: Sequence[torch.Tensor], like: torch.Tensor) -> Any:
        """The batch that the loss function gets: what is kept, and where the inputs were what cannot be read, so that a function
        that reads them after all is noticed. It has the size and device of `like`.
        """
        rest = iter(kept)
        return rebuilt(
            self.form,
            [_unread(*self.unread[n], like) if n in self.unread else next(rest) for n in range(self.count)],
        )


def calling(model: nn.Module, loss: Loss, batch: Any) -> Calling:
    """How `loss` calls `model` on `batch`; it is stopped there, before the model runs.

    Raises:
        CannotSplit: where that is not once, on tensors of the batch as they are.
    """
    seen = _recorded(model, loss, batch)
    own = leaves(batch)
    size = next((len(leaf) for leaf in own if isinstance(leaf, torch.Tensor) and leaf.ndim), 0)
    strange = [
        leaf for leaf in own if not isinstance(leaf, torch.Tensor) or not leaf.ndim or len(leaf) != size
    ]
    if strange:
        raise CannotSplit(
            f"a batch holds {_named(strange[0])}, and only tensors with a row for each sample can be kept; leave it out "
            'of the batch, or say cache = "off"'
        )
    places = {id(leaf): number for number, leaf in enumerate(own)}
    given = leaves(seen)
    changed = [g for g in given if isinstance(g, torch.Tensor) and id(g) not in places]
    if changed:
        raise CannotSplit(
            f"the loss function changes the inputs before the model sees them (it gets {_named(changed[0])} that is "
            f"not in the batch); {_AS_FUNCTION}"
        )
    taken = tuple(places.get(id(g)) if isinstance(g, torch.Tensor) else None for g in given)
    inputs = {n for n in taken if n is not None}
    unread = {
        n: (tuple(own[n].shape[1:]), own[n].dtype)
        for n in inputs
        if own[n].is_floating_point() or own[n][:1].nbytes > _KEPT
    }
    form = rebuilt(batch, [None] * len(own))
    others = [leaf if n is None else None for leaf, n in zip(given, taken, strict=True)]
    return Calling(form, rebuilt(seen, others), taken, unread, len(own))


class _SeenError(Exception):
    """The call was made; its arguments are known, and nothing more is wanted."""


def _recorded(model: nn.Module, loss: Loss, batch: Any) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """The arguments that the loss function calls the model with; what it has done to the weights before is undone."""
    copies = Copies(unwrap(model))
    try:
        found = _called(model, loss, batch, copies.take)
    finally:
        changed = copies.put_back()
    if changed:
        raise moved(changed[0])
    return found


def _called(
    model: nn.Module, loss: Loss, batch: Any, touched: Callable[[], None]
) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    found: list[tuple[tuple[Any, ...], Mapping[str, Any]]] = []

    def record(*args: Any, **kwargs: Any) -> Any:
        found.append((args, kwargs))
        raise _SeenError

    try:
        loss(StandIn(model, record, touched), batch)  # type: ignore[arg-type]  # it is called, and asked for attributes
    except _SeenError:
        return found[0]
    except CannotSplit:
        raise
    except Exception as error:
        raise CannotSplit(
            f"the loss function does more with the model than call it ({type(error).__name__}); {_AS_FUNCTION}"
        ) from error
    raise CannotSplit(f"the loss function never calls the model itself; {_AS_FUNCTION}")


class Unread(torch.Tensor):
    """In the place of inputs: it has their shape, type and device, and whoever asks for more of it is refused.

    What is computed past Python would find NaN in it.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answers what needs no values."""
        if func in _WITHOUT_VALUES:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if func in _MOVES:
            with torch._C.DisableTorchFunctionSubclass():
                if args[0].is_meta or func(*args, **(kwargs or {})) is args[0]:
                    return args[0]
        raise CannotSplit(f"the loss function reads the model's inputs itself; {_AS_FUNCTION}")


_WITHOUT_VALUES = {
    *(getattr(torch.Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda")),
    torch.Tensor.size, torch.Tensor.dim, torch.Tensor.__len__, torch.Tensor.numel, torch.Tensor.nelement,
    torch.Tensor.is_floating_point, torch.Tensor.is_complex, torch.is_floating_point, torch.is_complex, torch.numel,
    torch.zeros_like, torch.ones_like, torch.Tensor.new_zeros, torch.Tensor.new_ones, torch.Tensor.new_full,
    torch.Tensor.new_tensor, torch.Tensor.__repr__,
}  # fmt: skip
_MOVES = {torch.Tensor.to, torch.Tensor.cuda, torch.Tensor.cpu}
"""They give the tensor itself where it is there already."""


def _unread(shape: tuple[int, ...], dtype: torch.dtype, like: torch.Tensor) -> torch.Tensor:
    size = len(like)
    if dtype.is_floating_point:
        empty = torch.full((), math.nan, dtype=dtype, device=like.device).expand(size, *shape)
    else:  # has no NaN; whatever is computed with a meta tensor and a real one fails
        empty = torch.empty((size, *shape), dtype=dtype, device="meta")
    return empty.as_subclass(Unread)


def _are_equal(one: Any, other: Any) -> bool:
    try:
        return type(one) is type(other) and (one is other or bool(one == other))
    except Exception:  # arrays and the like do not compare to one truth value
        return False


def _named(leaf: Any) -> str:
    return (
        f"a tensor of shape {tuple(leaf.shape)}"
        if isinstance(leaf, torch.Tensor)
        else f"a {type(leaf).__name__}"
    )
