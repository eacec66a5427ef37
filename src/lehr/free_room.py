"""How much room there is: memory and disk, in bytes. Pure of torch; it must not know what the room is for."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

_UNKNOWN = 2**31
"""Bytes that are taken to be free where the system does not say."""
_CONTAINER = Path("/sys/fs/cgroup")


def free_memory() -> int:
    """Bytes of memory that can be had without pushing anything out, in the container's limit where there is one.

    Linux says it itself (`MemAvailable`, proc_meminfo(5)); elsewhere free pages are counted, and where neither is known
    it is taken to be 2 GiB.

    Example:
        >>> free_memory() > 0
        True
    """
    found = [size for size in (_available(), _left_in_container()) if size is not None]
    return min(found) if found else _free_pages()


def free_disk(folder: str | Path) -> int:
    """Bytes that may still be written under `folder`, which is there."""
    return shutil.disk_usage(folder).free


def size_text(size: float) -> str:
    """Bytes as a person reads them, in binary units.

    >>> size_text(401408), size_text(18.4 * 2**30), size_text(12)
    ('392 KiB', '18.4 GiB', '12 bytes')
    """
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= factor:
            value = size / factor
            return f"{value:.3g} {unit}" if value < 1000 else f"{value:.0f} {unit}"
    return f"{size:.0f} bytes"


def _available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        said = next(line for line in lines if line.startswith("MemAvailable:"))
        return int(said.split()[1]) * 1024
    except (OSError, StopIteration, ValueError, IndexError):
        return None


def _left_in_container() -> int | None:
    """What a control group leaves (version 2); pages of files count as used there, though they can be given back."""
    try:
        limit = (_CONTAINER / "memory.max").read_text(encoding="ascii").strip()
        used = int((_CONTAINER / "memory.current").read_text(encoding="ascii"))
        given_back = next(
            int(line.split()[1])
            for line in (_CONTAINER / "memory.stat").read_text(encoding="ascii").splitlines()
            if line.startswith("inactive_file ")
        )
        return None if limit == "max" else max(0, int(limit) - used + given_back)
    except (OSError, StopIteration, ValueError, IndexError):
        return None


def _free_pages() -> int:
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return _UNKNOWN
