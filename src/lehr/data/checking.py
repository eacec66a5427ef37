"""Every image of a folder is decoded once before training, so that no bad file stops a run half way.

Threads do it (decoders and hashes release the interpreter). This file turns files into findings and digests;
it must not know about classes or halves.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from PIL import Image

from lehr.data.images import UnreadableError, read_picture
from lehr.data.listing import DIGEST_BYTES, Finding

Progress = Callable[[int, int], object]
Keep = Callable[[str, Image.Image], object]
_CHUNK = 32  # files a task: enough to make a task's own cost vanish, few enough for a smooth progress bar
_BLOCK = 1 << 16  # bytes read at a time for a digest; much larger ones were slower: each is allocated anew


@dataclass(frozen=True)
class Checked:
    """One file after its check: (height, width), channels and digest where it is an image, else its problem.

    A file that was known already has its digest alone.
    """

    path: str
    size: tuple[int, int] | None = None
    channels: int = 0
    done: tuple[str, ...] = ()
    problem: Finding | None = None
    digest: str = ""


def check_files(
    root: Path,
    paths: Sequence[str],
    progress: Progress | None = None,
    *,
    known: Collection[str] = frozenset(),
    keep: Keep | None = None,
) -> list[Checked]:
    """One `Checked` for each of `paths` (posix, relative to `root`), in their order.

    Of the paths in `known`, which were decoded at another time, the bytes alone are read, for their digest.
    `keep(path, image)` is given what was decoded, from many threads.
    `progress(done, total)` is called from this thread now and then, and at the end.
    """
    chunks = [paths[start : start + _CHUNK] for start in range(0, len(paths), _CHUNK)]
    checked: list[Checked] = []
    # Set once around all threads: filters belong to the process, and threads that each set them would race.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        pool = ThreadPoolExecutor(
            max_workers=min(16, (os.cpu_count() or 1) + 2), thread_name_prefix="lehr-check"
        )
        try:
            for results in pool.map(
                lambda chunk: [_check(root, path, decoded=path in known, keep=keep) for path in chunk],
                chunks,
            ):
                checked += results
                if progress is not None:
                    progress(len(checked), len(paths))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return checked


def notes_on(checked: Iterable[Checked]) -> list[Finding]:
    """One note for each kind of thing that was done to images: how many files, and the first of them."""
    by_kind: dict[str, list[str]] = {}
    for file in checked:
        for kind in file.done:
            by_kind.setdefault(kind, []).append(file.path)
    return [note for kind, paths in sorted(by_kind.items()) for note in one_note(paths, kind)]


def one_note(paths: Sequence[str], why: str, *, units: tuple[str, str] = ("file", "files")) -> list[Finding]:
    """One note on many files: why, how many, and the first of them; none where there are none."""
    if not paths:
        return []
    what = f"{why} ({len(paths)} {units[len(paths) > 1]})"
    return [Finding(paths[0], what, fatal=False, detail="the first" if len(paths) > 1 else "")]


def _check(root: Path, path: str, *, decoded: bool, keep: Keep | None) -> Checked:
    try:
        if decoded:
            return Checked(path, digest=_digest_of_file(root / path))
        picture = read_picture(root / path)
        if keep is not None:
            keep(path, picture.image)
        width, height = picture.image.size
        channels = 1 if picture.image.mode == "L" else 3
        # A second pass over what the system still has in memory, in place of the whole file in ours.
        return Checked(path, (height, width), channels, picture.done, digest=_digest_of_file(root / path))
    except UnreadableError as error:
        return Checked(path, problem=Finding(path, error.what, fatal=error.image, detail=error.detail))
    except OSError as error:
        detail = error.strerror or str(error)
        return Checked(path, problem=Finding(path, "cannot be read", fatal=True, detail=detail))


def _digest_of_file(path: Path) -> str:
    """`digest_of` all that is in the file."""
    digest = blake2b(digest_size=DIGEST_BYTES)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
