"""Arrays of images, and the `.npz` files that hold them -> uint8 pixels and class indices.

This file must not know about folders, transforms or torch.
"""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from lehr.data.images import as_channels
from lehr.data.listing import Finding, Item, shown
from lehr.errors import DataError, nearest
from lehr.untrusted import MIB, brief, open_file

Pixels = npt.NDArray[np.uint8]
_TRAIN_KEYS = (("x_train", "y_train"), ("train_images", "train_labels"), ("x", "y"), ("images", "labels"))
_VALID_KEYS = tuple(
    keys
    for name in ("val", "valid", "validation", "test")
    for keys in ((f"x_{name}", f"y_{name}"), (f"{name}_images", f"{name}_labels"))
)
_UNASKED = 1024 * MIB  # so much may be unpacked from a file of any size,
_MOST_TIMES = (
    100  # and so many times a file's size from a larger one; images of one colour alone shrink further
)
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
_ACCEPTED = (
    "x_train and y_train, with x_val and y_val or x_test and y_test where there is a validation half; "
    "or x and y"
)


@dataclass(frozen=True)
class ArrayReader:
    """Reads item `"NAME/ROW"` from uint8 arrays (images, height, width) or (images, height, width, 3)."""

    arrays: Mapping[str, Pixels]

    def __call__(self, path: str, channels: int) -> Image.Image:
        """The image of that name and row, mode L for 1 channel, RGB for 3."""
        name, _, row = path.rpartition("/")
        return as_channels(Image.fromarray(self.arrays[name][int(row)]), channels)


@dataclass(frozen=True)
class Arrays:
    """Images in memory and their labels; `valid` is None where there is no validation half yet."""

    pixels: dict[str, Pixels]
    classes: tuple[str, ...]
    train: tuple[Item, ...]
    valid: tuple[Item, ...] | None
    findings: tuple[Finding, ...] = ()
    split: str = ""


def items_of(name: str, labels: Sequence[int]) -> tuple[Item, ...]:
    """One item for each row of the array `name`."""
    return tuple(Item(f"{name}/{row}", int(label)) for row, label in enumerate(labels))


def load_npz(path: Path) -> Arrays:
    """The images and labels of a `.npz` file; nothing in it is unpickled.

    Raises:
        DataError: for a file that is no `.npz`, for missing keys, and for arrays that are not images or
            labels.
    """
    content = _read(path)
    where = shown(path.name)
    by_name = {name.casefold(): name for name in content}
    train_keys = next((keys for keys in _TRAIN_KEYS if keys[0] in by_name and keys[1] in by_name), None)
    if train_keys is None:
        close = "".join(
            nearest(name, [key for pair in _TRAIN_KEYS for key in pair], n=1) for name in list(by_name)[:1]
        )
        raise DataError(
            f"{where} holds {', '.join(map(shown, content)) or 'nothing'}; expected {_ACCEPTED}{close}"
        )
    valid_keys = next((keys for keys in _VALID_KEYS if keys[0] in by_name and keys[1] in by_name), None)
    pairs = [tuple(by_name[key] for key in keys) for keys in (train_keys, valid_keys) if keys]
    pixels, phrases = _as_pixels({images: content[images] for images, _ in pairs}, where)
    labels = [
        _as_labels(content[key], len(pixels[images]), f"{where}: {shown(key)}") for images, key in pairs
    ]
    named = content[by_name["classes"]] if "classes" in by_name else None
    classes, indices = _as_classes(labels, named, f"{where}: classes")
    used = {name for pair in pairs for name in pair} | {by_name.get("classes", "")}
    phrases += [f"the array {shown(name)} is not used" for name in sorted(set(content) - used)]
    halves = [items_of(images, values) for (images, _), values in zip(pairs, indices, strict=True)]
    return Arrays(
        pixels={shown_name: pixels[shown_name] for shown_name, _ in pairs},
        classes=classes,
        train=halves[0],
        valid=halves[1] if len(halves) > 1 else None,
        findings=tuple(Finding("", phrase, fatal=False) for phrase in phrases),
        split=f"the arrays {pairs[0][0]} and {pairs[1][0]}" if len(pairs) > 1 else "",
    )


def _read(path: Path) -> dict[str, npt.NDArray[Any]]:
    try:
        # Opened here: numpy leaves a damaged file open. Read here: numpy believes any size that a file claims.
        with open_file(path) as opened, zipfile.ZipFile(opened) as archive:
            members = [info for info in archive.infolist() if info.filename.endswith(".npy")]
            _refuse_growth(members, os.fstat(opened.fileno()).st_size)
            return {info.filename.removesuffix(".npy"): _member(archive, info) for info in members}
    except PermissionError as error:
        raise DataError(f"{shown(str(path))} cannot be read: permission denied") from error
    except ValueError as error:
        raise DataError(
            f"{shown(str(path))} cannot be read safely ({shown(str(error)[:200])}); Python objects are never "
            "unpickled: save images and labels as numbers, and class names as numpy.array(names, dtype=str)"
        ) from error
    except Exception as error:  # damage shows as BadZipFile, OSError, EOFError, zlib.error and more
        raise DataError(
            f"{shown(str(path))} is not a whole .npz file ({shown(str(error)[:200])}); write it with numpy.savez"
        ) from error


def _refuse_growth(members: Sequence[zipfile.ZipInfo], packed: int) -> None:
    """A small archive may claim to hold any size: what no images would shrink to is not unpacked."""
    size = sum(info.file_size for info in members)
    if size > max(_UNASKED, _MOST_TIMES * packed):
        raise zipfile.BadZipFile(
            f"its {packed:,} bytes would grow to {size:,}, which no images do: it may be a decompression bomb"
        )
    if any(info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for info in members):
        raise zipfile.BadZipFile("it is packed in another way than numpy.savez_compressed does")
    if len({info.filename for info in members}) != len(members):
        raise zipfile.BadZipFile("two arrays have the same name")


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> npt.NDArray[Any]:
    """One array, whose header must say the size that there is."""
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        read = _HEADERS.get(version)
        if read is None:
            raise zipfile.BadZipFile(f"an array in version {version} of numpy's format")
        shape, fortran, dtype = read(file)
        if dtype.hasobject:
            raise ValueError("an array of Python objects")
        size = math.prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or dtype.itemsize == 0 or size != info.file_size - file.tell():
            raise zipfile.BadZipFile(f"an array that says it is {shape} of {dtype}, and is not")
        content = bytearray(size)
        read_so_far = 0
        while read_so_far < size:  # in pieces, so that the content is there once
            piece = file.read(min(MIB, size - read_so_far))
            if not piece:
                raise EOFError("it ends too early")
            content[read_so_far : read_so_far + len(piece)] = piece
            read_so_far += len(piece)
        file.read(1)  # the end, where the checksum is compared
    return np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C")


def _as_pixels(images: Mapping[str, npt.NDArray[Any]], where: str) -> tuple[dict[str, Pixels], list[str]]:
    """Every array as uint8 in Pillow's layout, all by one scale, and notes on what that took."""
    laid_out = {name: _as_hwc(array, f"{where}: {shown(name)}") for name, array in images.items()}
    arrays = [array for array, _ in laid_out.values()]
    if len({array.shape[1:] for array in arrays}) > 1:
        shapes = " and ".join(f"{shown(name)} {array.shape}" for name, (array, _) in laid_out.items())
        raise DataError(
            f"{where}: images of different sizes in the two halves: {shapes}; expected one size and "
            "number of channels"
        )
    scale, phrase = _scale(arrays, where)
    phrases = [f"{name}: images read as {layout}" for name, (_, layout) in laid_out.items()] + [
        phrase
    ] * bool(phrase)
    if arrays[0].ndim == 4 and arrays[0].shape[-1] == 4:
        phrases.append("transparency, laid on white")
    pixels = {}
    for name, (array, _) in laid_out.items():
        # uint8 passes through without a copy; anything else goes to the nearest level.
        levels = (
            array if array.dtype == np.uint8 else np.rint(array.astype(np.float32) * scale).astype(np.uint8)
        )
        pixels[name] = np.ascontiguousarray(_on_white(levels))
    return pixels, phrases


def _as_hwc(array: npt.NDArray[Any], where: str) -> tuple[npt.NDArray[Any], str]:
    """Images as (n, h, w) or (n, h, w, c), with the layout that was understood."""
    shape, last = array.shape, array.ndim - 1
    if array.ndim not in (3, 4) or 0 in shape:
        raise DataError(
            f"{where} has the shape {shape}; expected images as (n, h, w), (n, h, w, c) or (n, c, h, "
            "w), at least one"
        )
    if array.ndim == 3:
        return array, "(n, h, w)"
    channels_last, channels_first = shape[last] in (1, 3, 4), shape[1] in (1, 3, 4)
    if channels_last == channels_first:
        why = "both ends could be channels" if channels_last else "no axis has 1, 3 or 4 channels"
        raise DataError(
            f"{where} has the shape {shape}, and {why}; expected (n, h, w, c) or (n, c, h, w) with "
            "1, 3 or 4 channels"
        )
    images = array if channels_last else array.transpose(0, 2, 3, 1)
    return (
        images[..., 0] if images.shape[-1] == 1 else images
    ), "(n, h, w, c)" if channels_last else "(n, c, h, w)"


def _scale(arrays: Sequence[npt.NDArray[Any]], where: str) -> tuple[float, str]:
    """The factor that takes the arrays' own range to 0 .. 255, and a note where it is not plain uint8."""
    odd = next((array.dtype for array in arrays if array.dtype.kind not in "uif"), None)
    dtype = odd or np.result_type(*(array.dtype.newbyteorder("=") for array in arrays))
    if dtype.kind not in "uif":
        raise DataError(
            f"{where}: images of type {shown(str(dtype)[:80])}; expected uint8 in 0..255, or floats in [0, 1] or [0, 255]"
        )
    low, high = (float(f([f(array) for array in arrays])) for f in (np.min, np.max))
    if dtype == np.uint8:
        return 1.0, ""
    if not (np.isfinite([low, high]).all() and low >= 0):
        raise DataError(
            f"{where}: images with values from {low:g} to {high:g}; expected uint8 in 0..255, or "
            "floats in [0, 1] or [0, 255]: "
            "save them before they are normalised, lehr normalises by itself"
        )
    if dtype.kind == "f" and high <= 1:
        return 255.0, f"{dtype} images in [0, 1], stored as 8 bits"
    if high <= 255:
        return 1.0, f"{dtype} images in [0, 255], stored as 8 bits"
    if dtype == np.uint16:
        return 1 / 257, "uint16 images, scaled to 8 bits"
    raise DataError(
        f"{where}: {dtype} images with values up to {high:g}; expected uint8 in 0..255, uint16, or "
        "floats in [0, 1] or [0, 255]"
    )


def _on_white(levels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    if levels.ndim != 4 or levels.shape[-1] != 4:
        return levels
    alpha = levels[..., 3:].astype(np.uint32)
    colour = levels[..., :3].astype(np.uint32)
    return ((colour * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def _as_labels(labels: npt.NDArray[Any], count: int, where: str) -> npt.NDArray[Any]:
    """Labels as one column of integers or texts, as many as there are images."""
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1:
        raise DataError(
            f"{where} has the shape {labels.shape}; expected one class index for each image (of "
            "one-hot rows, take argmax(1))"
        )
    if len(labels) != count:
        raise DataError(f"{where} has {len(labels)} labels for {count} images; expected one for each")
    labels = _decoded(labels, where)
    if labels.dtype.kind not in "iuU":
        raise DataError(
            f"{where} has the type {shown(str(labels.dtype)[:80])}; expected whole numbers or texts (for numbers, "
            ".astype(int))"
        )
    return labels


def _decoded(texts: npt.NDArray[Any], where: str) -> npt.NDArray[Any]:
    """Bytes as the text that they are; every text such as Python can hold."""
    try:
        if texts.dtype.kind == "S":
            return np.char.decode(texts, "utf-8")
        if texts.dtype.kind == "U":
            texts.tolist()
    except ValueError:
        raise DataError(
            f"{where} holds what is no text; expected UTF-8, as numpy.array(names) makes it"
        ) from None
    return texts


def _as_classes(
    labels: Sequence[npt.NDArray[Any]], named: npt.NDArray[Any] | None, where: str
) -> tuple[tuple[str, ...], list[list[int]]]:
    """Class names (the file's own, else the labels, sorted), and each half's labels as indices of them."""
    values = sorted(
        {value for half in labels for value in half.tolist()},
        key=lambda value: (isinstance(value, str), value),
    )
    if named is None:
        names = tuple(str(value) for value in values)
        index = {value: place for place, value in enumerate(values)}
    else:
        names = tuple(str(name) for name in np.ravel(_decoded(named, where)).tolist())
        index = (
            {name: i for i, name in enumerate(names)}
            if isinstance(values[0], str)
            else {i: i for i in range(len(names))}
        )
        unknown = [value for value in values if value not in index]
        if unknown or len(set(names)) != len(names):
            what = f"a label {brief(unknown[0])} has no name" if unknown else "a name comes twice"
            raise DataError(
                f"{where} has {len(names)} names, and {what}; expected one name for each label from 0 on"
            )
    return names, [[index[value] for value in half.tolist()] for half in labels]
