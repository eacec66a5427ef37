"""What a person points at -> a checked `Data`: the one way into this package.

Decides what kind of thing it is, has it read and checked, splits it where the person did not, and turns all
that is wrong into one error. How files and arrays are read is for the files beside this one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from lehr.data.arrays import ArrayReader, Arrays, load_npz
from lehr.data.checking import Checked, Progress, check_files, notes_on, one_note
from lehr.data.cifar import cifar_folder, load_cifar
from lehr.data.digits import digits_of, load_digits_few
from lehr.data.folders import Half, scan_folder
from lehr.data.images import read_image
from lehr.data.judging import Found, Request, listing_of
from lehr.data.listing import Finding, Item, Listing, shown
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
    """A checked data set: `listing` says what is in it, `train` and `valid` give the two halves."""

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
        (('5', '6', '7', '8', '9'), 25, 871)
    """
    source = os.fspath(where)
    try:
        return _open(source, seed=seed, valid_share=valid_share, skip_bad=skip_bad, progress=progress)
    except OSError as error:  # a path that cannot even be asked about: too long, behind a closed folder
        detail = shown(str(error.filename or ""))
        raise DataError(
            f"{shown(source)} cannot be read: {error.strerror or error} {detail}".rstrip()
        ) from error


def _open(source: str, *, seed: int, valid_share: float, skip_bad: bool, progress: Progress | None) -> Data:
    """What kind of thing `source` is, and that kind's way in."""
    path = Path(source).expanduser()
    if source in BUILT_IN:
        arrays = load_digits_few()
        if path.exists():
            what = f"the built-in {source} is meant; for the folder of this name write ./{source}"
            arrays = replace(arrays, findings=(Finding("", what, fatal=False),))
        return _from_arrays(arrays, Request(source, "", "digits", seed, valid_share))
    if not path.exists():
        raise DataError(
            f"{shown(source)}: no such file or folder, and no built-in name{_near(path)} Expected {_ACCEPTED}"
        )
    root = str(path.absolute())
    if path.is_file():
        if path.suffix.lower() != ".npz":
            raise DataError(f"{shown(source)} is a file; expected {_ACCEPTED} (unpack an archive first)")
        return _from_arrays(load_npz(path), Request(source, root, "npz", seed, valid_share))
    if not path.is_dir():
        raise DataError(f"{shown(source)} is neither a file nor a folder; expected {_ACCEPTED}")
    cifar = cifar_folder(path)
    if cifar is not None:
        return _from_arrays(load_cifar(cifar), Request(source, root, "cifar", seed, valid_share))
    return _from_folder(path, Request(source, root, "folder", seed, valid_share), skip_bad, progress)


def digits_pretraining(*, seed: int = 0, valid_share: float = 0.2) -> Data:
    """The digits 0 to 4, which no sample of `open_data("digits")` shows: to pretrain a small backbone on.

    >>> digits_pretraining().classes
    ('0', '1', '2', '3', '4')
    """
    return _from_arrays(digits_of(range(5)), Request("digits 0 to 4", "", "digits", seed, valid_share))


def _from_arrays(arrays: Arrays, request: Request) -> Data:
    pixels = next(iter(arrays.pixels.values()))
    found = Found(
        arrays.classes,
        arrays.train,
        arrays.valid,
        arrays.findings,
        arrays.split,
        channels=1 if pixels.ndim == 3 else 3,
        size=(int(pixels.shape[1]), int(pixels.shape[2])),
    )
    return Data(listing_of(request, found), ArrayReader(arrays.pixels))


def _from_folder(path: Path, request: Request, skip_bad: bool, progress: Progress | None) -> Data:
    scan = scan_folder(path)
    halves = [half for half in (scan.train, scan.valid) if half is not None]
    paths = [file for half in halves for files in half.files.values() for file in files]
    checked = check_files(path, paths, progress)
    good = {file.path: file for file in checked if file.problem is None}
    findings = [*scan.findings, *_problems(checked), *notes_on(checked)]
    for half in halves:
        findings += _without_images(half, good)
    if skip_bad:
        findings = [_skipped(finding) for finding in findings]
    classes, items = _items(halves, good)
    sizes = {file.size for file in good.values()}
    found = Found(
        classes,
        items[0],
        items[1] if scan.valid is not None else None,
        tuple(findings),
        scan.split,
        channels=1 if all(file.channels == 1 for file in good.values()) else 3,
        size=sizes.pop() if len(sizes) == 1 else None,
    )
    return Data(listing_of(request, found), FolderReader(request.root))


def _problems(checked: Sequence[Checked]) -> list[Finding]:
    """A finding for each file that should be an image and is none; one note on all that never meant to be."""
    problems = [file.problem for file in checked if file.problem is not None]
    others = [problem.path for problem in problems if not problem.fatal]
    return [problem for problem in problems if problem.fatal] + one_note(others, "not an image, ignored")


def _without_images(half: Half, good: Mapping[str, Checked]) -> list[Finding]:
    """The class folders that hold files, but none that can be used."""
    return [
        Finding(f"{half.folder_of(files[0])}/", "a class folder without a usable image", fatal=True)
        for files in half.files.values()
        if files and not any(file in good for file in files)
    ]


def _skipped(finding: Finding) -> Finding:
    """What `skip_bad` makes of a finding: what concerns a path is left out and becomes a note."""
    if not (finding.fatal and finding.path):
        return finding
    return replace(finding, what=f"left out: {finding.what}", fatal=False)


def _items(
    halves: Sequence[Half], good: Mapping[str, Checked]
) -> tuple[tuple[str, ...], list[tuple[Item, ...]]]:
    """The classes that have a usable image, those of the training half first, and each half's items."""
    used = [
        name for half in halves for name, files in half.files.items() if any(file in good for file in files)
    ]
    label = {name: index for index, name in enumerate(dict.fromkeys(used))}
    items = [
        tuple(Item(file, label[name]) for name, files in half.files.items() for file in files if file in good)
        for half in halves
    ]
    return tuple(label), items


def _near(path: Path) -> str:
    """The built-in name or the neighbour in the file system that is nearest to a path that is not there."""
    try:
        siblings = [entry.name for entry in path.absolute().parent.iterdir()]
    except OSError:
        siblings = []
    return nearest(path.name, (*BUILT_IN, *siblings), n=1)
