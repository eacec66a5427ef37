"""One split of a folder of class folders for everybody, for `flowers.py` and `recipe.py`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from sklearn.model_selection import train_test_split

ENDINGS = (".jpg", ".jpeg", ".png")

Split = Mapping[str, Sequence[str]]


def split_of(data: Path, said: Path | None, seed: int) -> Split:
    """Paths below `data` for both halves: what a file says, or a stratified 80/20."""
    if said is not None:
        split = json.loads(said.read_text(encoding="utf-8"))
        return {half: sorted(split[half]) for half in ("train", "val")}
    found = sorted(p for p in data.glob("*/*") if p.suffix.lower() in ENDINGS)
    paths = [p.relative_to(data).as_posix() for p in found]
    labels = [p.parent.name for p in found]
    train, val = train_test_split(paths, test_size=0.2, stratify=labels, random_state=seed)
    return {"train": sorted(train), "val": sorted(val)}


def hash_of(split: Split) -> str:
    """A short name for the split, the same wherever the images lie."""
    return hashlib.sha256(json.dumps(dict(split)).encode()).hexdigest()[:12]


def lay_out(split: Split, data: Path, folder: Path) -> None:
    """The split as train/CLASS/FILE and val/CLASS/FILE, by links."""
    for half, paths in split.items():
        for path in paths:
            link = folder / half / path
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to((data / path).resolve())
