"""A batch as a tree of tensors: lists, tuples, named tuples and dicts of them. It must not know what the tensors mean."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def leaves(batch: Any) -> list[Any]:
    """What is in a batch, in order: its tensors, and whatever else is no list, tuple or dict.

    >>> leaves(({"a": 1, "b": [2]}, 3))
    [1, 2, 3]
    """
    if isinstance(batch, Mapping):
        return [leaf for value in batch.values() for leaf in leaves(value)]
    if isinstance(batch, (list, tuple)):
        return [leaf for value in batch for leaf in leaves(value)]
    return [batch]


def rebuilt(batch: Any, new: Sequence[Any]) -> Any:
    """A batch of the same form with other leaves. A mapping of another class becomes a dict.

    >>> rebuilt(({"a": 1, "b": [2]}, 3), "xyz")
    ({'a': 'x', 'b': ['y']}, 'z')
    """
    return _rebuilt(batch, iter(new))


def _rebuilt(batch: Any, new: Iterator[Any]) -> Any:
    if isinstance(batch, Mapping):
        return {key: _rebuilt(value, new) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        parts = [_rebuilt(value, new) for value in batch]
        return type(batch)(parts) if type(batch) in (list, tuple) else type(batch)(*parts)  # a named tuple
    return next(new)
