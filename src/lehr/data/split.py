"""Which samples train and which validate, where the person did not say: stratified and seeded.

Every sample gets a number that depends on the seed and on its own path alone; the lowest numbers of each
class are held out. So the split does not depend on the order of a file system, on the platform or on a
library's random numbers, and a file that is added later moves few others.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable
from fractions import Fraction
from hashlib import blake2b

from lehr.data.listing import Item
from lehr.errors import DataError


def split_by_share(
    items: Iterable[Item], *, share: float, seed: int
) -> tuple[tuple[Item, ...], tuple[Item, ...]]:
    """The training and the validation half: `share` of each class (rounded half up) is held out.

    A class with two images or more keeps at least one in both halves; a class with one image trains. A
    `share` of 0 holds nothing out. Both halves keep the order of `items`.

    Raises:
        DataError: for a share outside [0, 1).
    """
    if not 0 <= share < 1:
        raise DataError(
            f"valid_share is {share!r}; expected a share of the images from 0 (none) to below 1, for "
            "example 0.2"
        )

    def held_out(count: int) -> int:
        wanted = int(Fraction(share).limit_denominator(10**6) * count + Fraction(1, 2))
        return 0 if share == 0 else min(max(wanted, 1), count - 1)

    valid, train = _lowest(items, seed=seed, count=held_out)
    return train, valid


def _lowest(
    items: Iterable[Item], *, seed: int, count: Callable[[int], int]
) -> tuple[tuple[Item, ...], tuple[Item, ...]]:
    """The `count(n)` items of lowest number in each class of `n`, and the others; both in the order given."""
    listed = tuple(items)
    by_class: dict[int, list[Item]] = {}
    for item in listed:
        by_class.setdefault(item.label, []).append(item)
    chosen: set[str] = set()
    for members in by_class.values():
        ranked = sorted(members, key=lambda item: (_number(seed, item.path), item.path))
        chosen.update(item.path for item in ranked[: count(len(members))])
    return tuple(i for i in listed if i.path in chosen), tuple(i for i in listed if i.path not in chosen)


def _number(seed: int, path: str) -> bytes:
    """Normalised first, because one file system hands out composed accents and another decomposed ones."""
    text = f"{seed}/{unicodedata.normalize('NFC', path)}"
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
