"""What was found in a data set, as values: which samples, which classes, which half, what was noticed.

A listing holds no pixels and goes into a run directory as JSON. This file must not know how anything is read.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lehr.errors import DataError

_VERSION = 1


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
    """One sample: its path in the source (`"daisy/1.jpg"`, or `"x_train/17"`) and its class index."""

    path: str
    label: int


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
        """The listing that `to_json` wrote.

        Raises:
            DataError: for values of another version, or with something missing.
        """
        if values.get("version") != _VERSION:
            raise DataError(
                f"a data listing of version {values.get('version')!r}; this lehr reads version {_VERSION}"
            )
        try:
            size = values["size"]
            return cls(
                source=values["source"],
                root=values["root"],
                kind=values["kind"],
                classes=tuple(values["classes"]),
                train=_half_from_json(values["train"]),
                valid=_half_from_json(values["valid"]),
                findings=tuple(Finding(**finding) for finding in values["findings"]),
                split=values["split"],
                channels=values["channels"],
                size=None if size is None else (size[0], size[1]),
            )
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise DataError(
                f"a data listing that cannot be read ({error!r}); it was not written by lehr, or was edited"
            ) from error


def _half_to_json(items: Sequence[Item]) -> dict[str, list[Any]]:
    """Two lists side by side: a third of the size of a list of objects."""
    return {"paths": [item.path for item in items], "labels": [item.label for item in items]}


def _half_from_json(half: Mapping[str, Sequence[Any]]) -> tuple[Item, ...]:
    return tuple(Item(path, label) for path, label in zip(half["paths"], half["labels"], strict=True))


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
