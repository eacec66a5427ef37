"""Decoded images kept in memory, so that no epoch decodes a file twice. It must not know where images come from.

The check before training decodes every image once; what it has decoded is kept as 8-bit pixels, upright and in full size,
while it fits. A sample made of it has the same bits. Processes that load samples and are forked share the memory; ones that
are started anew decode for themselves.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, final

from PIL import Image

from lehr.byte_size import byte_size
from lehr.data.images import as_channels
from lehr.free_room import free_memory, size_text

Reader = Callable[[str, int], Image.Image]
SET_BY = "LEHR_DECODED"
"""The environment variable that says how much may be kept: "2 GiB", or "off"."""
SHARE = 1 / 8
"""Of the memory that is free, the share that decoded images may take."""


class _Pixels(NamedTuple):
    mode: str
    size: tuple[int, int]
    data: bytes  # a byte for each channel; Pillow's own memory has four for RGB


@final
class Decoded:
    """The pixels of images by path, up to `budget` bytes; what comes when it is full is not kept.

    May be filled by many threads. A copy for another process is empty and keeps nothing: so many processes would each
    keep it all.

    Example:
        >>> kept = Decoded(budget=100)
        >>> kept.keep("a.png", Image.new("RGB", (4, 4))), kept.keep("b.png", Image.new("RGB", (9, 9)))
        (True, False)
        >>> kept.get("a.png").size, kept.get("b.png")
        ((4, 4), None)
    """

    def __init__(self, budget: int) -> None:
        self.budget, self.used = budget, 0
        self._table: dict[str, _Pixels] = {}
        self._lock, self._owner = threading.Lock(), os.getpid()

    def keep(self, path: str, image: Image.Image) -> bool:
        """Keep an image of mode L or RGB, if there is room; whether it is kept."""
        size = image.width * image.height * len(image.getbands())
        if os.getpid() != self._owner or self.used + size > self.budget:
            return False
        pixels = _Pixels(image.mode, image.size, image.tobytes())
        with self._lock:
            if path in self._table:
                return True
            if self.used + size > self.budget:
                return False
            self._table[path] = pixels
            self.used += size
        return True

    def get(self, path: str) -> Image.Image | None:
        """A new image with the pixels that are kept under this path."""
        pixels = self._table.get(path)
        return None if pixels is None else Image.frombytes(*pixels)

    def __len__(self) -> int:
        return len(self._table)

    def clear(self) -> None:
        """Let go of all of it, and keep nothing from now on."""
        with self._lock:
            self._table.clear()
            self.budget = self.used = 0

    def __reduce__(self) -> tuple[type[Decoded], tuple[int]]:
        return Decoded, (0,)


@dataclass(frozen=True)
class KeptReader:
    """Reads what `read` reads, each file once: what `decoded` has is not read again."""

    read: Reader
    decoded: Decoded = field(compare=False, repr=False)

    def __call__(self, path: str, channels: int) -> Image.Image:
        """The image of that path, mode L for 1 channel, RGB for 3."""
        kept = self.decoded.get(path)
        if kept is not None:
            return as_channels(kept, channels)
        converted = f"{path}\0{channels}"  # where a run goes on, the check has not decoded anything
        again = self.decoded.get(converted)
        if again is not None:
            return again
        image = self.read(path, channels)
        self.decoded.keep(converted, image)
        return image

    @property
    def said(self) -> str:
        """What is kept, and how to turn that off, in a sentence; empty for nothing."""
        if not len(self.decoded):
            return ""
        return (
            f"decoded images: {len(self.decoded):,} are kept in memory ({size_text(self.decoded.used)}), so that no epoch "
            f"decodes them again; {SET_BY}=off in the environment turns that off"
        )


def decoded_budget(environ: Mapping[str, str] | None = None) -> int:
    """Bytes that decoded images may take: what the environment says, else an eighth of the memory that is free.

    Raises:
        RecipeError: for something else than an amount of memory, or "off".

    Example:
        >>> decoded_budget({"LEHR_DECODED": "2 MiB"}), decoded_budget({"LEHR_DECODED": "off"})
        (2097152, 0)
    """
    said = (os.environ if environ is None else environ).get(SET_BY, "").strip()
    if said.lower() in ("off", "0", "no"):
        return 0
    return byte_size(said, where=SET_BY) if said else int(SHARE * free_memory())
