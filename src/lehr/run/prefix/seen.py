"""What a node of a graph was seen to do, as values. They must not know how it was seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Affine:
    """A whole number that is `slope` times the batch size plus `offset`."""

    slope: int
    offset: int

    def at(self, batch: int) -> int:
        """The number for a batch of this size."""
        return self.slope * batch + self.offset


class Sizes(tuple[Any, ...]):
    """A `torch.Size` with `Affine` in it."""

    __slots__ = ()


class Unclear:
    """In the place of a value that is neither constant nor affine in the batch size."""


def filled(value: Any, batch: int) -> Any:
    """A value as it is for a batch of this size, where it can be known.

    >>> filled(Sizes((Affine(2, 0), 5)), 3)
    (6, 5)
    """
    if isinstance(value, Affine):
        return value.at(batch)
    if isinstance(value, slice):
        return slice(*(filled(part, batch) for part in (value.start, value.stop, value.step)))
    if isinstance(value, dict):
        return {key: filled(part, batch) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        return rebuilt_sequence(value, [filled(part, batch) for part in value])
    return value


def rebuilt_sequence(value: Any, parts: Sequence[Any]) -> Any:
    """A tuple, named tuple or list like `value` with other parts; sizes become a plain tuple."""
    if isinstance(value, Sizes):
        return tuple(parts)
    return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)


@dataclass(frozen=True)
class Tensor:
    """A tensor of a node's value. `fold` is how many rows a sample has, where the rows come sample by sample; else 0.
    `shape` is that of one row, and `sizes` that of the whole, with `Affine` in it.
    """

    fold: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    sizes: Any


@dataclass(frozen=True)
class Seen:
    """What a node was seen to do. Groups number the memory that tensors share; those of the model's own state are
    negative. `value` is the node's value with `Tensor`, `Affine` and `Unclear` in it; `same` whether it was the same for
    both batches.
    """

    value: Any
    groups: frozenset[int]
    reads: frozenset[int]
    writes: frozenset[int]
    draws: bool
    mixes: bool
    same: bool
    flops: int


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors of a node's value as it was seen."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return [t for part in parts for t in tensors_of(part)]
