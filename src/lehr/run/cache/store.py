"""Where what crosses the cut is kept: rows of tensors, one row for each sample and view, in memory or in a file.

It must not know models, losses, or where the rows come from.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from lehr.free_room import free_disk, free_memory
from lehr.run.batches import gathered, sent

Place = Literal["device", "memory", "pinned memory", "file", "nowhere"]
MEMORY_SHARE = 0.5
"""Of the memory that is free a cache takes at most this share, on a device too; what is larger goes to a file."""
_DISK_SHARE = 0.9
_ALIGNED = 64  # bytes; a column begins at a multiple


@dataclass(frozen=True)
class Column:
    """One tensor of each row: `shape` and `dtype` as it is handed in and out, without the batch.

    `order` is in which order its dimensions lie in memory, and `stored` the type in which they lie there.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    order: tuple[int, ...]
    stored: torch.dtype

    @classmethod
    def like(cls, batch: torch.Tensor, narrow: torch.dtype | None = None) -> Column:
        """The column that holds the rows of `batch`, floating point as `narrow`; its layout is kept.

        >>> Column.like(torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last)).order
        (1, 2, 0)
        """
        strides = batch.stride()[1:]
        order = tuple(sorted(range(len(strides)), key=lambda d: -strides[d]))
        narrows = narrow is not None and batch.is_floating_point() and narrow.itemsize < batch.dtype.itemsize
        return cls(tuple(batch.shape[1:]), batch.dtype, order, narrow if narrows and narrow else batch.dtype)

    @property
    def laid(self) -> tuple[int, ...]:
        """The shape as it lies in memory."""
        return tuple(self.shape[d] for d in self.order)

    @property
    def bytes(self) -> int:
        """Of one row."""
        return torch.Size(self.shape).numel() * self.stored.itemsize

    @property
    def narrow(self) -> bool:
        """Whether it is stored in a narrower type."""
        return self.stored != self.dtype

    def rounded(self, batch: torch.Tensor) -> torch.Tensor:
        """Rows as they will come back."""
        return batch.to(self.stored).to(self.dtype) if self.narrow else batch

    def packed(self, batch: torch.Tensor) -> torch.Tensor:
        """Rows as they are stored."""
        return self.laid_out(batch).to(self.stored)

    def unpacked(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows as they were handed in, in the same layout."""
        return self.in_order(rows.to(self.dtype))

    def laid_out(self, batch: torch.Tensor) -> torch.Tensor:
        """Rows with their dimensions in the order in which they lie in memory."""
        return batch.permute(0, *(d + 1 for d in self.order))

    def in_order(self, rows: torch.Tensor) -> torch.Tensor:
        """The inverse of `laid_out`."""
        back = sorted(range(len(self.order)), key=lambda d: self.order[d])
        return rows.permute(0, *(d + 1 for d in back))


def row_bytes(columns: Sequence[Column]) -> int:
    """The bytes of a row, with what it takes to align its columns on average left out."""
    return sum(column.bytes for column in columns)


def place_for(size: int, device: torch.device, folder: str | Path | None = None) -> Place:
    """Where `size` bytes can be kept: on the device, in memory, in a file under `folder`, or nowhere.

    >>> place_for(1000, torch.device("cpu")), place_for(2**60, torch.device("cpu"))
    ('memory', 'nowhere')
    """
    if device.type == "cuda" and size <= MEMORY_SHARE * torch.cuda.mem_get_info(device)[0]:
        return "device"
    if size <= MEMORY_SHARE * free_memory():
        return "pinned memory" if device.type == "cuda" else "memory"
    with suppress(OSError):
        if size <= _DISK_SHARE * free_disk(folder or tempfile.gettempdir()):
            return "file"
    return "nowhere"


class Store:
    """Rows for the slots 0 to `slots`, none of them filled at first.

    A file with a `name` stays in its folder; its rows are as they were left, and `trust` fills them.

    Raises:
        OSError: where there is no room for the file.

    Example:
        >>> store = Store([Column.like(torch.zeros(1, 2))], slots=4)
        >>> store.put(torch.tensor([2, 0]), [torch.tensor([[1.0, 2.0], [3.0, 4.0]])])
        >>> store.get(torch.tensor([0, 2]))[0].tolist(), store.has(torch.tensor([0, 1])).tolist()
        ([[3.0, 4.0], [1.0, 2.0]], [True, False])
    """

    def __init__(
        self,
        columns: Sequence[Column],
        slots: int,
        *,
        place: Place = "memory",
        device: torch.device | str = "cpu",
        folder: str | Path | None = None,
        name: str = "",
    ) -> None:
        self.columns, self.place = tuple(columns), place
        self.filled = torch.zeros(slots, dtype=torch.bool)
        self._device = torch.device(device)
        if place == "file":
            self._rows = _in_file(self.columns, slots, folder, name)
        else:
            where = self._device if place == "device" else torch.device("cpu")
            pin = place == "pinned memory"
            self._rows = [
                torch.empty((slots, *c.laid), dtype=c.stored, device=where, pin_memory=pin)
                for c in self.columns
            ]

    @property
    def slots(self) -> int:
        """The number of rows that there is room for."""
        return len(self.filled)

    @property
    def row_bytes(self) -> int:
        """Of a row."""
        return row_bytes(self.columns)

    @property
    def bytes(self) -> int:
        """Of all rows, filled or not."""
        return self.slots * self.row_bytes

    @property
    def full(self) -> bool:
        """Whether every slot is filled."""
        return bool(self.filled.all())

    def has(self, slots: torch.Tensor) -> torch.Tensor:
        """Which of the slots are filled; one beyond the last never is."""
        inside = slots < self.slots
        return inside & self.filled[slots.clamp(max=max(self.slots - 1, 0))] if self.slots else inside

    def put(self, slots: torch.Tensor, batch: Sequence[torch.Tensor]) -> None:
        """Fill slots with the rows of a batch; those beyond the last slot are left out."""
        kept = slots < self.slots
        where = slots[kept]
        for column, rows, tensor in zip(self.columns, self._rows, batch, strict=True):
            mine = tensor.detach() if bool(kept.all()) else tensor.detach()[kept.to(tensor.device)]
            rows[sent(where, rows.device)] = column.packed(mine).to(rows.device)
        self.filled[where] = True

    def get(self, slots: torch.Tensor) -> list[torch.Tensor]:
        """The rows of filled slots, as a batch on the device; a copy, which may be changed. A GPU is not waited for."""
        out: list[torch.Tensor] = []
        for column, rows in zip(self.columns, self._rows, strict=True):
            taken = gathered(rows, sent(slots, rows.device), pin=self._device.type == "cuda")
            out.append(column.unpacked(sent(taken, self._device)))
        return out

    def trust(self, slots: torch.Tensor) -> None:
        """Take what lies in these slots for their rows."""
        self.filled[slots] = True

    def row(self, slot: int) -> bytearray:
        """The row as it is stored, filled or not."""
        return bytearray().join(
            rows[slot].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for rows in self._rows
        )


def _in_file(
    columns: Sequence[Column], slots: int, folder: str | Path | None, kept: str = ""
) -> list[torch.Tensor]:
    """The columns, one behind the other, in a file; without a name nothing is left of it, however the process ends.

    Its blocks are asked for at once: a disk that fills up later would end the process with a bus error.
    """
    starts, size = [], 0
    for column in columns:
        starts.append(size)
        size += -(-column.bytes * slots // _ALIGNED) * _ALIGNED
    whole = _mapped(Path(folder or ".") / kept, size) if kept else _unnamed(folder, size)
    return [
        whole[start : start + column.bytes * slots].view(column.stored).view(slots, *column.laid)
        for start, column in zip(starts, columns, strict=True)
    ]


def _unnamed(folder: str | Path | None, size: int) -> torch.Tensor:
    number, name = tempfile.mkstemp(prefix="lehr-cache-", dir=folder)
    os.close(number)
    try:
        return _mapped(Path(name), size)
    finally:
        with suppress(OSError):  # Windows keeps a file that is mapped
            Path(name).unlink()


def _mapped(path: Path, size: int) -> torch.Tensor:
    """The bytes of a file, which is made, or made longer, where it is shorter."""
    with path.open("ab") as file:
        begins = file.tell()
        if begins < size:
            _allocate(file.fileno(), size, begins)
    return torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)


def _allocate(number: int, size: int, begins: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(number, 0, size)
        return
    block = bytes(2**20)
    for start in range(begins, size, len(block)):
        os.write(number, block[: size - start])


def merged(
    columns: Sequence[Column], made: torch.Tensor, new: Sequence[torch.Tensor], old: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """One batch of two: where `made` says so its rows are those of `new`, in order, else those of `old`.

    >>> column = Column.like(torch.zeros(1, 1))
    >>> merged([column], torch.tensor([True, False]), [torch.ones(1, 1)], [torch.zeros(1, 1)])
    [tensor([[1.],
            [0.]])]
    """
    order = torch.empty(len(made), dtype=torch.long)
    order[made], order[~made] = torch.arange(int(made.sum())), torch.arange(int(made.sum()), len(made))
    return [
        column.in_order(
            torch.cat([column.laid_out(n), column.laid_out(o)]).index_select(0, order.to(n.device))
        )
        for column, n, o in zip(columns, new, old, strict=True)
    ]
