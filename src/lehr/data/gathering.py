"""Any kind of data -> the samples that are there, each with its digest, and what reads one.

Files and arrays are read and checked by the files beside this one; here what they say becomes one value. This
file must not know what a person wrote, nor what is done about what is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from lehr.data.arrays import ArrayReader, Arrays, Pixels, load_npz
from lehr.data.checking import Checked, Keep, Progress, check_files, notes_on, one_note
from lehr.data.cifar import cifar_folder, load_cifar
from lehr.data.decoded import Decoded, KeptReader, decoded_budget
from lehr.data.digits import digits_of, load_digits_few
from lehr.data.folders import Half, scan_folder
from lehr.data.images import read_image
from lehr.data.judging import Found, Request
from lehr.data.listing import Finding, Item, digest_of

BUILT_IN = ("digits",)
PRETRAINING = "digits 0 to 4"  # no name that a person may write: what its listing calls it
Reader = Callable[[str, int], Image.Image]


@dataclass(frozen=True)
class FolderReader:
    """Reads items by their path below `root`."""

    root: str

    def __call__(self, path: str, channels: int) -> Image.Image:
        """The image of that path, mode L for 1 channel, RGB for 3."""
        return read_image(Path(self.root, path), channels)


def gather(
    request: Request, *, skip_bad: bool, progress: Progress | None, known: Collection[str] = frozenset()
) -> tuple[Found, Reader]:
    """What there is, read and checked but not judged, and what reads a sample of it.

    Args:
        request: where to look, and for what kind of thing.
        skip_bad: files that cannot be read, and classes left empty, are notes and nothing fatal.
        progress: called with (files done, files in all) while a folder is checked.
        known: paths of a folder whose bytes alone are read, without a look at the image in them.

    Raises:
        DataError: where nothing can be told apart at all, such as a folder without class folders.
        OSError: for a path that cannot even be asked about.
    """
    root = Path(request.root)
    if request.kind == "folder":
        decoded = Decoded(decoded_budget())
        found = _in_folder(root, skip_bad, progress, known=known, keep=decoded.keep)
        return found, KeptReader(FolderReader(request.root), decoded)
    if request.kind == "npz":
        arrays = load_npz(root)
    elif request.kind == "cifar":
        arrays = load_cifar(cifar_folder(root) or root)
    else:
        arrays = _built_in(request.source)
    return _in_arrays(arrays), ArrayReader(arrays.pixels)


def _built_in(name: str) -> Arrays:
    if name == PRETRAINING:
        return digits_of(range(5))
    arrays = load_digits_few()
    if not Path(name).exists():
        return arrays
    what = f"the built-in {name} is meant; for the folder of this name write ./{name}"
    return replace(arrays, findings=(Finding("", what, fatal=False),))


def _in_arrays(arrays: Arrays) -> Found:
    pixels = next(iter(arrays.pixels.values()))
    return Found(
        arrays.classes,
        _digested(arrays.train, arrays.pixels),
        None if arrays.valid is None else _digested(arrays.valid, arrays.pixels),
        arrays.findings,
        arrays.split,
        channels=1 if pixels.ndim == 3 else 3,
        size=(int(pixels.shape[1]), int(pixels.shape[2])),
    )


def _digested(items: Sequence[Item], pixels: Mapping[str, Pixels]) -> tuple[Item, ...]:
    """The items of arrays, each with the digest of its row."""
    rows = [item.path.rpartition("/") for item in items]
    return tuple(
        Item(item.path, item.label, digest_of(pixels[name][int(row)].data))
        for item, (name, _, row) in zip(items, rows, strict=True)
    )


def _in_folder(
    root: Path, skip_bad: bool, progress: Progress | None, *, known: Collection[str], keep: Keep
) -> Found:
    scan = scan_folder(root)
    halves = [half for half in (scan.train, scan.valid) if half is not None]
    paths = [file for half in halves for files in half.files.values() for file in files]
    checked = check_files(root, paths, progress, known=known, keep=keep)
    good = {file.path: file for file in checked if file.problem is None}
    findings = [*scan.findings, *_problems(checked), *notes_on(checked)]
    for half in halves:
        findings += _without_images(half, good)
    if skip_bad:
        findings = [_skipped(finding) for finding in findings]
    classes, items = _items(halves, good)
    sizes = {file.size for file in good.values()}
    return Found(
        classes,
        items[0],
        items[1] if scan.valid is not None else None,
        tuple(findings),
        scan.split,
        channels=1 if all(file.channels == 1 for file in good.values()) else 3,
        size=sizes.pop() if len(sizes) == 1 else None,
    )


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
        tuple(
            Item(file, label[name], good[file].digest)
            for name, files in half.files.items()
            for file in files
            if file in good
        )
        for half in halves
    ]
    return tuple(label), items
