"""What several tests of schedules compare with, by Python's math alone."""

from __future__ import annotations

import math

EXACT = 1e-12  # how far float64 may be from the closed form: a few roundings of numbers near 1


def sgdr(t: int, first: int, grow: float, decay: float, floor: float, n: int) -> float:
    """Walk the cycles one by one, as a person would."""
    start, i = 0, 0
    length = first
    while start + length < min(t + 1, n):
        start += length
        i += 1
        length = max(1, math.floor(first * grow**i + 0.5))
    return decay**i * (floor + (1 - floor) * (1 + math.cos(math.pi * (t - start) / length)) / 2)
