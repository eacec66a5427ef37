"""Rows that outlive a run are taken over only where everything that made them is the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lehr.errors import RequestError
from lehr.run.cache.kept import Kept, digests_of, key_of
from lehr.run.cache.store import Column

ROWS = torch.arange(12.0).reshape(4, 3)
INPUTS = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
SLOTS = torch.tensor([3, 0, 1, 5])


def written(folder: Path) -> None:
    """Leave the rows of four samples in `folder`."""
    kept = Kept(folder, "key", [Column.like(ROWS)], 6)
    kept.store.put(SLOTS, [ROWS])
    kept.keep(SLOTS, digests_of([INPUTS]))
    kept.close()


def test_the_next_run_finds_the_rows(tmp_path: Path) -> None:
    """Rows of the same inputs are there again, to the bit."""
    written(tmp_path)
    kept = Kept(tmp_path, "key", [Column.like(ROWS)], 6)
    assert not kept.store.has(SLOTS).any()
    assert kept.take(SLOTS, digests_of([INPUTS]))
    assert torch.equal(kept.store.get(SLOTS)[0], ROWS)
    kept.close()


def test_one_changed_input_is_a_miss(tmp_path: Path) -> None:
    """Where one bit of one sample's input has changed, its batch is computed anew; others are not concerned."""
    written(tmp_path)
    changed = INPUTS.clone()
    changed[2, 1] = torch.nextafter(changed[2, 1], torch.tensor(9.0))
    kept = Kept(tmp_path, "key", [Column.like(ROWS)], 6)
    assert not kept.take(SLOTS, digests_of([changed]))
    assert kept.take(SLOTS[:2], digests_of([changed[:2]]))
    assert not kept.take(torch.tensor([2]), digests_of([INPUTS[:1]])), "a slot that was never filled"
    assert not kept.take(torch.tensor([7]), digests_of([INPUTS[:1]])), "a slot beyond the last"
    kept.close()


def test_a_damaged_row_is_a_miss(tmp_path: Path) -> None:
    """A row whose bits have changed on the disk is not taken."""
    written(tmp_path)
    file = next(tmp_path.rglob("rows"))
    data = bytearray(file.read_bytes())
    data[3 * 12] ^= 1  # in the row of slot 3
    file.write_bytes(bytes(data))
    kept = Kept(tmp_path, "key", [Column.like(ROWS)], 6)
    assert not kept.take(SLOTS[:1], digests_of([INPUTS[:1]]))
    assert kept.take(SLOTS[1:], digests_of([INPUTS[1:]]))
    kept.close()


def test_one_run_at_a_time(tmp_path: Path) -> None:
    """Two runs do not write the same rows; after the first has ended the second may."""
    kept = Kept(tmp_path, "key", [Column.like(ROWS)], 6)
    with pytest.raises(RequestError, match="this process"):
        Kept(tmp_path, "key", [Column.like(ROWS)], 6)
    kept.close()
    Kept(tmp_path, "key", [Column.like(ROWS)], 6).close()


def test_what_decides_a_row_is_in_the_key() -> None:
    """Other weights, another type or shape, another cut or version: each makes another key."""
    weights = [torch.ones(3, 2)]
    keys = {
        key_of({"after": "a"}, weights),
        key_of({"after": "b"}, weights),
        key_of({"after": "a", "torch": "2"}, weights),
        key_of({"after": "a"}, [torch.ones(3, 2, dtype=torch.float64)]),
        key_of({"after": "a"}, [torch.ones(2, 3)]),
        key_of({"after": "a"}, [torch.tensor([[1, 1], [1, 1], [1, 1 + 2**-23]])]),
        key_of({"after": "a"}, [*weights, torch.tensor(1)]),
    }
    assert len(keys) == 7
    assert key_of({"after": "a"}, weights) in keys


def test_a_folder_that_cannot_be_is_told(tmp_path: Path) -> None:
    """A `cache_dir` that is a file is refused in words."""
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match=r"cache_dir: .*file cannot be written"):
        Kept(tmp_path / "file", "key", [Column.like(ROWS)], 6)
