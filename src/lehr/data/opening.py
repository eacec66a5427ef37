"""What a person points at -> a checked `Data`: the one way into this package.

Decides what kind of thing it is, has it read and checked, and turns all that is wrong into one error: once to
begin with it, and again to go on. How files and arrays are read is for the files beside this one.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from lehr.data.checking import Progress
from lehr.data.cifar import cifar_folder
from lehr.data.comparing import counterparts, listing_differences
from lehr.data.gathering import BUILT_IN, PRETRAINING, gather
from lehr.data.judging import Found, Request, listing_of
from lehr.data.listing import Listing, shown
from lehr.data.transforms import Transform
from lehr.errors import DataError, nearest

if TYPE_CHECKING:
    from lehr.data.datasets import ImageSamples

_ACCEPTED = (
    "a folder of class folders (or with train/ and val/), a .npz file, a folder with CIFAR-10's files, "
    f"or a built-in name: {', '.join(BUILT_IN)}"
)


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
        request = _request(source, seed=seed, valid_share=valid_share)
        return _judged(request, skip_bad=skip_bad, progress=progress)
    except OSError as error:  # a path that cannot even be asked about: too long, behind a closed folder
        detail = shown(str(error.filename or ""))
        raise DataError(
            f"{shown(source)} cannot be read: {error.strerror or error} {detail}".rstrip()
        ) from error


def reopened(
    was: Listing, where: str | os.PathLike[str] | None = None, *, progress: Progress | None = None
) -> Data:
    """The data of `was` again: the same samples in the same order and halves, or an error that says why not.

    Whatever is there is looked at anew, and no path of `was` is opened that was not found so. Files that were
    left out at the time, and others that are no usable images, are passed over again. Of a file that trained
    or validated the bytes alone are read: while they are what they were, so is the image.

    Args:
        was: the listing that a run keeps.
        where: where the data are now, as for `open_data`; None for where they were.
        progress: called with (files done, files in all) while a folder is checked.

    Raises:
        DataError: where there is nothing, or anything else: samples gone, new, changed, moved or of another
            class. What differs is named.

    Example:
        >>> was = open_data("digits").listing
        >>> reopened(was).listing == was
        True
    """
    built_in = where is None and was.kind == "digits"
    source = os.fspath(where) if where is not None else was.source if built_in else was.root
    name = shown(source)
    try:
        request = _request(source) if not built_in else Request(source, "", "digits")
        # Without a digest the bytes would say nothing, so such a file is decoded.
        known = {item.path for item in was.train + was.valid if item.digest}
        found, read = gather(request, skip_bad=True, progress=progress, known=known)
    except (DataError, OSError) as error:
        place = "they" if where is None else f"they ({shown(was.root or was.source)} at first)"
        raise DataError(
            f"{name}: the data of this run cannot be opened again; put them back, or say where {place} are now: "
            f"lehr resume RUN --data DATA\n  {error if isinstance(error, DataError) else shown(str(error))}"
        ) from error
    now = _as_before(was, request, found)
    differences = listing_differences(was, now)
    if differences:
        lines = "".join(f"\n  {line}" for line in differences)
        raise DataError(
            f"{name}: not the data that this run began with; put them back as they were, or begin a new run: "
            f"lehr fit {shlex.quote(name)}{lines}"
        )
    partner = counterparts(was.train + was.valid, now.train + now.valid)
    train, valid = (tuple(partner[item.path] for item in half) for half in (was.train, was.valid))
    return Data(replace(was, source=now.source, root=now.root, train=train, valid=valid), read)


def _as_before(was: Listing, request: Request, found: Found) -> Listing:
    """What was found as a listing, split as `was` is where it came in one piece."""
    train, valid = found.train, found.valid
    if valid is None:
        partner = counterparts(was.train + was.valid, train)
        held_out = {partner[item.path].path for item in was.valid if item.path in partner}
        valid = tuple(item for item in train if item.path in held_out)
        train = tuple(item for item in train if item.path not in held_out)
    # Of known files only the bytes were read: where these are the same, so are size and channels.
    channels, size = (was.channels, was.size) if request.kind == "folder" else (found.channels, found.size)
    return replace(
        was,
        source=was.source if request.root == was.root else request.source,
        root=request.root,
        kind=request.kind,
        classes=found.classes,
        train=train,
        valid=valid,
        channels=channels,
        size=size,
    )


def _judged(request: Request, *, skip_bad: bool, progress: Progress | None) -> Data:
    found, read = gather(request, skip_bad=skip_bad, progress=progress)
    return Data(listing_of(request, found), read)


def _request(source: str, *, seed: int = 0, valid_share: float = 0.0) -> Request:
    """What kind of thing `source` is, and where."""
    path = Path(source).expanduser()
    if source in BUILT_IN:
        return Request(source, "", "digits", seed, valid_share)
    if not path.exists():
        raise DataError(
            f"{shown(source)}: no such file or folder, and no built-in name{_near(path)} Expected {_ACCEPTED}"
        )
    if path.is_file():
        if path.suffix.lower() != ".npz":
            raise DataError(f"{shown(source)} is a file; expected {_ACCEPTED} (unpack an archive first)")
        kind = "npz"
    elif path.is_dir():
        kind = "folder" if cifar_folder(path) is None else "cifar"
    else:
        raise DataError(f"{shown(source)} is neither a file nor a folder; expected {_ACCEPTED}")
    return Request(source, str(path.absolute()), kind, seed, valid_share)


def digits_pretraining(*, seed: int = 0, valid_share: float = 0.2) -> Data:
    """The digits 0 to 4, which no sample of `open_data("digits")` shows: to pretrain a small backbone on.

    >>> digits_pretraining().classes
    ('0', '1', '2', '3', '4')
    """
    return _judged(Request(PRETRAINING, "", "digits", seed, valid_share), skip_bad=False, progress=None)


def _near(path: Path) -> str:
    """The built-in name or the neighbour in the file system that is nearest to a path that is not there."""
    try:
        siblings = [entry.name for entry in path.absolute().parent.iterdir()]
    except OSError:
        siblings = []
    return nearest(path.name, (*BUILT_IN, *siblings), n=1)
