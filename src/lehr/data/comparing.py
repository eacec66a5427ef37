"""Two listings of what should be the same data: what is not, in words.

Samples are compared by their path, class, half and content; where the data lie does not matter. This file
must not know how a listing came about.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lehr.data.judging import listed
from lehr.data.listing import Item, Listing, shown

_NAMED = 3  # samples of a kind that are called by name


def listing_differences(was: Listing, now: Listing) -> tuple[str, ...]:
    """What differs between the data of `was` and of `now`: printable lines, the most important first.

    At most eleven: on the kind of data, on classes (gone, new, in another order), on samples (gone, of other
    content, of another class, moved to the other half, renamed, new), each with a count and up to three names,
    and on the size of the images. `source`, `root`, `split` and `findings` are no difference, nor is the order
    of the samples, nor a content of which one side has no digest. Nothing at all means: the same data.

    Example:
        >>> was = Listing("pets", "/pets", "folder", ("cat", "dog"), (Item("cat/1.png", 0),), (), (), "")
        >>> now = Listing("pets", "/pets", "folder", ("cat", "dog"), (Item("dog/2.png", 1),), (), (), "")
        >>> listing_differences(was, now)
        ('1 sample is gone or cannot be read: cat/1.png', '1 sample is new: dog/2.png')
    """
    kind = () if was.kind == now.kind else (f"the kind of data: {now.kind}, where it was {was.kind}",)
    return (*kind, *_in_classes(was.classes, now.classes), *_in_samples(was, now), *_in_images(was, now))


def counterparts(was: Sequence[Item], now: Sequence[Item]) -> dict[str, Item]:
    """For each path of `was` that has one, the item of `now` that is the same sample.

    By the path; else by the path in composed Unicode, for file systems and archives change accents; else by
    the content, where no other sample has it: such a one was renamed.
    """
    found: dict[str, Item] = {}
    old, new = tuple(was), tuple(now)
    for key in (_by_path, _by_name, _by_content):
        theirs, ours = _unambiguous(new, key), _unambiguous(old, key)
        found |= {item.path: theirs[value] for value, item in ours.items() if value in theirs}
        taken = {item.path for item in found.values()}
        old = tuple(item for item in old if item.path not in found)
        new = tuple(item for item in new if item.path not in taken)
    return found


def _by_path(item: Item) -> str:
    return item.path


def _by_name(item: Item) -> str:
    return unicodedata.normalize("NFC", item.path)


def _by_content(item: Item) -> str:
    return item.digest


def _unambiguous(items: Sequence[Item], key: Callable[[Item], str]) -> dict[str, Item]:
    """The items by `key`, without those that have none or share it."""
    by_key: dict[str, Item | None] = {}
    for item in items:
        value = key(item)
        by_key[value] = None if value in by_key else item
    return {value: item for value, item in by_key.items() if value and item is not None}


def _in_classes(was: Sequence[str], now: Sequence[str]) -> list[str]:
    before, after = ([unicodedata.normalize("NFC", name) for name in names] for names in (was, now))
    gone = [name for name in before if name not in set(after)]
    new = [name for name in after if name not in set(before)]
    lines = [
        f"{len(names):,} {'class is' if len(names) == 1 else 'classes are'} {what}: {listed(names)}"
        for names, what in ((gone, "gone"), (new, "new"))
        if names
    ]
    kept = [[name for name in names if name not in {*gone, *new}] for names in (before, after)]
    if kept[0] != kept[1]:
        lines.append(f"classes in another order: {listed(kept[1])}, where it was {listed(kept[0])}")
    return lines


@dataclass(frozen=True)
class _Pair:
    """One sample then and now: its item, the name of its class, and whether it validates."""

    items: tuple[Item, Item]
    classes: tuple[str, str]
    valid: tuple[bool, bool]

    @property
    def path(self) -> str:
        return self.items[0].path

    @property
    def changed(self) -> bool:
        before, after = (item.digest for item in self.items)
        return "" not in (before, after) and before != after

    @property
    def renamed(self) -> bool:
        return _by_name(self.items[0]) != _by_name(self.items[1])


def _in_samples(was: Listing, now: Listing) -> list[str]:
    before, after = was.train + was.valid, now.train + now.valid
    partner = counterparts(before, after)
    known = {item.path for item in partner.values()}
    pairs = _pairs(was, now, partner)
    reclassed = [pair for pair in pairs if pair.classes[0] != pair.classes[1]]
    moved = {half: [p for p in pairs if p.valid == (not half, half)] for half in (True, False)}
    said = {pair.path for pair in (*reclassed, *moved[True], *moved[False])}
    renamed = [pair for pair in pairs if pair.renamed and pair.path not in said]
    lines = (
        _line(
            "is gone or cannot be read",
            "are gone or cannot be read",
            [item.path for item in before if item.path not in partner],
        ),
        _line("has other content", "have other content", [pair.path for pair in pairs if pair.changed]),
        _line(
            "is of another class",
            "are of another class",
            [f"{p.path} (was {p.classes[0]}, is {p.classes[1]})" for p in reclassed],
        ),
        _line("trained and now validates", "trained and now validate", [pair.path for pair in moved[True]]),
        _line("validated and now trains", "validated and now train", [pair.path for pair in moved[False]]),
        _line("was renamed", "were renamed", [f"{p.path} (now {p.items[1].path})" for p in renamed]),
        _line("is new", "are new", [item.path for item in after if item.path not in known]),
    )
    return [line for line in lines if line]


def _pairs(was: Listing, now: Listing, partner: Mapping[str, Item]) -> list[_Pair]:
    """The samples that are in both, in the order of `was`."""
    halves = [{item.path for item in listing.valid} for listing in (was, now)]
    names = [[unicodedata.normalize("NFC", name) for name in listing.classes] for listing in (was, now)]
    return [
        _Pair(
            items=(item, other),
            classes=(names[0][item.label], names[1][other.label]),
            valid=(item.path in halves[0], other.path in halves[1]),
        )
        for item in was.train + was.valid
        if (other := partner.get(item.path)) is not None
    ]


def _line(one: str, many: str, samples: Sequence[str]) -> str:
    """`"2 samples are gone: a, b"`; `""` for none."""
    if not samples:
        return ""
    more = f" and {len(samples) - _NAMED:,} more" if len(samples) > _NAMED else ""
    names = ", ".join(shown(sample) for sample in samples[:_NAMED]) + more
    return f"{len(samples):,} {f'sample {one}' if len(samples) == 1 else f'samples {many}'}: {names}"


def _in_images(was: Listing, now: Listing) -> list[str]:
    before, after = (_images(listing) for listing in (was, now))
    return [] if before == after else [f"images {after}, where they were {before}"]


def _images(listing: Listing) -> str:
    colour = "grey" if listing.channels == 1 else "in colour"
    return f"of {listing.size[0]} x {listing.size[1]} pixels, {colour}" if listing.size else colour
