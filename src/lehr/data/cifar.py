"""CIFAR-10's own files, python and binary, read without running anything that stands in them.

The python files are pickles. They are read as data (`lehr.plain_pickle`): numbers, texts, lists, dicts and
arrays of numbers, and nothing else; whatever other name a file calls for is refused.
Source of the formats: Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar.html
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lehr.data.arrays import Arrays, Pixels, items_of
from lehr.data.listing import Finding, shown
from lehr.errors import DataError
from lehr.plain_pickle import DamagedError, RefusedError, read_pickle
from lehr.untrusted import MIB, brief, read_bytes

_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_BATCHES = (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch")
_FOLDERS = ("cifar-10-batches-py", "cifar-10-batches-bin")
_PIXELS = 3 * 32 * 32
_LARGEST = 256 * MIB  # a batch has 30


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
            f"{shown(str(path))} holds {brief(sorted(batch))}; expected CIFAR-10's 'data' (an "
            "array) and 'labels' (a list)"
        )
    values = rows.values
    if values.dtype != np.uint8 or values.ndim != 2 or values.shape[1] != _PIXELS:
        raise DataError(
            f"{shown(str(path))}: 'data' is {values.dtype} {values.shape}; expected uint8 (n, {_PIXELS})"
        )
    return values, _checked_labels(labels, len(values), path)


def _checked_labels(labels: list[Any], count: int, path: Path) -> list[int]:
    if len(labels) != count or not all(type(label) is int and 0 <= label < 10 for label in labels):
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
        found = _unpickle(path).get("label_names")
        names = [_text(name) for name in found] if isinstance(found, list) else []
    if len(names) != 10 or len(set(names)) != 10:
        raise DataError(f"{shown(str(path))} names {len(names)} classes; expected CIFAR-10's ten")
    return tuple(names), ()


def _bytes(path: Path) -> bytes:
    try:
        return read_bytes(path, most=_LARGEST)
    except OSError as error:
        raise DataError(f"{shown(str(path))} cannot be read: {error.strerror}") from error


def _text(value: object) -> str:
    """A text that may be bytes; of anything else what kind of thing it is."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return value if isinstance(value, str) else f"a {type(value).__name__}"


def _unpickle(path: Path) -> dict[str, Any]:
    """The dict in a python batch file, its keys as text."""
    content = _bytes(path)
    try:
        found = read_pickle(io.BytesIO(content), _NAMED)
    except RefusedError as error:
        raise DataError(
            f"{shown(str(path))} is no CIFAR-10 file: {shown(str(error))}; nothing in it was run; do "
            "not trust it"
        ) from error
    except DamagedError as error:
        raise DataError(
            f"{shown(str(path))} is damaged ({shown(str(error)[:200])}); unpack the archive again"
        ) from error
    if not isinstance(found, dict):
        raise DataError(
            f"{shown(str(path))} holds a {type(found).__name__}; expected CIFAR-10's dict of 'data' "
            "and 'labels'"
        )
    return {_text(key): value for key, value in found.items()}


class _Dtype:
    """What stands for a `numpy.dtype`; knows the plain numbers only."""

    def __init__(self, code: str) -> None:
        self.code, self.order = code, "="

    def build(self, state: Any) -> None:
        """Take the order of bytes, the second of what numpy writes there."""
        order = _text(state[1])
        self.order = order if order in ("<", ">") else "="

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(f"{self.order}{self.code}")


class _Array:
    """What stands for a `numpy.ndarray`: made from its bytes, without numpy's own unpickling."""

    def __init__(self) -> None:
        self.values: npt.NDArray[Any] = np.empty(0)

    def build(self, state: Any) -> None:
        """Take shape, type and bytes."""
        _, shape, kind, fortran, content = state
        if not isinstance(kind, _Dtype) or not isinstance(content, bytes):
            raise RefusedError("an array that is not made of plain numbers")
        self.values = np.frombuffer(content, kind.dtype).reshape(shape, order="F" if fortran else "C")


def _dtype(code: object = "", *_: object) -> _Dtype:
    if _text(code) not in ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8"):
        raise RefusedError(f"an array of {brief(_text(code))}")
    return _Dtype(_text(code))


def _array(*_: object) -> _Array:
    return _Array()


def _encoded(text: str, encoding: object) -> bytes:
    """`codecs.encode`, with which a pickle of protocol 2 spells bytes; Latin-1 alone."""
    if _text(encoding) != "latin1":
        raise RefusedError(f"the codec {brief(_text(encoding))}")
    return text.encode("latin1")


_NAMED: dict[str, object] = {
    "numpy.ndarray": "numpy.ndarray",  # named, never called
    "numpy.dtype": _dtype,
    "numpy.core.multiarray._reconstruct": _array,
    "numpy._core.multiarray._reconstruct": _array,
    "_codecs.encode": _encoded,
}
