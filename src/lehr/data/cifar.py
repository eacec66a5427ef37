"""CIFAR-10's own files, python and binary, read without running anything that stands in them.

The python files are pickles. They are read by an unpickler that can make numbers, texts, lists, dicts and
arrays of numbers, and nothing else: whatever other name a file calls for is refused before it is looked up.
Source of the formats: Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar.html
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from lehr.data.arrays import Arrays, Pixels, items_of
from lehr.data.listing import Finding, shown
from lehr.errors import DataError

_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_BATCHES = (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch")
_FOLDERS = ("cifar-10-batches-py", "cifar-10-batches-bin")
_PIXELS = 3 * 32 * 32


def cifar_folder(folder: Path) -> Path | None:
    """The folder that holds CIFAR-10's files: `folder`, or the one inside it, or None."""
    for place in (folder, *(folder / name for name in _FOLDERS)):
        if any((place / f"{name}{suffix}").is_file() for name in _BATCHES for suffix in ("", ".bin")):
            return place
    return None


def load_cifar(folder: Path) -> Arrays:
    """CIFAR-10 from its six batch files, python or binary.

    Raises:
        DataError: for a batch that is missing, damaged, or calls for anything but arrays and plain values.
    """
    suffix = "" if (folder / "data_batch_1").is_file() or (folder / "test_batch").is_file() else ".bin"
    missing = [name + suffix for name in _BATCHES if not (folder / f"{name}{suffix}").is_file()]
    if missing:
        raise DataError(
            f"{shown(str(folder))}: CIFAR-10 without {', '.join(missing)}; unpack the whole archive again"
        )
    read = _read_binary if suffix else _read_pickled
    batches = [read(folder / f"{name}{suffix}") for name in _BATCHES]
    names, notes = _class_names(folder, binary=bool(suffix))
    train = np.concatenate([rows for rows, _ in batches[:-1]])
    train_labels = [label for _, labels in batches[:-1] for label in labels]
    valid, valid_labels = batches[-1]
    return Arrays(
        pixels={"train": _as_hwc(train), "test": _as_hwc(valid)},
        classes=names,
        train=items_of("train", train_labels),
        valid=items_of("test", valid_labels),
        findings=notes,
        split="CIFAR-10's own training and test batches",
    )


def _as_hwc(rows: npt.NDArray[np.uint8]) -> Pixels:
    """Rows of 3,072 bytes, channel by channel, as images."""
    return np.ascontiguousarray(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def _read_binary(path: Path) -> tuple[npt.NDArray[np.uint8], list[int]]:
    values = np.frombuffer(_bytes(path), np.uint8)
    if not len(values) or len(values) % (1 + _PIXELS):
        raise DataError(
            f"{shown(str(path))} has {len(values)} bytes; expected a multiple of {1 + _PIXELS} (one "
            "label, then the pixels)"
        )
    rows = values.reshape(-1, 1 + _PIXELS)
    return rows[:, 1:], _checked_labels(rows[:, 0].tolist(), len(rows), path)


def _read_pickled(path: Path) -> tuple[npt.NDArray[np.uint8], list[int]]:
    batch = _unpickle(path)
    rows, labels = batch.get("data"), batch.get("labels")
    if not isinstance(rows, _Array) or not isinstance(labels, list):
        raise DataError(
            f"{shown(str(path))} holds {sorted(map(str, batch))}; expected CIFAR-10's 'data' (an "
            "array) and 'labels' (a list)"
        )
    values = rows.values
    if values.dtype != np.uint8 or values.ndim != 2 or values.shape[1] != _PIXELS:
        raise DataError(
            f"{shown(str(path))}: 'data' is {values.dtype} {values.shape}; expected uint8 (n, {_PIXELS})"
        )
    return values, _checked_labels(labels, len(values), path)


def _checked_labels(labels: list[Any], count: int, path: Path) -> list[int]:
    if len(labels) != count or not all(isinstance(label, int) and 0 <= label < 10 for label in labels):
        raise DataError(
            f"{shown(str(path))}: {len(labels)} labels for {count} images; expected one from 0 to 9 for each"
        )
    return labels


def _class_names(folder: Path, *, binary: bool) -> tuple[tuple[str, ...], tuple[Finding, ...]]:
    """The names that stand in the meta file; CIFAR-10's well-known ones where there is none."""
    path = folder / ("batches.meta.txt" if binary else "batches.meta")
    if not path.is_file():
        return _NAMES, (
            Finding("", f"{path.name} is missing; the classes have CIFAR-10's usual names", fatal=False),
        )
    if binary:
        names = [
            line.strip() for line in _bytes(path).decode("utf-8", "replace").splitlines() if line.strip()
        ]
    else:
        names = [_text(name) for name in _unpickle(path).get("label_names") or []]
    if len(names) != 10 or len(set(names)) != 10:
        raise DataError(f"{shown(str(path))} names {len(names)} classes; expected CIFAR-10's ten")
    return tuple(names), ()


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{shown(str(path))} cannot be read: {error.strerror}") from error


def _text(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _unpickle(path: Path) -> dict[str, Any]:
    """The dict in a python batch file, its keys as text."""
    content = _bytes(path)
    try:
        found = _PlainUnpickler(io.BytesIO(content), encoding="bytes").load()
    except _RefusedError as error:
        raise DataError(
            f"{shown(str(path))} is no CIFAR-10 file: {shown(str(error))}; nothing in it was run; do "
            "not trust it"
        ) from error
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise DataError(
            f"{shown(str(path))} is damaged ({shown(str(error) or type(error).__name__)}); unpack "
            "the archive again"
        ) from error
    if not isinstance(found, dict):
        raise DataError(
            f"{shown(str(path))} holds a {type(found).__name__}; expected CIFAR-10's dict of 'data' "
            "and 'labels'"
        )
    return {_text(key): value for key, value in found.items()}


class _RefusedError(Exception):
    """A pickle called for something that no CIFAR-10 file needs."""


class _Dtype:
    """Stands in for `numpy.dtype`, and knows the plain numbers only."""

    def __init__(self, code: object, *_: object) -> None:
        if _text(code) not in ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8"):
            raise _RefusedError(f"an array of {code!r}")
        self.code, self.order = _text(code), "|"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = _text(state[1])

    @property
    def dtype(self) -> np.dtype[Any]:
        order = {"<": "<", ">": ">"}.get(self.order, "=")
        return np.dtype(f"{order}{self.code}")


class _Array:
    """Stands in for `numpy.ndarray`: makes an array from its bytes, without numpy's own unpickling."""

    def __init__(self, *_: object) -> None:
        self.values: npt.NDArray[Any] = np.empty(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, fortran, content = state
        if not isinstance(kind, _Dtype) or not isinstance(content, bytes):
            raise _RefusedError("an array that is not made of plain numbers")
        self.values = np.frombuffer(content, kind.dtype).reshape(shape, order="F" if fortran else "C")


class _Bytes:
    """Stands in for `codecs.encode`, with which a pickle of protocol 2 spells bytes; knows Latin-1 alone.

    A class, not a function: a pickle may set attributes on whatever it calls for, and `__setstate__` closes
    that way too.
    """

    def __new__(cls, text: str, encoding: object) -> bytes:  # type: ignore[misc]
        if _text(encoding) != "latin1":
            raise _RefusedError(f"the codec {encoding!r}")
        return text.encode("latin1")

    def __setstate__(self, state: object) -> None:
        raise _RefusedError("a change to what it is read with")


_STAND_INS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("_codecs", "encode"): _Bytes,
}


class _PlainUnpickler(pickle.Unpickler):
    """Looks up nothing: five names that arrays are spelled with have stand-ins, all others are refused."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _STAND_INS[module, name]
        except KeyError:
            raise _RefusedError(f"it calls for {module}.{name}") from None

    def persistent_load(self, pid: Any) -> NoReturn:
        raise _RefusedError(f"it calls for the object {pid!r}")
