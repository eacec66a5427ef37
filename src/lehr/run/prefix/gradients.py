"""Whether gradients are the same up to rounding: of the arithmetic, and of the features' last bits. It must not know how they
came about.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

Gradients = Mapping[str, torch.Tensor | None]

_TIMES = 8.0
"""A gradient may differ by so many times what a change of the features' last bits makes of it: sharp turns behind them (a
maximum, an activation) may make that large, and where terms cancel out nothing else is left of it."""
_MOST, _PART = 0.05, 1e-3
"""But by no more than that share of itself, or of that part of all gradients, if it is smaller than that."""
_NOTHING = 1e-9
"""What differs by less than this share of all gradients is the same: gradients that are 0 but for rounding are as large."""

_PIECE = 1 << 18
"""Numbers that are made doubles at a time, 2 MiB of them."""


def apart(expected: Gradients, found: Gradients, shaken: Gradients | None = None) -> dict[str, float]:
    """By which share of itself each gradient that is not the same is another; infinity, where one is there and one is not.

    Args:
        expected: the gradients by parameter, as they should be.
        found: the same parameters' gradients, from features.
        shaken: these once more, from features that are `shaken`; what that has changed is rounding.

    Example:
        >>> one, zero = torch.ones(1), torch.zeros(1)
        >>> apart({"a": one, "b": 1e-8 * one, "c": one}, {"a": one, "b": zero, "c": None})
        {'b': 1.0, 'c': inf}
    """
    norms = {name: _norm(g) for name, g in expected.items() if g is not None}
    size = math.hypot(*norms.values())
    shares: dict[str, float] = {}
    for name, one in expected.items():
        other, again = found[name], shaken[name] if shaken else None
        if one is None or other is None:
            if one is not other:
                shares[name] = math.inf
            continue
        off, own = _norm(one, other), norms[name]
        moved = _norm(other, again) if again is not None else 0.0
        allowed = max(_NOTHING * size, min(_TIMES * moved, _MOST * max(own, _PART * size)))
        if not off <= allowed:
            shares[name] = off / own if own else math.inf
    return shares


def shaken(feature: torch.Tensor) -> torch.Tensor:
    """A feature with its last bits changed, always in the same way; no random state is used."""
    if not feature.is_floating_point():
        return feature
    noise = torch.arange(feature.numel(), device=feature.device, dtype=torch.float32).mul_(12.9898).sin_()
    return feature * (1 + 4 * torch.finfo(feature.dtype).eps * noise.reshape(feature.shape).to(feature.dtype))


def _norm(tensor: torch.Tensor, other: torch.Tensor | None = None) -> float:
    """The norm of a tensor's numbers, or of what it is apart from the `other`; piece by piece, in one buffer, since doubles
    take room, and room takes time.
    """
    pieces = [
        torch.split(t.detach().to_dense().reshape(-1), _PIECE) for t in (tensor, other) if t is not None
    ]
    buffer = torch.empty(len(pieces[0][0]), dtype=torch.float64, device=tensor.device)
    squares = torch.zeros((), dtype=torch.float64, device=tensor.device)
    for piece, *rest in zip(*pieces, strict=True):
        numbers = buffer[: len(piece)].copy_(piece)
        squares += (numbers.sub_(rest[0]) if rest else numbers).square_().sum()
    return math.sqrt(float(squares))
