"""The store: what is put in comes out again, to the bit and in the same layout, wherever it lies."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lehr import free_room
from lehr.run.cache import store as cache
from lehr.run.cache.store import Column, Place, Store, merged, place_for

PLACES: tuple[Place, ...] = ("memory", "file")
LAYOUTS = (torch.contiguous_format, torch.channels_last)


def batch_of(
    size: int, *, seed: int = 0, layout: torch.memory_format = torch.contiguous_format
) -> list[torch.Tensor]:
    """Rows of several shapes and types."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(size, 3, 2, 5, generator=generator).to(memory_format=layout)
    return [
        maps,
        torch.randn(size, 4, generator=generator, dtype=torch.float64),
        torch.arange(size) + 7 * seed,
    ]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_come_back_to_the_bit_and_in_their_layout(place: Place, layout: torch.memory_format) -> None:
    """What was put in comes out: the same values, types and strides, in any order of the slots."""
    batch = batch_of(4, layout=layout)
    store = Store([Column.like(t) for t in batch], 9, place=place)
    slots = torch.tensor([8, 0, 5, 3])
    store.put(slots, batch)
    order = torch.tensor([2, 0, 3, 1, 1])
    found = store.get(slots[order])
    for one, was in zip(found, batch, strict=True):
        expected = was[order].to(memory_format=layout) if was.ndim == 4 else was[order]
        assert torch.equal(one, expected)
        assert (one.dtype, one.stride()) == (expected.dtype, expected.stride())
    assert store.has(torch.arange(10)).tolist() == [
        True,
        False,
        False,
        True,
        False,
        True,
        False,
        False,
        True,
        False,
    ]


@given(puts=st.lists(st.lists(st.integers(0, 11), min_size=1, max_size=5, unique=True), max_size=6))
@settings(max_examples=50)
def test_a_row_is_what_was_put_there_last(puts: list[list[int]]) -> None:
    """Filling slots in any order and again: each holds its last row, and those beyond the last slot hold none."""
    store, rows = Store([Column.like(torch.zeros(1, 2))], 8), {}
    for number, slots in enumerate(puts):
        values = torch.tensor([[float(number), float(slot)] for slot in slots])
        store.put(torch.tensor(slots), [values])
        rows |= {slot: [float(number), float(slot)] for slot in slots if slot < 8}
    assert store.has(torch.arange(12)).tolist() == [slot in rows for slot in range(12)]
    if rows:
        assert store.get(torch.tensor(list(rows)))[0].tolist() == list(rows.values())


def test_what_comes_out_is_a_copy() -> None:
    """A suffix that works in place on its features changes nothing that is kept."""
    store = Store([Column.like(torch.zeros(1, 2))], 2)
    store.put(torch.tensor([0]), [torch.ones(1, 2)])
    store.get(torch.tensor([0]))[0].mul_(5)
    assert store.get(torch.tensor([0]))[0].tolist() == [[1.0, 1.0]]


def test_a_narrow_type_rounds_once() -> None:
    """Stored as fp16, a value comes back in its own type, rounded; rounding it before changes nothing more."""
    values = torch.randn(3, 4)
    column = Column.like(values, torch.float16)
    store = Store([column, Column.like(torch.arange(3), torch.float16)], 3)
    store.put(torch.arange(3), [values, torch.arange(3)])
    floats, whole = store.get(torch.arange(3))
    assert torch.equal(floats, values.half().float())
    assert torch.equal(floats, column.rounded(values))
    assert torch.equal(whole, torch.arange(3))
    assert column.bytes == 8


def test_two_parts_of_a_batch_become_one() -> None:
    """Rows that were read and rows that were computed stand where their samples stand, in the common layout."""
    batch = batch_of(5, layout=torch.channels_last)
    columns = [Column.like(t) for t in batch]
    made = torch.tensor([False, True, True, False, True])
    whole = merged(columns, made, [t[made] for t in batch], [t[~made] for t in batch])
    for one, was in zip(whole, batch, strict=True):
        assert torch.equal(one, was)
    assert whole[0].is_contiguous(memory_format=torch.channels_last)


def test_a_file_leaves_nothing_behind(tmp_path: Path) -> None:
    """A cache in a file has no name: however the process ends, the folder is empty."""
    store = Store([Column.like(torch.zeros(1, 300))], 10, place="file", folder=tmp_path)
    store.put(torch.tensor([9]), [torch.ones(1, 300)])
    assert list(tmp_path.iterdir()) == []
    assert store.get(torch.tensor([9]))[0].sum() == 300


def test_a_disk_without_room_is_told_before_anything_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blocks of the file are asked for at once, and nothing is left of a file that got none."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(OSError, match="No space left"):
        Store([Column.like(torch.zeros(1, 8))], 4, place="file", folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("memory", "disk", "place"), [(1000, 0, "memory"), (100, 1000, "file"), (100, 100, "nowhere")]
)
def test_where_rows_lie_depends_on_the_room(
    memory: int, disk: int, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In memory when half of what is free holds them, else in a file when the disk does, else nowhere."""
    monkeypatch.setattr(cache, "free_memory", lambda: memory)
    monkeypatch.setattr(cache, "free_disk", lambda _: disk)
    assert place_for(400, torch.device("cpu")) == place


def test_the_container_s_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a control group has a limit, memory is what that leaves, with what it would give back."""
    for name, text in {
        "memory.max": "1000",
        "memory.current": "900",
        "memory.stat": "anon 5\ninactive_file 50\n",
    }.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(free_room, "_CONTAINER", tmp_path)
    assert free_room.free_memory() == 150
    (tmp_path / "memory.max").write_text("max")
    assert free_room.free_memory() > 1000
