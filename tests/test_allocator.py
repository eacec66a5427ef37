"""The allocator: told to keep blocks where that is possible, and left alone, with the reason, everywhere else."""

from __future__ import annotations

import mmap
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from lehr.run import allocator
from lehr.run.allocator import keep_blocks

IS_GLIBC = sys.platform.startswith("linux") and platform.libc_ver()[0] == "glibc"
PROGRAM = """
import ctypes, resource, sys
from lehr.run.allocator import keep_blocks
said = keep_blocks()
def fetched():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        block = ctypes.create_string_buffer(40 << 20)
        del block
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
fetched()
print(said.is_tuned, fetched())
"""


def in_a_process(**environ: str) -> tuple[bool, int]:
    """Whether the allocator of a new process was told, and the pages that 20 blocks of 40 MiB fetched anew then."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "LEHR_"))}
    clean |= {"PYTHONPATH": str(Path(allocator.__file__).parents[2]), **environ}
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=clean, capture_output=True, text=True, check=True
    )
    is_tuned, pages = found.stdout.split()
    return is_tuned == "True", int(pages)


@pytest.mark.skipif(not IS_GLIBC, reason="glibc on Linux alone has these parameters")
def test_blocks_that_were_freed_are_used_again() -> None:
    """Told so, a process fetches no new pages for blocks as large as those it has just freed; else it does, each time."""
    is_tuned, pages = in_a_process()
    as_it_is, fetched = in_a_process(LEHR_MALLOC="off")
    assert (is_tuned, as_it_is) == (True, False)
    of_a_block = (40 << 20) // os.sysconf("SC_PAGE_SIZE")
    assert pages < of_a_block < 10 * of_a_block < fetched


BEGINNING = """
import ctypes
from pathlib import Path
from lehr.run.allocator import Ceiling, give_back, keep_blocks, sparing
def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))
def used_and_freed(mib=200):
    block = ctypes.create_string_buffer(mib << 20)
    above = ctypes.create_string_buffer(1 << 20)
    del block
    return above
keep_blocks()
"""
GIVING = """
above = used_and_freed()
kept = resident()
give_back()
print(kept - resident())
"""
SPARING = """
with sparing():
    before = resident()
    above = used_and_freed()
    print(resident() - before)
before = resident()
above = used_and_freed()
print(resident() - before)
"""
CEILING = """
ceiling, start = Ceiling("cpu"), resident()
def above_start_after(mib, of, soon=False):
    above = used_and_freed(mib)
    if not soon:
        ceiling._not_before = 0.0  # as if so much time had gone by
    of()
    return resident() - start
print(above_start_after(300, ceiling.hold))
print(above_start_after(300, ceiling.allow))
print(above_start_after(300, ceiling.allow, soon=True))
print(above_start_after(200, ceiling.hold))
print(above_start_after(400, ceiling.hold))
ceiling = Ceiling("cuda")
print(above_start_after(400, ceiling.allow))
"""
glibc_alone = pytest.mark.skipif(
    not IS_GLIBC, reason="glibc on Linux alone keeps blocks, and tells what is resident"
)


def printed(program: str) -> list[int]:
    """The numbers (of KiB) that a new process prints, after the beginning."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "LEHR_"))}
    environ["PYTHONPATH"] = str(Path(allocator.__file__).parents[2])
    command = [sys.executable, "-c", BEGINNING + program]
    found = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
    return [int(line) for line in found.stdout.split()]


@glibc_alone
def test_what_lies_free_can_be_given_back() -> None:
    """A large block that was kept goes back to the system when asked, though another lies above it."""
    (given,) = printed(GIVING)
    assert given > 150 << 10


@glibc_alone
def test_blocks_are_not_kept_where_memory_is_to_be_spared() -> None:
    """What is freed in the context is gone at once; afterwards blocks are kept as before."""
    spared, kept = printed(SPARING)
    assert spared < 50 << 10 < 150 << 10 < kept


@glibc_alone
def test_memory_is_held_where_it_was() -> None:
    """Free memory is given back as it is counted, but not again at once; then it may be there again, and no more of it. None of this
    for a GPU.
    """
    uncounted, counted, soon, below, above, elsewhere = (kib >> 10 for kib in printed(CEILING))
    assert counted < 50
    assert above < 50
    assert min(uncounted, soon, below, elsewhere) > 150


@glibc_alone
def test_what_a_page_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The quickest filling of new memory less the quickest of memory that is there, for a page; a pause in one of them does not count."""
    ticks = iter([0, 5, 7, 10, 14, 24, 30, 36, 39])  # new memory takes 5, 4 and 6, and once more 2, 10 and 3
    monkeypatch.setattr(allocator.time, "perf_counter", lambda: next(ticks))
    monkeypatch.setattr(allocator, "_PROBED", 16 * mmap.PAGESIZE)
    assert allocator._fetching.__wrapped__() == (4 - 2) / 16


@pytest.mark.skipif(not IS_GLIBC, reason="elsewhere another reason comes first")
@pytest.mark.parametrize(
    ("device", "environ", "why"),
    [
        ("cpu", {"LEHR_MALLOC": "off"}, "LEHR_MALLOC=off"),
        ("cuda", {}, "the arithmetic happens on cuda"),
        ("cpu", {"MALLOC_ARENA_MAX": "2"}, "MALLOC_ARENA_MAX is set in the environment"),
        ("cpu", {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=1"}, "GLIBC_TUNABLES is set"),
        ("cpu", {"LD_PRELOAD": "/usr/lib/libjemalloc.so.2"}, "the allocator is jemalloc"),
    ],
)
def test_it_is_left_alone_where_a_person_has_chosen(device: str, environ: dict[str, str], why: str) -> None:
    """What was chosen by hand stays, and the sentence says what stood in the way."""
    found = keep_blocks(device, environ)
    assert not found.is_tuned
    assert why in found.said


@pytest.mark.parametrize(
    ("system", "library", "why"),
    [("darwin", ("", ""), "not Linux"), ("win32", ("", ""), "not Linux"), ("linux", ("", ""), "not glibc")],
)
def test_other_systems_are_left_alone(
    monkeypatch: pytest.MonkeyPatch, system: str, library: tuple[str, str], why: str
) -> None:
    """macOS, Windows and musl have other allocators: nothing is called there."""
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "libc_ver", lambda: library)
    found = keep_blocks("cpu", {})
    assert not found.is_tuned
    assert why in found.said
