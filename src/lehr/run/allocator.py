"""The C allocator told to keep large blocks, so that each step does not ask the system for the same memory again.

glibc gives every block above a threshold a mapping of its own, and gives it back when it is freed: each activation of each
step is then fetched, zeroed by the kernel and mapped page by page. Two parameters of mallopt(3) stop that. It concerns a
process, not a run; it must not know models.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

TURNED_OFF_BY = "LEHR_MALLOC"
"""The environment variable that turns this off, as `LEHR_MALLOC=off`."""
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # M_TRIM_THRESHOLD and so on: malloc.h
_NEVER = 2**31 - 1  # bytes that may lie free at the top of the heap: a C int
_PROBED = 2 << 20
"""Bytes by which it is measured what a page costs that is fetched again (1.4 us in one virtual machine; by 200 MiB of
the heap, 1.2 there and 2.6 to 3.3 in another)."""
_SHARE = 0.05
"""Of the time, what may go into giving pages back and fetching them again."""
_NOTHING = (1 << 20) // mmap.PAGESIZE
"""Pages more that are not worth giving anything back."""
_KEEPING = {_MMAP_MAX: 0, _TRIM_THRESHOLD: _NEVER}
_SPARING = {_MMAP_MAX: 1 << 16, _MMAP_THRESHOLD: 1 << 17, _TRIM_THRESHOLD: 1 << 17}  # glibc's first settings
_OTHERS = ("jemalloc", "tcmalloc", "mimalloc", "hoard", "scalloc")
_DONE = (
    "memory: the C allocator (glibc) keeps blocks that are freed for the next step, in place of giving them back to the "
    f"system each time; {TURNED_OFF_BY}=off in the environment turns that off"
)


_TUNED: list[str] = []  # what this process has told


@dataclass(frozen=True)
class Tuning:
    """What came of it: whether the allocator `is_tuned` now, and a sentence that says so, or why not."""

    is_tuned: bool
    said: str


def keep_blocks(device: str = "cpu", environ: Mapping[str, str] | None = None) -> Tuning:
    """Tell glibc's allocator to keep what is freed, for this process from now on.

    Blocks of any size come from the heap (no mapping of their own), and the heap's free top is not given back. Memory that
    was in use at once stays with the process, with what lies free between, until `give_back`. May be called again.

    Args:
        device: where the arithmetic happens; only on `"cpu"` do activations come from this allocator.
        environ: the environment that is asked; by default the process's own.

    Example:
        >>> keep_blocks("cuda").is_tuned
        False
    """
    if why := _why_not(device, os.environ if environ is None else environ):
        return Tuning(False, f"memory: the C allocator is left as it is: {why}")
    try:
        done = _set(_KEEPING)
    except (OSError, AttributeError) as error:
        return Tuning(False, f"memory: the C allocator is left as it is: it has no mallopt ({error})")
    if not done:
        return Tuning(False, "memory: the C allocator is left as it is: it refused")
    _TUNED.append("glibc")
    return Tuning(True, _DONE)


def give_back() -> None:
    """Give memory that lies free back to the system, where the allocator was told to keep it: after what was large and is gone."""
    if _TUNED:
        ctypes.CDLL(None).malloc_trim(0)


class Ceiling:
    """Resident memory held near where it has been: what lies free is given back in steps that count (`allow`), and in others
    where there is more than in those (`hold`). For blocks are seldom found again in the holes that they have left (glibc below 2.38).

    Pages that were given back are fetched again. No more than some 5 % of the time goes into both: where steps are short, memory is
    given back once in several. Does nothing but for work on a CPU whose allocator was told to keep blocks.
    """

    def __init__(self, device: str) -> None:
        self._is_of_use = bool(device == "cpu" and _TUNED)
        self._fetching = _fetching() if self._is_of_use else 0.0
        self._highest = 0
        self._not_before = 0.0

    def allow(self) -> None:
        """Give back what lies free; what there is now may be there again."""
        if self._is_of_use and time.monotonic() >= self._not_before:
            now = _resident()
            self._highest = max(self._highest, now)
            self._give_back(now)

    def hold(self) -> None:
        """Give back what lies free if there is more than there was."""
        if self._highest and time.monotonic() >= self._not_before:
            now = _resident()
            if now > self._highest + _NOTHING:
                self._give_back(now)

    def _give_back(self, now: int) -> None:
        began = time.monotonic()
        give_back()
        ended = time.monotonic()
        self._not_before = ended + (ended - began + (now - _resident()) * self._fetching) / _SHARE


@cache
def _fetching() -> float:
    """Seconds to fetch a page from the system: what filling new memory takes longer than filling it again, of three times the least."""
    new, again = [], []
    for _ in range(3):
        memory = mmap.mmap(-1, _PROBED, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        block = (ctypes.c_char * _PROBED).from_buffer(memory)
        began = time.perf_counter()
        ctypes.memset(block, 1, _PROBED)
        filled = time.perf_counter()
        ctypes.memset(block, 2, _PROBED)
        new.append(filled - began)
        again.append(time.perf_counter() - filled)
    return max(0.0, min(new) - min(again)) * mmap.PAGESIZE / _PROBED


def _resident() -> int:
    """Pages of this process that are in memory; 0 where that is not told."""
    try:
        file = os.open("/proc/self/statm", os.O_RDONLY)  # half the time of a file object, at each step
    except OSError:
        return 0
    try:
        return int(os.read(file, 100).split()[1])
    finally:
        os.close(file)


@contextmanager
def sparing() -> Iterator[None]:
    """In this context large blocks go back to the system when they are freed, also where the allocator was told to keep them:
    for what is done once, and must not leave more than it needs.
    """
    if not _TUNED:
        yield
        return
    give_back()
    _set(_SPARING)
    try:
        yield
    finally:
        _set(_KEEPING)
        give_back()


def _set(options: Mapping[int, int]) -> bool:
    """Whether glibc has taken them all."""
    mallopt = ctypes.CDLL(None).mallopt
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    taken = [mallopt(option, value) for option, value in options.items()]
    return all(taken)


def _why_not(device: str, environ: Mapping[str, str]) -> str:
    """Why the allocator is not touched; empty where it may be."""
    if environ.get(TURNED_OFF_BY, "").lower() in ("off", "0", "no", "false"):
        return f"{TURNED_OFF_BY}={environ[TURNED_OFF_BY]}"
    if device != "cpu":
        return f"the arithmetic happens on {device}"
    if not sys.platform.startswith("linux"):
        return "this is not Linux"
    if platform.libc_ver()[0] != "glibc":
        return "the C library is not glibc"
    own = sorted(name for name in environ if name.startswith("MALLOC_"))
    if "glibc.malloc" in environ.get("GLIBC_TUNABLES", ""):
        own.append("GLIBC_TUNABLES")
    if own:
        return f"{own[0]} is set in the environment"
    if other := _other_allocator(environ):
        return f"the allocator is {other}"
    return ""


def _other_allocator(environ: Mapping[str, str]) -> str:
    """Another allocator in place of glibc's: asked for by LD_PRELOAD, or mapped into this process."""
    preloaded = environ.get("LD_PRELOAD", "")
    try:
        mapped = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        mapped = ""
    libraries = {Path(line.split()[-1]).name for line in mapped.splitlines() if ".so" in line}
    for name in _OTHERS:
        if name in preloaded or any(library.startswith(f"lib{name}") for library in libraries):
            return name
    return ""
