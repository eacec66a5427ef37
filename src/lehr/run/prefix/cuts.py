"""What a cut through a model's computation is, as values that print. They must not know how a cut is found or made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

_NEAR = 0.95
"""A cut that skips at least this share of what the best one skips counts as being as good; the fewest bytes decide."""


class CannotSplit(Exception):  # noqa: N818  # a finding, which most runs live well with, and no error of anybody's
    """A model cannot be cut before what trains; as text it is the one line for the person: why, and what would help."""


class CannotTrace(CannotSplit):
    """One way of tracing failed; another may do, and what it says is better to know."""


@dataclass(frozen=True)
class Call:
    """One call of a model on a real batch. Tensors have the batch in their first dimension."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class Crossing:
    """A tensor that crosses a cut: `shape` is a sample's, without the batch."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def bytes_in(self, dtype: torch.dtype | None) -> int:
        """Of one sample, where floating point is stored as `dtype` if that is narrower; None: as it is."""
        narrows = dtype is not None and self.dtype.is_floating_point and dtype.itemsize < self.dtype.itemsize
        return prod(self.shape) * (dtype.itemsize if dtype and narrows else self.dtype.itemsize)


@dataclass(frozen=True)
class Cut:
    """A place to cut a model: behind `after`, named as a person would; `share` of the forward's arithmetic lies before."""

    after: str
    crossings: tuple[Crossing, ...]
    share: float

    def bytes_in(self, dtype: torch.dtype | None) -> int:
        """What a sample takes, where floating point is stored as `dtype` if that is narrower; None: as it is.

        >>> Cut("layer3", (Crossing("relu", (256, 14, 14), torch.float32),), 0.77).bytes_in(torch.float16)
        100352
        """
        return sum(crossing.bytes_in(dtype) for crossing in self.crossings)


def choose(cuts: Sequence[Cut], *, most: int | None = None, dtype: torch.dtype | None = None) -> Cut | None:
    """The cut with the fewest bytes among those whose share is within 5 % of the best.

    Args:
        cuts: what there is to choose from.
        most: bytes that a sample may take; cuts that take more do not count, not for the best share either.
        dtype: what floating point is stored as, where that is narrower; None: as it is.

    Returns:
        The cut, or None where none fits.

    Example:
        >>> wide = Cut("layer3", (Crossing("a", (100,), torch.float32),), 0.80)
        >>> slim = Cut("pool", (Crossing("b", (10,), torch.float32),), 0.78)
        >>> choose([wide, slim]).after, choose([wide, slim], most=8)
        ('pool', None)
    """
    fitting = [cut for cut in cuts if most is None or cut.bytes_in(dtype) <= most]
    if not fitting:
        return None
    best = max(cut.share for cut in fitting)
    return min(
        (cut for cut in fitting if cut.share >= _NEAR * best),
        key=lambda cut: (cut.bytes_in(dtype), -cut.share),
    )
