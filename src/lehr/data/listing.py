"""What was found in a data set, as values: which samples, which classes, which half, what was noticed.

A listing holds no pixels and goes into a run directory as JSON. This file must not know how anything is read.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from typing import Any

from lehr.errors import DataError

DIGEST_BYTES = 8
KINDS = ("cifar", "digits", "folder", "npz")
_VERSION = 2
# From the top of a file system or of a drive; through ".."; with an empty part or "."; a zero character.
_OUTSIDE = re.compile(r"^(?:[A-Za-z]:)?[/\\]|(?:^|[/\\])\.\.(?:[/\\]|\Z)|(?:^|/)\.?(?:/|\Z)|\0")
_DIGEST = re.compile(r"(?:[0-9a-f]{16})?")


@dataclass(frozen=True)
class Finding:
    """One thing that looking at the data brought up.

    `path` is relative to the source, as posix text, or `""` for what concerns the whole; a note about many
    files carries the first of them. `fatal` findings stop the training; the others are notes (`"transparency,
    laid on white (3 files)"`). `detail` is what is particular to this file, such as the decoder's own words.
    """

    path: str
    what: str
    fatal: bool
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Item:
    """One sample: its path in the source (`"daisy/1.jpg"`, or `"x_train/17"`), its class index, its content.

    `digest` is `digest_of` the bytes of the file, or of the array's row; `""` where nobody took it.
    """

    path: str
    label: int
    digest: str = ""


@dataclass(frozen=True)
class Listing:
    """A data set as found: enough to train on it again in the same way, and to say what was done with it.

    `source` is what the person wrote and `root` the absolute path behind it (`""` for built-in data); `kind`
    is `"folder"`, `"npz"`, `"cifar"` or `"digits"`; `split` says in a sentence how the halves came about;
    `channels` is 1 where every image is grey, else 3; `size` is (height, width) in pixels where all images
    agree, else None.
    """

    source: str
    root: str
    kind: str
    classes: tuple[str, ...]
    train: tuple[Item, ...]
    valid: tuple[Item, ...]
    findings: tuple[Finding, ...]
    split: str
    channels: int = 3
    size: tuple[int, int] | None = None

    @property
    def counts(self) -> dict[str, tuple[int, int]]:
        """The number of training and of validation samples of each class, in class order."""
        train, valid = (Counter(item.label for item in half) for half in (self.train, self.valid))
        return {name: (train[label], valid[label]) for label, name in enumerate(self.classes)}

    def notes(self) -> tuple[str, ...]:
        """What was noticed without being fatal, as printable lines: one a note, or one for many of a kind."""
        groups: dict[str, list[Finding]] = {}
        for finding in self.findings:
            if not finding.fatal:
                groups.setdefault(finding.what, []).append(finding)
        return tuple(line for what, group in groups.items() for line in _note_lines(what, group))

    def to_json(self) -> dict[str, Any]:
        """The listing as a dict for `json.dumps`; `from_json` gives an equal listing back."""
        values = {name: getattr(self, name) for name in ("source", "root", "kind", "split", "channels")}
        return {
            "version": _VERSION,
            **values,
            "size": None if self.size is None else list(self.size),
            "classes": list(self.classes),
            "findings": [asdict(finding) for finding in self.findings],
            "train": _half_to_json(self.train),
            "valid": _half_to_json(self.valid),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Listing:
        """The listing that `to_json` wrote; nothing in it is believed before it was looked at.

        Raises:
            DataError: for values of another version or type, with something missing or too much, with labels
                beyond the classes, and with paths that lead out of the data.
        """
        if not isinstance(values, Mapping):
            raise _unreadable(f"it is a {type(values).__name__}; expected an object")
        _check_version(values.get("version"))
        names = ("version", *cls.__dataclass_fields__)
        wrong = [name for name in (*names, *values) if (name in names) != (name in values)]
        if wrong:
            raise _unreadable(f"{_quoted(wrong[0])} is {'missing' if wrong[0] in names else 'unknown'}")
        source, root = (_text(values[name], name) for name in ("source", "root"))
        if "\0" in source + root:
            raise _unreadable("source and root: no path has a zero character")
        if values["kind"] not in KINDS:
            raise _unreadable(f"kind: {_quoted(values['kind'])}; expected {', '.join(KINDS)}")
        if type(values["channels"]) is not int or values["channels"] not in (1, 3):
            raise _unreadable(f"channels: {_quoted(values['channels'])}; expected 1 or 3")
        classes = tuple(_text(name, "classes") for name in _list(values["classes"], "classes"))
        train, valid = (_half_from_json(values[half], half, len(classes)) for half in ("train", "valid"))
        (most, times), *_ = Counter(item.path for item in train + valid).most_common(1) or [("", 0)]
        if times > 1:
            raise _unreadable(f"{_quoted(most)} comes {times} times")
        findings = tuple(_finding_from_json(finding) for finding in _list(values["findings"], "findings"))
        split, size = _text(values["split"], "split"), _size_from_json(values["size"])
        kind, channels = values["kind"], values["channels"]
        return cls(source, root, kind, classes, train, valid, findings, split, channels, size)


def digest_of(content: bytes | memoryview) -> str:
    """What the bytes of a sample are known by: 16 hexadecimal digits.

    >>> digest_of(b"some bytes")
    'b401af8380c480ef'
    """
    return blake2b(content, digest_size=DIGEST_BYTES).hexdigest()


def _check_version(version: object) -> None:
    if type(version) is int and 0 < version < _VERSION:
        raise DataError(
            f"a data listing of version {version}, made by an older lehr, which did not keep what was in each "
            f"sample; this lehr reads version {_VERSION}: begin a new run, or use the lehr that made it"
        )
    if type(version) is not int or version != _VERSION:
        raise DataError(
            f"a data listing of version {_quoted(version)}; this lehr reads version {_VERSION}: use the lehr "
            "that made it"
        )


def _half_to_json(items: Sequence[Item]) -> dict[str, list[Any]]:
    """Three lists side by side: half of the size of a list of objects."""
    return {
        "paths": [item.path for item in items],
        "labels": [item.label for item in items],
        "digests": [item.digest for item in items],
    }


def _half_from_json(half: object, where: str, classes: int) -> tuple[Item, ...]:
    if not isinstance(half, Mapping) or set(half) != {"paths", "labels", "digests"}:
        raise _unreadable(f"{where}: expected an object of paths, labels and digests")
    paths, labels, digests = (
        _list(half[name], f"{where}: {name}") for name in ("paths", "labels", "digests")
    )
    if not len(paths) == len(labels) == len(digests):
        raise _unreadable(
            f"{where}: {len(paths)} paths, {len(labels)} labels, {len(digests)} digests; expected as many of each"
        )
    for path, label, digest in zip(paths, labels, digests, strict=True):
        if not _stays_inside(path):
            raise _unreadable(f"{where}: {_quoted(path)} is no path inside the data")
        if type(label) is not int or not 0 <= label < classes:
            raise _unreadable(f"{where}: the label {_quoted(label)}; expected 0 to {classes - 1}")
        if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            raise _unreadable(f"{where}: the digest {_quoted(digest)}; expected 16 hexadecimal digits")
    return tuple(map(Item, paths, labels, digests))


def _stays_inside(path: object) -> bool:
    """Whether a path leads to something below where it starts, on this system and on others.

    A name may have a colon where file systems take one ("A: early/1.png"), so not on Windows.
    """
    return isinstance(path, str) and not _OUTSIDE.search(path) and not (os.name == "nt" and ":" in path)


def _finding_from_json(finding: object) -> Finding:
    if not isinstance(finding, Mapping) or set(finding) != {"path", "what", "fatal", "detail"}:
        raise _unreadable("findings: expected objects of path, what, fatal and detail")
    if not isinstance(finding["fatal"], bool):
        raise _unreadable(f"findings: fatal is {_quoted(finding['fatal'])}; expected true or false")
    path, what, detail = (_text(finding[name], "findings") for name in ("path", "what", "detail"))
    return Finding(path, what, finding["fatal"], detail)


def _size_from_json(size: object) -> tuple[int, int] | None:
    if size is None:
        return None
    if not isinstance(size, list) or len(size) != 2 or not all(type(n) is int and n > 0 for n in size):
        raise _unreadable(f"size: {_quoted(size)}; expected height and width in pixels, or null")
    return size[0], size[1]


def _list(value: object, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise _unreadable(f"{where}: {_quoted(value)}; expected a list")
    return value


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise _unreadable(f"{where}: {_quoted(value)}; expected a text")
    return value


def _quoted(value: object) -> str:
    """A value from a file, short and safe to print."""
    text = f'"{value}"' if isinstance(value, str) else f"a {type(value).__name__}"
    if value is None or isinstance(value, bool | float):
        text = "null" if value is None else str(value).lower()
    elif isinstance(value, int):  # Python does not print numbers beyond some thousand digits
        text = str(value) if abs(value) < 10**20 else "a huge number"
    return shown(text if len(text) <= 80 else text[:80] + "...")


def _unreadable(why: str) -> DataError:
    return DataError(
        f"a data listing that cannot be read: {why}. It was not written by lehr, or was changed since; "
        "put back the data.json that the run wrote, or begin a new run"
    )


def shown(text: str) -> str:
    r"""`text` safe to print: accents composed (NFC), what a terminal might act on escaped.

    >>> print(shown("new\nline \x1b[2J"))
    new\nline \x1b[2J
    """
    composed = unicodedata.normalize("NFC", text)
    if composed.isprintable():
        return composed
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in composed)


def one_line(finding: Finding) -> str:
    """A finding as one printable line.

    >>> one_line(Finding("a/b.jpg", "CMYK, converted to RGB (2 files)", fatal=False))
    'CMYK, converted to RGB (2 files): a/b.jpg'
    """
    parts = (finding.what, finding.path, finding.detail)
    return ": ".join(shown(part) for part in parts if part)


def _note_lines(what: str, group: Sequence[Finding]) -> list[str]:
    """Up to three findings of a kind one by one; more as one line with the first and a count."""
    if len(group) <= 3:
        return [one_line(finding) for finding in group]
    return [f"{shown(what)} ({len(group)} files): {shown(group[0].path)} and {len(group) - 1} more"]


def report(source: str, findings: Sequence[Finding], *, lines: int = 20) -> str:
    """The fatal findings as one text: grouped, the files of each group by path, and what to do.

    `lines` bounds the lines in the middle; what does not fit is counted.
    """
    fatal = [finding for finding in findings if finding.fatal]
    groups: dict[str, list[Finding]] = {}
    for finding in fatal:
        groups.setdefault(finding.what, []).append(finding)
    share = max(1, lines // max(1, len(groups)) - 1)
    text = [f"{shown(source)}: {len(fatal)} problem{'' if len(fatal) == 1 else 's'} found before training."]
    unsaid = 0
    for what, group in list(groups.items())[: lines // 2]:
        files = [finding for finding in group if finding.path]
        text.append(f"  {shown(what)}" + (f" ({len(files)}):" if files else ""))
        text += [
            f"    {shown(f.path)}" + (f"  [{shown(f.detail)}]" if f.detail else "") for f in files[:share]
        ]
        unsaid += len(files[share:])
    unsaid += sum(len(group) for group in list(groups.values())[lines // 2 :])
    if unsaid:
        text.append(f"  and {unsaid} more")
    if any(finding.path for finding in fatal):
        text.append(
            "Mend or remove what is listed by path, or go on without it: --skip-bad (in Python: "
            "skip_bad=True)."
        )
    return "\n".join(text)
