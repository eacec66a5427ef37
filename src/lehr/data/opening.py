"""What a person points at -> a checked `Data`: the one way into this package.

Decides what kind of thing it is, has it read and checked, splits it where the person did not, and turns all
that is wrong into one error. How files and arrays are read is for the files beside this one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from lehr.data.arrays import ArrayReader, Arrays, load_npz
from lehr.data.checking import Checked, Progress, check_files, ignored, notes_on
from lehr.data.cifar import cifar_folder, load_cifar
from lehr.data.digits import digits_of, load_digits_few
from lehr.data.folders import Half, Scan, scan_folder
from lehr.data.images import read_image
from lehr.data.listing import Finding, Item, Listing, report, shown
from lehr.data.split import split_by_share
from lehr.data.transforms import Transform
from lehr.errors import DataError, nearest

if TYPE_CHECKING:
    from lehr.data.datasets import ImageSamples

BUILT_IN = ("digits",)
_ACCEPTED = (
    "a folder of class folders (or with train/ and val/), a .npz file, a folder with CIFAR-10's files, "
    f"or a built-in name: {', '.join(BUILT_IN)}"
)


@dataclass(frozen=True)
class FolderReader:
    """Reads items by their path below `root`."""

    root: str

    def __call__(self, path: str, channels: int) -> Image.Image:
        """The image of that path, mode L for 1 channel, RGB for 3."""
        return read_image(Path(self.root, path), channels)


@dataclass(frozen=True)
class Data:
    """A checked data set: `listing` says what is in it, `train` and `valid` give the two halves to train
    with."""

    listing: Listing
    read: Callable[[str, int], Image.Image]

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes; a sample's target is an index of it."""
        return self.listing.classes

    def train(self, transform: Transform, *, seed: int = 0) -> ImageSamples:
        """The training half, augmented as `transform` says; `seed` decides every random choice."""
        from lehr.data.datasets import ImageSamples

        return ImageSamples(self.listing.train, self.read, transform.train(), seed=seed)

    def valid(self, transform: Transform) -> ImageSamples:
        """The validation half, without augmentation; empty where nothing was held out."""
        from lehr.data.datasets import ImageSamples

        return ImageSamples(self.listing.valid, self.read, transform.valid())


def open_data(
    where: str | os.PathLike[str],
    *,
    seed: int = 0,
    valid_share: float = 0.2,
    skip_bad: bool = False,
    progress: Progress | None = None,
) -> Data:
    """The data set that a person means by `where`, looked at and checked to the last file.

    Args:
        where: a folder of class folders, or one with `train/` and `val/`; a `.npz` file; a folder with
            CIFAR-10's files; or the built-in name `"digits"`.
        seed: decides the split, where there is none yet.
        valid_share: the share of each class to hold out then, in [0, 1); `digits` and data with two halves do
            not need it.
        skip_bad: leave files out that cannot be read, and classes left empty, instead of refusing.
        progress: called with (files done, files in all) while a folder is checked.

    Raises:
        DataError: for something else, and for data that cannot be trained on: one error with everything that
            is wrong.

    Example:
        >>> data = open_data("digits")
        >>> data.classes, len(data.listing.train), len(data.listing.valid)
        (('5', '6', '7', '8', '9'), 50, 846)
    """
    source = os.fspath(where)
    path = Path(source).expanduser()
    if source in BUILT_IN:
        arrays = load_digits_few(seed)
        if path.exists():
            note = Finding(
                "",
                f"the built-in {source} is meant; for the folder of this name write ./{source}",
                fatal=False,
            )
            arrays = replace(arrays, findings=(note,))
        return _from_arrays(arrays, _Request(source, "", "digits", seed, valid_share))
    if not path.exists():
        raise DataError(
            f"{shown(source)}: no such file or folder, and no built-in name{_near(path)} Expected {_ACCEPTED}"
        )
    root = str(path.absolute())
    if path.is_file():
        if path.suffix.lower() != ".npz":
            raise DataError(f"{shown(source)} is a file; expected {_ACCEPTED} (unpack an archive first)")
        return _from_arrays(load_npz(path), _Request(source, root, "npz", seed, valid_share))
    if not path.is_dir():
        raise DataError(f"{shown(source)} is neither a file nor a folder; expected {_ACCEPTED}")
    cifar = cifar_folder(path)
    if cifar is not None:
        return _from_arrays(load_cifar(cifar), _Request(source, root, "cifar", seed, valid_share))
    return _from_folder(path, _Request(source, root, "folder", seed, valid_share), skip_bad, progress)


def digits_pretraining(*, seed: int = 0, valid_share: float = 0.2) -> Data:
    """The digits 0 to 4, which no sample of `open_data("digits")` shows: to pretrain a small backbone on.

    >>> digits_pretraining().classes
    ('0', '1', '2', '3', '4')
    """
    return _from_arrays(digits_of(range(5)), _Request("digits 0 to 4", "", "digits", seed, valid_share))


@dataclass(frozen=True)
class _Request:
    """What was asked for, and what it turned out to be."""

    source: str
    root: str
    kind: str
    seed: int
    valid_share: float


def _from_arrays(arrays: Arrays, request: _Request) -> Data:
    pixels = next(iter(arrays.pixels.values()))
    shape = (int(pixels.shape[1]), int(pixels.shape[2]))
    found = _Found(arrays.classes, arrays.train, arrays.valid, arrays.findings, arrays.split)
    return Data(_listing(request, found, 1 if pixels.ndim == 3 else 3, shape), ArrayReader(arrays.pixels))


def _from_folder(path: Path, request: _Request, skip_bad: bool, progress: Progress | None) -> Data:
    scan = scan_folder(path)
    halves = [half for half in (scan.train, scan.valid) if half is not None]
    checked = check_files(
        path, [file for half in halves for files in half.files.values() for file in files], progress
    )
    good = {file.path for file in checked if file.problem is None}
    findings = [*scan.findings, *_problems(checked), *notes_on(checked)]
    for half in halves:
        findings += _left_empty(half, good, findings)
    if skip_bad:
        findings = [_skipped(finding) for finding in findings]
    classes = tuple(name for name, files in scan.train.files.items() if any(file in good for file in files))
    found = _with_files(scan, good, classes, tuple(findings))
    images = [file for file in checked if file.problem is None]
    sizes = {file.size for file in images}
    channels = 1 if images and all(file.channels == 1 for file in images) else 3
    listing = _listing(request, found, channels, sizes.pop() if len(sizes) == 1 else None)
    return Data(listing, FolderReader(request.root))


def _problems(checked: Sequence[Checked]) -> list[Finding]:
    """A finding for each file that should be an image and is none, and one note on all that never meant to
    be."""
    problems = [file.problem for file in checked if file.problem is not None]
    others = [problem.path for problem in problems if not problem.fatal]
    return [problem for problem in problems if problem.fatal] + ignored(others, "not an image, ignored")


def _left_empty(half: Half, good: set[str], findings: Sequence[Finding]) -> list[Finding]:
    """Class folders that hold files but no image, unless the files themselves are already complained
    about."""
    blamed = {finding.path for finding in findings if finding.fatal}
    return [
        Finding(f"{files[0].rsplit('/', 1)[0]}/", "a class folder without a usable image", fatal=True)
        for files in half.files.values()
        if files and not good.intersection(files) and not blamed.intersection(files)
    ]


def _skipped(finding: Finding) -> Finding:
    """What `skip_bad` makes of a finding: what concerns a path is left out and becomes a note."""
    return (
        replace(finding, what=f"left out: {finding.what}", fatal=False)
        if finding.fatal and finding.path
        else finding
    )


@dataclass(frozen=True)
class _Found:
    """Samples and classes before they were judged and split."""

    classes: tuple[str, ...]
    train: tuple[Item, ...]
    valid: tuple[Item, ...] | None
    findings: tuple[Finding, ...]
    split: str


def _with_files(
    scan: Scan, good: set[str], classes: tuple[str, ...], findings: tuple[Finding, ...]
) -> _Found:
    """Items for the good files; a class that only the validation half has gets an index of its own, and is
    judged later."""
    halves = [half for half in (scan.train, scan.valid) if half is not None]
    used = [
        name for half in halves for name, files in half.files.items() if any(file in good for file in files)
    ]
    label = {name: index for index, name in enumerate(dict.fromkeys((*classes, *used)))}
    items = [
        tuple(Item(file, label[name]) for name, files in half.files.items() for file in files if file in good)
        for half in halves
    ]
    return _Found(tuple(label), items[0], items[1] if scan.valid is not None else None, findings, scan.split)


def _listing(request: _Request, found: _Found, channels: int, size: tuple[int, int] | None) -> Listing:
    """The listing, split where it has to be; or one error with every fatal finding.

    Raises:
        DataError: see above.
    """
    findings = [*found.findings, *_class_findings(found)]
    if any(finding.fatal for finding in findings):
        raise DataError(report(request.source, findings))
    train, valid, split = found.train, found.valid, found.split
    if valid is None:
        train, valid = split_by_share(train, share=request.valid_share, seed=request.seed)
        split = f"stratified {request.valid_share:.4g} of each class held out, seed {request.seed}"
        findings += _singles(found.classes, train, valid)
    return Listing(
        request.source,
        request.root,
        request.kind,
        found.classes,
        train,
        valid,
        tuple(findings),
        split,
        channels,
        size,
    )


def _class_findings(found: _Found) -> list[Finding]:
    """What is wrong with the classes as a whole: none of it can be mended by leaving files out."""
    names = [found.classes[label] for label in sorted({item.label for item in found.train})]
    findings = []
    if not names:
        return [Finding("", "no usable image to train on", fatal=True)]
    if len(names) == 1:
        findings.append(
            Finding(
                "", f"one class only ({names[0]}); expected images of at least two to tell apart", fatal=True
            )
        )
    if found.valid is None:
        return findings + _unused(found.classes, names)
    others = [found.classes[label] for label in sorted({item.label for item in found.valid})]
    if not others:
        findings.append(
            Finding(
                "",
                "the validation half holds no usable image; fill it, or remove it to have one split off",
                fatal=True,
            )
        )
    strange = [name for name in others if name not in names]
    if strange:
        hints = "".join(nearest(name, names, n=1) for name in strange[:1])
        what = (
            f"classes in the validation half only: {_listed(strange)}{hints or ';'} the training "
            f"half has {_listed(names)}; "
            "expected the same names in both"
        )
        findings.append(Finding("", what, fatal=True))
    missing = [name for name in names if name not in others]
    if missing and others and not strange:
        findings.append(Finding("", f"classes without a validation image: {_listed(missing)}", fatal=False))
    elif missing and strange:
        findings.append(Finding("", f"classes in the training half only: {_listed(missing)}", fatal=False))
    return findings + _unused(found.classes, [*names, *others])


def _unused(classes: Sequence[str], names: Sequence[str]) -> list[Finding]:
    unused = [name for name in classes if name not in names]
    return (
        [Finding("", f"classes with a name but no image: {_listed(unused)}", fatal=False)] if unused else []
    )


def _singles(classes: Sequence[str], train: Sequence[Item], valid: Sequence[Item]) -> list[Finding]:
    """A note on classes too small to have an image in both halves."""
    lacking = sorted({item.label for item in train} - {item.label for item in valid})
    if not lacking or not valid:
        return []
    names = _listed([classes[label] for label in lacking])
    return [
        Finding(
            "", f"classes of one image, which trains, so that nothing validates them: {names}", fatal=False
        )
    ]


def _listed(names: Sequence[str]) -> str:
    """Up to ten names, and how many more."""
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(shown(name) for name in names[:10]) + more


def _near(path: Path) -> str:
    """The built-in name or the neighbour in the file system that is nearest to a path that is not there."""
    try:
        siblings = [entry.name for entry in path.absolute().parent.iterdir()]
    except OSError:
        siblings = []
    return nearest(path.name, (*BUILT_IN, *siblings), n=1) or ";"
