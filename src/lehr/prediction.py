"""What `lehr predict` prints: a table, CSV or JSON of what is in images found by path, folder or glob."""

from __future__ import annotations

import csv
import glob
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TextIO

from lehr.data.listing import shown
from lehr.errors import RequestError
from lehr.run.reload import Prediction, load, predict

Style = Literal["table", "csv", "json"]
_IMAGES = (
    ".apng", ".avif", ".bmp", ".gif", ".j2c", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".jpx",
    ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp",
)  # fmt: skip
_WIDEST = 60  # columns for paths, beyond which one long path does not push the others' answers away


def predict_paths(
    run: str, paths: Sequence[str], *, top: int, style: Style | str, device: str = "cpu"
) -> int:
    """Predict every image that `paths` mean and print the rows to standard output.

    Args:
        run: a run directory.
        paths: images, folders or globs.
        top: classes for each image, the likeliest first.
        style: `"table"`, `"csv"` or `"json"`.
        device: where the model runs.

    Returns:
        The number of images that could not be read; each is a row with its error.

    Raises:
        RequestError: for a run that cannot be used, or paths that mean no image.
    """
    found = list(dict.fromkeys(images_at(paths)))
    loaded = load(run, device=device)
    rows = _counting(predict(loaded, found, top=top))
    if style == "table":
        widths = [max(map(len, map(shown, names)), default=0) for names in (found, loaded.classes)]
        _table(rows, sys.stdout, min(widths[0], _WIDEST), widths[1])
    else:
        {"csv": _csv, "json": _json}[style](rows, sys.stdout)
    return rows.failed


def images_at(paths: Iterable[str]) -> Iterator[str]:
    """The files that paths mean: an image itself, all images below a folder, what a glob matches.

    In the order given, sorted within each; hidden files and folders are passed over.

    Raises:
        RequestError: for a path that means nothing.
    """
    for path in map(os.path.expanduser, paths):
        if Path(path).is_dir():
            inside = sorted(str(p) for p in Path(path).rglob("*") if _is_image(p.relative_to(path)))
            if not inside:
                raise RequestError(f"{path}: no image below this folder; known endings: {', '.join(_IMAGES)}")
            yield from inside
        elif Path(path).exists():
            yield path
        else:
            matched = sorted(glob.glob(path, recursive=True))  # noqa: PTH207 - Path.glob takes no absolute one
            if not matched:
                raise RequestError(f"{path}: no such file or folder, and as a glob it matches nothing")
            yield from images_at(matched)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in _IMAGES and not any(part.startswith(".") for part in path.parts)


class _counting:  # noqa: N801 - used like a function
    """Passes predictions on and counts those that failed."""

    def __init__(self, predictions: Iterable[Prediction]) -> None:
        self._predictions = predictions
        self.failed = 0

    def __iter__(self) -> Iterator[Prediction]:
        for prediction in self._predictions:
            self.failed += bool(prediction.error)
            yield prediction


def _table(rows: Iterable[Prediction], out: TextIO, path_width: int, class_width: int) -> None:
    for row in rows:
        said = "   ".join(f"{shown(name):<{class_width}} {p:6.1%}" for name, p in row.top)
        out.write(f"{shown(row.path):<{path_width}}  {f'error: {shown(row.error)}' if row.error else said}\n")


def _csv(rows: Iterable[Prediction], out: TextIO) -> None:
    writer = csv.writer(out, lineterminator="\n")
    said: Callable[[str], str] = shown if out.isatty() else str  # a file has the names as they are
    writer.writerow(["path", "rank", "class", "probability", "error"])
    for row in rows:
        for rank, (name, p) in enumerate(row.top, 1):
            writer.writerow([said(row.path), rank, said(name), f"{p:.6f}", ""])
        if row.error:
            writer.writerow([said(row.path), "", "", "", said(row.error)])


def _json(rows: Iterable[Prediction], out: TextIO) -> None:
    plain: list[dict[str, Any]] = [
        {"path": row.path, "error": row.error}
        if row.error
        else {"path": row.path, "top": [{"class": n, "probability": p} for n, p in row.top]}
        for row in rows
    ]
    text = json.dumps(plain, indent=1, ensure_ascii=False)
    if not text.replace("\n", "").isprintable():  # the same JSON, in which nothing acts on a terminal
        text = "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)
    out.write(text + "\n")
