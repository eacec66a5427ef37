"""What `lehr predict` prints: images found by path, folder or glob, and a table, CSV or JSON of what the model says of them."""

from __future__ import annotations

import csv
import glob
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TextIO

from lehr.data.listing import shown
from lehr.errors import RequestError
from lehr.run.reload import Prediction, load, predict

Style = Literal["table", "csv", "json"]
_IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


def predict_paths(
    run: str, paths: Sequence[str], *, top: int, style: Style | str, device: str = "cpu"
) -> int:
    """Predict every image that `paths` mean and print the rows to standard output; the number that could not be read.

    Raises:
        RequestError: for a run that cannot be used, or paths that mean no image.
    """
    found = list(dict.fromkeys(images_at(paths)))
    loaded = load(run, device=device)
    rows = _counting(predict(loaded, found, top=top))
    write = {"table": _table, "csv": _csv, "json": _json}[style]
    write(rows, sys.stdout)
    return rows.failed


def images_at(paths: Iterable[str]) -> Iterator[str]:
    """The files that paths mean: an image itself, all images below a folder, what a glob matches. In order, sorted within each.

    Raises:
        RequestError: for a path that means nothing.
    """
    for path in paths:
        if Path(path).is_dir():
            inside = sorted(
                str(p)
                for p in Path(path).rglob("*")
                if p.suffix.lower() in _IMAGES and not p.name.startswith(".")
            )
            if not inside:
                raise RequestError(f"{path}: no image below this folder; known endings: {', '.join(_IMAGES)}")
            yield from inside
        elif Path(path).exists():
            yield path
        else:
            matched = sorted(glob.glob(path, recursive=True))
            if not matched:
                raise RequestError(f"{path}: no such file or folder, and as a glob it matches nothing")
            yield from images_at(matched)


class _counting:  # noqa: N801 - used like a function
    """Passes predictions on and counts those that failed."""

    def __init__(self, predictions: Iterable[Prediction]) -> None:
        self._predictions = predictions
        self.failed = 0

    def __iter__(self) -> Iterator[Prediction]:
        for prediction in self._predictions:
            self.failed += bool(prediction.error)
            yield prediction


def _table(rows: Iterable[Prediction], out: TextIO) -> None:
    for row in rows:
        said = (
            f"error: {row.error}"
            if row.error
            else "  ".join(f"{shown(name)} {p:6.1%}" for name, p in row.top)
        )
        out.write(f"{shown(row.path)}  {said}\n")


def _csv(rows: Iterable[Prediction], out: TextIO) -> None:
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["path", "rank", "class", "probability", "error"])
    for row in rows:
        for rank, (name, p) in enumerate(row.top, 1):
            writer.writerow([row.path, rank, name, f"{p:.6f}", ""])
        if row.error:
            writer.writerow([row.path, "", "", "", row.error])


def _json(rows: Iterable[Prediction], out: TextIO) -> None:
    plain: list[dict[str, Any]] = [
        {"path": row.path, "error": row.error}
        if row.error
        else {"path": row.path, "top": [{"class": n, "probability": p} for n, p in row.top]}
        for row in rows
    ]
    json.dump(plain, out, indent=1, ensure_ascii=False)
    out.write("\n")
