"""A folder of images -> which file belongs to which class and half, before any file is opened.

Found by names and kinds of directory entries alone. This file must not know what is inside an image.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lehr.data.checking import one_note
from lehr.data.listing import Finding, shown
from lehr.errors import DataError

_TRAIN = ("train", "training")
_VALID = (
    "val",
    "valid",
    "validation",
    "test",
    "testing",
)  # in this order: a test set validates only where nothing else does
_ENTRIES = ("entry", "entries")
_LITTER = {"thumbs.db", "desktop.ini", "__macosx", "@eadir"}


@dataclass(frozen=True)
class Half:
    """The files of each class (posix paths relative to the source, sorted), by class name.

    `prefix` is what stands before the class folder in every path: `""`, or `"train/"`.
    """

    files: dict[str, tuple[str, ...]]
    prefix: str = ""

    def folder_of(self, path: str) -> str:
        """The class folder that a file of this half lies in."""
        return self.prefix + path[len(self.prefix) :].split("/", 1)[0]


@dataclass(frozen=True)
class Scan:
    """What lies in a folder. `valid` is None where the folder has no validation half of its own."""

    train: Half
    valid: Half | None
    findings: tuple[Finding, ...]
    split: str = ""


def scan_folder(root: Path) -> Scan:
    """Class folders, or `train/` and `val/` of them, with every file below each class.

    Hidden entries and what systems leave behind (Thumbs.db, __MACOSX) are passed over; links are followed,
    but no folder of a class is read twice, so loops end.

    Raises:
        DataError: where `root` cannot be listed, or holds no class folders at all.
    """
    folders, loose, findings = _entries(root, "")
    _refuse_closed(root, findings)
    halves = _halves(root, folders)
    if halves is None:
        half, more = _read_half(root, "", folders, loose)
        return Scan(half, None, (*findings, *more))
    train, valid = halves
    others = sorted(set(folders) - {train, valid})
    if others or loose:
        findings += one_note(
            [*(f"{name}/" for name in others), *loose],
            f"not in {train}/{f' or {valid}/' if valid else ''}, ignored",
            units=_ENTRIES,
        )
    train_half, more = _named_half(root, train)
    findings += more
    if valid is None:
        return Scan(train_half, None, tuple(findings))
    valid_half, more = _named_half(root, valid)
    return Scan(train_half, valid_half, (*findings, *more), f"the folders {train}/ and {valid}/")


def _refuse_closed(folder: Path, findings: Sequence[Finding]) -> None:
    """Without a list of the classes there is nothing to go on with."""
    for finding in findings:
        if finding.fatal:
            raise DataError(
                f"{shown(str(folder))}: this folder cannot be listed ({finding.detail}); mend its permissions"
            )


def _halves(root: Path, folders: Sequence[str]) -> tuple[str, str | None] | None:
    """The names of the two halves, or None for plain class folders (a class may well be called "train")."""
    by_name = {name.casefold(): name for name in folders}
    train = next((by_name[name] for name in _TRAIN if name in by_name), None)
    valid = next((by_name[name] for name in _VALID if name in by_name), None)
    if train is None or (valid is None and len(folders) > 1):
        return None
    if valid is None and not _entries(root / train, train)[0]:
        return None  # a single class folder called "train"
    return train, valid


def _named_half(root: Path, name: str) -> tuple[Half, list[Finding]]:
    folders, loose, findings = _entries(root / name, f"{name}/")
    _refuse_closed(root / name, findings)
    half, more = _read_half(root, f"{name}/", folders, loose)
    return half, findings + more


def _read_half(
    root: Path, prefix: str, folders: Sequence[str], loose: Sequence[str]
) -> tuple[Half, list[Finding]]:
    """The class folders below `root / prefix`."""
    findings = one_note(
        [prefix + name for name in loose], "beside the class folders, so of no class: ignored"
    )
    if not folders:
        where = shown(str(root / prefix))
        hint = (
            f"it holds {len(loose)} files; put them into one folder for each class"
            if loose
            else "it is empty"
        )
        raise DataError(
            f"{where}: no class folders; expected one folder of images for each class, but {hint}"
        )
    files: dict[str, tuple[str, ...]] = {}
    for folder in folders:
        found, more = _walk(root, prefix + folder)
        findings += more
        name = unicodedata.normalize("NFC", folder)
        if name in files:
            findings.append(
                Finding(
                    f"{prefix}{folder}/",
                    "a second folder of the same name in other Unicode, joined",
                    fatal=False,
                )
            )
        files[name] = tuple(sorted((*files.get(name, ()), *found), key=_order))
        if not found and not any(finding.fatal for finding in more):
            findings.append(Finding(f"{prefix}{folder}/", "an empty class folder", fatal=True))
    return Half(dict(sorted(files.items())), prefix), findings


def _walk(root: Path, top: str) -> tuple[list[str], list[Finding]]:
    """Every file below a class folder, at any depth."""
    files: list[str] = []
    findings: list[Finding] = []
    # What lies above the class is never part of it, so a link upwards leads nowhere.
    seen = {_identity(folder) for folder in (root, *(root / top).parents[: top.count("/")])}
    again: list[str] = []
    waiting = [top]
    while waiting:
        folder = waiting.pop()
        identity = _identity(root / folder)
        if identity in seen:
            again.append(f"{folder}/")
            continue
        seen.add(identity)
        folders, loose, more = _entries(root / folder, f"{folder}/")
        findings += more
        files += [f"{folder}/{name}" for name in loose]
        waiting += [f"{folder}/{name}" for name in reversed(folders)]
    what = "a link to a folder that was read already, not followed"
    return files, findings + one_note(again, what, units=("link", "links"))


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _entries(folder: Path, prefix: str) -> tuple[list[str], list[str], list[Finding]]:
    """The names of the folders and of the files in `folder`, sorted, and what else was there."""
    folders: list[str] = []
    files: list[str] = []
    odd: list[str] = []
    findings: list[Finding] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith(".") or entry.name.casefold() in _LITTER:
                    continue
                {"folder": folders, "file": files, "other": odd}[_kind(entry)].append(entry.name)
    except OSError as error:
        findings.append(
            Finding(prefix, "a folder that cannot be listed", fatal=True, detail=error.strerror or str(error))
        )
    strange = [prefix + name for name in sorted(odd)]
    findings += one_note(strange, "neither a file nor a folder, ignored", units=_ENTRIES)
    return sorted(folders, key=_order), sorted(files, key=_order), findings


def _kind(entry: os.DirEntry[str]) -> str:
    """What an entry is, links followed; one that leads nowhere counts as a file: reading it will say so."""
    try:
        if entry.is_dir():
            return "folder"
        return "file" if entry.is_file() or entry.is_symlink() else "other"
    except OSError:
        return "file"


def _order(name: str) -> tuple[str, str]:
    """By composed text first: file systems differ in how they hand out accents."""
    return unicodedata.normalize("NFC", name), name
