"""Samples and classes as found -> a `Listing`: judged as a whole, split where the person did not.

What is wrong here cannot be mended by leaving files out. This file must not know how anything was read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lehr.data.listing import Finding, Item, Listing, report, shown
from lehr.data.split import split_by_share
from lehr.errors import DataError, nearest


@dataclass(frozen=True)
class Request:
    """What was asked for, and what kind of thing it turned out to be; the last two are for a split."""

    source: str
    root: str
    kind: str
    seed: int = 0
    valid_share: float = 0.0


@dataclass(frozen=True)
class Found:
    """What was found, before it is judged; `valid` is None where there is no validation half yet.

    `classes` may name more than the training half has: that is for `listing_of` to say.
    """

    classes: tuple[str, ...]
    train: tuple[Item, ...]
    valid: tuple[Item, ...] | None
    findings: tuple[Finding, ...]
    split: str
    channels: int
    size: tuple[int, int] | None


def listing_of(request: Request, found: Found) -> Listing:
    """The listing of what was found, split where it has to be.

    Raises:
        DataError: one error with every fatal finding, of files and of classes.
    """
    findings = [*found.findings, *_on_classes(request, found)]
    if any(finding.fatal for finding in findings):
        raise DataError(report(request.source, findings))
    train, valid, split = found.train, found.valid, found.split
    if valid is None:
        train, valid = split_by_share(train, share=request.valid_share, seed=request.seed)
        split = f"stratified, {100 * request.valid_share:g} % of each class held out, seed {request.seed}"
        findings += _on_single_images(found.classes, train, valid)
    return Listing(
        request.source,
        request.root,
        request.kind,
        found.classes,
        train,
        valid,
        tuple(findings),
        split,
        found.channels,
        found.size,
    )


def _on_classes(request: Request, found: Found) -> list[Finding]:
    """What there is to say about the classes of both halves."""
    names = _names(found.classes, found.train)
    if not names:
        return [_fatal("no usable image to train on")]
    findings = []
    if len(names) == 1:
        what = f"one class only ({shown(names[0])}); expected images of at least two, to tell them apart"
        findings.append(_fatal(what + _deeper(request.source, found.train)))
    if found.valid is not None:
        findings += _between_halves(names, _names(found.classes, found.valid))
    unused = [name for label, name in enumerate(found.classes) if label not in _labels(found)]
    return findings + ([_note(f"classes with a name but no image: {listed(unused)}")] if unused else [])


def _between_halves(train: Sequence[str], valid: Sequence[str]) -> list[Finding]:
    """How the classes of the halves differ, each given as the names that have an image."""
    if not valid:
        return [
            _fatal("the validation half has no usable image; fill it, or remove it and one will be split off")
        ]
    findings = []
    strange = [name for name in valid if name not in train]
    if strange:
        hint = nearest(strange[0], train, n=1)
        what = (
            f"classes in the validation half only: {listed(strange)}{hint} The training half has "
            f"{listed(train)}; expected no class that nothing trains: rename it, or add training images"
        )
        findings.append(_fatal(what))
    missing = [name for name in train if name not in valid]
    if missing:
        what = f"classes in the training half only, so nothing validates them: {listed(missing)}"
        findings.append(_note(what))
    return findings


def _deeper(source: str, items: Sequence[Item]) -> str:
    """A hint for a folder given one level too high: `flowers/` with nothing but `flowers/flowers/`."""
    parts = [item.path.split("/") for item in items]
    folders = {path[1] for path in parts if len(path) > 2}
    if len(folders) < 2 or len({path[0] for path in parts}) > 1:
        return ""
    inner = f"{shown(source.rstrip('/'))}/{shown(parts[0][0])}"
    return f'; did you mean "{inner}", which holds {listed(sorted(folders))}?'


def _on_single_images(classes: Sequence[str], train: Sequence[Item], valid: Sequence[Item]) -> list[Finding]:
    """A note on classes too small to have an image in both halves."""
    present = _names(classes, valid)
    single = [name for name in _names(classes, train) if name not in present]
    if not single or not valid:
        return []
    return [_note(f"classes of one image, which trains, so nothing validates them: {listed(single)}")]


def _names(classes: Sequence[str], items: Iterable[Item]) -> list[str]:
    """The classes that have an item, in class order."""
    return [classes[label] for label in sorted({item.label for item in items})]


def _labels(found: Found) -> set[int]:
    return {item.label for half in (found.train, found.valid or ()) for item in half}


def listed(names: Sequence[str]) -> str:
    """Up to ten names, safe to print, and how many more.

    >>> listed(["cat", "dog"])
    'cat, dog'
    """
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(shown(name) for name in names[:10]) + more


def _fatal(what: str) -> Finding:
    return Finding("", what, fatal=True)


def _note(what: str) -> Finding:
    return Finding("", what, fatal=False)
