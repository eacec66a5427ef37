"""What `torch.save` wrote, read as data: tensors by name, and the tables and numbers around them.

Both forms: the zip archive, and the older row of pickles (before torch 1.6). A file can name tensors, storages
and tables and nothing else, and cannot claim more than it holds: torch's own reader, even with `weights_only`,
takes any size that stands in a file, and a few hundred bytes keep it busy for ever. This file must not know
what the tensors are for.
"""

from __future__ import annotations

import io
import math
import mmap
import struct
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import torch

from lehr.plain_pickle import DamagedError, RefusedError, read_pickle

_MAGIC = 0x1950A86A20F9469CFC6C
_LARGEST_PICKLE = 64 << 20
_KINDS: dict[str, torch.dtype] = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool, "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}  # fmt: skip
_DTYPES = ("uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")


@dataclass
class _Storage:
    """Numbers that a file holds; in the older form they come behind the pickle that names them."""

    kind: torch.dtype
    count: int
    numbers: torch.Tensor | None = None


@dataclass(frozen=True)
class _Said:
    """A tensor as a pickle says it: a view of a storage."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    kind: torch.dtype

    def tensor(self) -> torch.Tensor:
        """The tensor, or an error where it would reach beyond its storage."""
        numbers = self.storage.numbers
        if numbers is None:
            raise DamagedError("a tensor whose numbers are not in the file")
        flat = numbers if self.kind == numbers.dtype else numbers.view(torch.uint8).view(self.kind)
        last = sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True))
        if 0 not in self.size and self.offset + last >= len(flat):
            raise DamagedError(f"a tensor of {self.size} in a storage of {len(flat)} numbers")
        if math.prod(self.size) > len(flat):  # a broadcast view: few numbers said many times
            raise RefusedError(f"a tensor of {self.size} that repeats {len(flat)} numbers")
        return flat.as_strided(self.size, self.stride, self.offset)


@dataclass
class _Reading:
    """What is gathered while a pickle is read: storages by key."""

    fetch: Callable[[str, int], torch.Tensor] | None
    storages: dict[str, _Storage] = field(default_factory=dict)

    def load(self, said: object) -> _Storage:
        """The storage of a persistent id: `("storage", kind, key, location, count)`, in the older form with a
        view, too."""
        if not isinstance(said, tuple) or len(said) not in (5, 6) or said[0] not in ("storage", b"storage"):
            raise RefusedError("it names something that is no storage")
        kind, key, count = said[1], said[2], said[4]
        if isinstance(key, bytes):
            key = key.decode("ascii", "replace")
        if not isinstance(kind, torch.dtype) or not isinstance(key, str) or not _whole(count):
            raise DamagedError("a storage that is not said in the usual way")
        if len(said) == 6 and said[5] is not None:
            raise RefusedError("a storage that is a part of another, as torch wrote them before 0.4")
        if key not in self.storages:
            found = self.storages[key] = _Storage(kind, count)
            if self.fetch is not None:
                found.numbers = _numbers(self.fetch(key, count * kind.itemsize), kind)
        if (self.storages[key].kind, self.storages[key].count) != (kind, count):
            raise DamagedError(f"a storage {key[:40]} that is said in two ways")
        return self.storages[key]


def read_pth(file: BinaryIO) -> Any:
    """The value in a file of `torch.save`: tables, lists and numbers, and tensors on the CPU.

    Raises:
        RefusedError: where it holds or calls for anything else.
        DamagedError: where it is no such file, or not whole.
    """
    head = file.read(4)
    file.seek(0)
    return _read_zip(file) if head == b"PK\3\4" else _read_row(file)


def _read_zip(file: BinaryIO) -> Any:
    try:
        with zipfile.ZipFile(file) as archive:
            members = {info.filename: info for info in archive.infolist()}
            inside = [name for name in members if name.rpartition("/")[2] == "data.pkl"]
            if len(inside) != 1:
                raise DamagedError("a zip archive, but not one of torch.save: no data.pkl in it")
            folder = inside[0].removesuffix("data.pkl")
            if any(name.startswith((f"{folder}code/", f"{folder}constants.pkl")) for name in members):
                raise RefusedError("it is a TorchScript program")
            order = members.get(f"{folder}byteorder")
            if order is not None and _stored(archive, order, 16).strip() not in (b"little", b""):
                raise RefusedError("its numbers are big-endian")

            def fetch(key: str, size: int) -> torch.Tensor:
                info = members.get(f"{folder}data/{key}")
                if info is None or info.file_size != size:
                    raise DamagedError(f"the numbers of a storage are not in it, or not {size} bytes")
                return _bytes(_stored(archive, info, size))

            pickled = _stored(archive, members[inside[0]], _LARGEST_PICKLE)
            reading = _Reading(fetch)
            return _tensors(read_pickle(io.BytesIO(pickled), _NAMES, reading.load))
    except (RefusedError, DamagedError):
        raise
    except Exception as error:  # zipfile raises BadZipFile, RuntimeError, EOFError, struct.error and more
        raise DamagedError(str(error) or type(error).__name__) from error


def _stored(archive: zipfile.ZipFile, info: zipfile.ZipInfo, most: int) -> bytes:
    """A member's bytes. torch stores them as they are, so that what would grow on reading is no such file."""
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
        raise RefusedError("it is packed, and could grow without bound")
    if info.file_size > most:
        raise RefusedError("it has a part that is larger than it may be")
    return archive.read(info)


def _read_row(file: BinaryIO) -> Any:
    """The older form: magic, version, machine, the value, the storages' keys, and the storages."""
    try:
        whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError:
        raise DamagedError("an empty file") from None
    with whole:
        if read_pickle(whole, {}) != _MAGIC:
            raise DamagedError("it does not begin as such files do")
        read_pickle(whole, {})
        machine = read_pickle(whole, {})
        if isinstance(machine, dict) and machine.get("little_endian") is False:
            raise RefusedError("its numbers are big-endian")
        reading = _Reading(None)
        value = read_pickle(whole, _NAMES, reading.load)
        keys = read_pickle(whole, {})
        for key in keys if isinstance(keys, list) else ():
            storage = reading.storages.get(key.decode("ascii", "replace") if isinstance(key, bytes) else key)
            if storage is None or storage.numbers is not None:
                raise DamagedError("storages that no tensor has, or one twice")
            counted = whole.read(8)
            if len(counted) != 8 or struct.unpack("<q", counted)[0] != storage.count:
                raise DamagedError("a storage of another size than its tensors say")
            size = storage.count * storage.kind.itemsize
            if size > len(whole) - whole.tell():
                raise DamagedError("it ends in the middle of its numbers")
            storage.numbers = _numbers(_bytes(whole.read(size)), storage.kind)
        return _tensors(value)


def _bytes(content: bytes) -> torch.Tensor:
    if not content:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _numbers(content: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
    return content.view(kind) if len(content) else torch.empty(0, dtype=kind)


def _tensors(value: Any) -> Any:
    """`value` with its tensors made; in tables within tables only, which is where the weights are."""
    if isinstance(value, _Said):
        return value.tensor()
    if type(value) is not dict:
        return value
    # Not by recursion, and each table once: tables may lie within each other in any way.
    seen = {id(value)}
    waiting = [value]
    while waiting:
        table = waiting.pop()
        for key, inner in table.items():
            if isinstance(inner, _Said):
                table[key] = inner.tensor()
            elif type(inner) is dict and id(inner) not in seen:
                seen.add(id(inner))
                waiting.append(inner)
    return value


def _said(
    storage: object, offset: object, size: object, stride: object, kind: torch.dtype | None = None
) -> _Said:
    if (
        not isinstance(storage, _Storage)
        or not _whole(offset)
        or not isinstance(size, tuple)
        or not isinstance(stride, tuple)
        or len(size) != len(stride)
        or len(size) > 64
        or not all(map(_whole, (*size, *stride)))
    ):
        raise DamagedError("a tensor that is not said in the usual way")
    return _Said(storage, offset, size, stride, kind or storage.kind)  # type: ignore[arg-type]


def _whole(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _v2(storage: object, offset: object, size: object, stride: object, *_: object) -> _Said:
    return _said(storage, offset, size, stride)


def _v3(
    storage: object,
    offset: object,
    size: object,
    stride: object,
    _: object,
    __: object,
    kind: object,
    *___: object,
) -> _Said:
    if not isinstance(kind, torch.dtype):
        raise DamagedError("a tensor of no known type")
    return _said(storage, offset, size, stride, kind)


def _parameter(data: object, *_: object) -> object:
    return data


def _table(*pairs: object) -> dict[Any, Any]:
    """An OrderedDict, empty or of pairs; or a Counter, of a table."""
    if not pairs:
        return {}
    if len(pairs) == 1 and type(pairs[0]) is dict:
        return dict(pairs[0])
    if len(pairs) != 1 or type(pairs[0]) is not list:
        raise RefusedError("a table that is not made of pairs")
    if not all(isinstance(p, Sequence) and len(p) == 2 and type(p[0]) in (str, int) for p in pairs[0]):
        raise RefusedError("a table that is not made of pairs with texts as names")
    return dict(pairs[0])


_NAMES: dict[str, object] = {
    "collections.OrderedDict": _table,
    "collections.Counter": _table,
    "torch._utils._rebuild_tensor": _v2,
    "torch._utils._rebuild_tensor_v2": _v2,
    "torch._utils._rebuild_tensor_v3": _v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch.Size": lambda size=(): size,
    "torch.device": lambda *_: "cpu",
    "torch.storage.UntypedStorage": torch.uint8,
    "torch.UntypedStorage": torch.uint8,
    **{f"torch.{name}": kind for name, kind in _KINDS.items()},
    **{f"torch.{name}": getattr(torch, name) for name in _DTYPES if hasattr(torch, name)},
    **{f"torch.{str(kind).removeprefix('torch.')}": kind for kind in _KINDS.values()},
}
