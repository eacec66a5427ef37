"""One image file -> pixels, in the one way that checking, training and predicting share.

Whatever a file holds becomes an upright 8-bit grey or RGB image as a person would expect to see it. This file
must not know what classes, folders or transforms are. JPEGs are always decoded in full size (no `draft`), so
that an image has the same pixels whatever they are wanted for.
"""

from __future__ import annotations

import os
import struct
import warnings
from dataclasses import dataclass
from functools import lru_cache, partial
from os import PathLike
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from lehr.data.listing import shown
from lehr.errors import DataError
from lehr.untrusted import open_file

# By suffix, what a file is expected to hold. Left out: formats whose decoders start other programs (EPS) or
# take anything for theirs (TGA).
_FORMAT_OF = {
    **dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif"), "JPEG"),
    **dict.fromkeys((".png", ".apng"), "PNG"),
    **dict.fromkeys((".tif", ".tiff"), "TIFF"),
    **dict.fromkeys((".ppm", ".pgm", ".pbm", ".pnm"), "PPM"),
    **dict.fromkeys((".jp2", ".j2k", ".jpx", ".j2c"), "JPEG2000"),
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".gif": "GIF",
    ".avif": "AVIF",
}
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
_CAMERA_RAW = {".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".pef", ".raf", ".rw2", ".srw"}
_FOREIGN = {
    ".eps",
    ".exr",
    ".hdr",
    ".heic",
    ".heif",
    ".ico",
    ".jxl",
    ".pcx",
    ".psd",
    ".svg",
    ".tga",
} | _CAMERA_RAW

_TURNS = {  # the EXIF orientation tag -> what makes the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnreadableError(Exception):
    """Why a file gives no image: `what` is the same for all such files, `detail` is particular to one.

    `image` is False where nothing suggests that the file was meant to be an image. Never leaves this package.
    """

    def __init__(self, what: str, detail: str = "", *, image: bool = True) -> None:
        super().__init__(f"{what} ({detail})" if detail else what)
        self.what, self.detail, self.image = what, detail, image


@dataclass(frozen=True)
class Picture:
    """An upright image in mode L or RGB, and what was done to get there: nothing for plain grey and RGB."""

    image: Image.Image
    done: tuple[str, ...]


def read_image(path: str | PathLike[str], channels: int = 3) -> Image.Image:
    """The image in a file, upright, 8 bits a channel: mode L for 1 channel, RGB for 3.

    Transparency is laid on white, the first of several frames is taken, EXIF rotation is applied, 16-bit
    images are scaled.

    Raises:
        DataError: where the file cannot be read as an image, with its path and why.
    """
    try:
        return as_channels(read_picture(Path(path)).image, channels)
    except UnreadableError as error:
        raise DataError(f"{shown(str(path))}: {shown(str(error))}; mend or remove it") from error


def as_channels(image: Image.Image, channels: int) -> Image.Image:
    """`image` (mode L or RGB) with 1 or 3 channels; itself where it already has them."""
    mode = "L" if channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)


def read_picture(path: Path) -> Picture:
    """The image in a file and what was done to it; decodes everything, so that a truncated file is found.

    Raises:
        UnreadableError: where there is no image to be had.
    """
    try:
        return _read(path)
    except (
        Warning
    ):  # where warnings are errors: what Pillow warns about (odd metadata) is no reason to refuse
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _read(path)


def _read(path: Path) -> Picture:
    suffix = path.suffix.lower()
    if suffix in _CAMERA_RAW:  # several open as TIFF and would give their thumbnail
        raise UnreadableError(
            "a format that is not read", f"camera raw; convert it to one of {', '.join(FORMATS)}"
        )
    try:
        with open_file(path) as file:
            head = file.read(64)
            _sniff(head, suffix)
            _refuse_long(file, head)
            with Image.open(file, formats=_formats()) as image:
                _refuse_bomb(image.size)
                _refuse_bomb(_tile(image))
                image.load()
                return _picture(image, suffix)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadableError(_BOMB, str(error).split(",")[0]) from error
    except (UnreadableError, Warning):
        raise
    except MemoryError as error:
        raise UnreadableError("too large for the memory of this machine") from error
    except PermissionError as error:
        raise UnreadableError("cannot be read: permission denied") from error
    except FileNotFoundError as error:
        raise UnreadableError("no such file (or a link that leads nowhere)") from error
    except UnidentifiedImageError as error:  # before OSError, for it is one
        known = suffix in _FORMAT_OF or suffix in _FOREIGN
        raise UnreadableError(
            f"not an image of a known format ({', '.join(FORMATS)})", image=known
        ) from error
    except OSError as error:
        if error.errno is not None:  # the system's own, such as a loop of links; decoders give no number
            raise UnreadableError("cannot be read", error.strerror or str(error)) from error
        raise UnreadableError(_BROKEN, str(error)) from error
    except Exception as error:  # decoders raise SyntaxError, ValueError, struct.error, EOFError and more
        raise UnreadableError(_BROKEN, str(error) or type(error).__name__) from error


_BROKEN = "broken or truncated image"
_BOMB = "so many pixels that it may be a decompression bomb"
_LARGEST = 1 << 30  # bytes of a file: Pillow reads some kinds whole
_MOST_SCANS = 100
_TILE_WIDTH, _TILE_HEIGHT = 322, 323  # TIFF tags
_TIFF_SIZES = {
    1: 1,
    2: 1,
    3: 2,
    4: 4,
    5: 8,
    6: 1,
    7: 1,
    8: 2,
    9: 4,
    10: 8,
    11: 4,
    12: 8,
}  # bytes of each type


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    """The formats that this Pillow was built with, of those that lehr reads."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _sniff(head: bytes, suffix: str) -> None:
    """Says no, in better words than the decoder's, to an empty file, to text, and to HEIC."""
    known = suffix in _FORMAT_OF or suffix in _FOREIGN
    if not head:
        raise UnreadableError("an empty file (0 bytes)", image=known)
    if head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"mif1", b"hevc"):
        raise UnreadableError("a format that is not read", f"HEIC; convert it to one of {', '.join(FORMATS)}")
    netpbm = head[:1] == b"P" and head[1:2] in b"1234567yf"  # the one family of formats that may be text
    if not netpbm and all(byte in _TEXT for byte in head):
        raise UnreadableError("not an image: its content is text", image=known)


_TEXT = frozenset({9, 10, 12, 13, *range(32, 127)})


def _refuse_bomb(size: tuple[int, int]) -> None:
    """Pillow only warns up to twice its limit, and whether a warning stops anything is for others to say."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and size[0] * size[1] > limit:
        raise UnreadableError(_BOMB, f"{size[0]} x {size[1]} pixels; the limit is {limit}")


def _tile(image: Image.Image) -> tuple[int, int]:
    """The size of the pieces that a TIFF is stored in, of which one is held in memory, however small the image."""
    tags = image.tag_v2 if isinstance(image, TiffImageFile) else {}
    width, height = tags.get(_TILE_WIDTH, 0), tags.get(_TILE_HEIGHT, 0)
    return (width, height) if isinstance(width, int) and isinstance(height, int) else (0, 0)


def _refuse_long(file: BinaryIO, head: bytes) -> None:
    """Says no to files that a decoder would read for hours, or that would fill the memory: it sees only one
    piece of them at a time. The file stands at its beginning then.
    """
    size = os.fstat(file.fileno()).st_size
    if size > _LARGEST:
        raise UnreadableError("a file too large for an image", f"{size:,} bytes; the limit is {_LARGEST:,}")
    if head[:2] == b"\xff\xd8":
        file.seek(0)
        # A scan is a pass over the whole image; a progressive JPEG has about ten, and each may be a few bytes.
        # Within a scan the two bytes cannot stand for anything else.
        scans = sum(block.count(b"\xff\xda") for block in iter(partial(file.read, 1 << 20), b""))
        if scans > _MOST_SCANS:
            raise UnreadableError(_BOMB, f"a JPEG in {scans} scans; the limit is {_MOST_SCANS}")
    elif head[:4] in (b"II*\0", b"MM\0*"):
        _refuse_overlapping(file, ">" if head[:1] == b"M" else "<", size)
    elif head[:4] in (b"II+\0", b"MM\0+"):
        raise UnreadableError("a format that is not read", "BigTIFF; save it as TIFF or PNG")
    file.seek(0)


def _refuse_overlapping(file: BinaryIO, order: str, size: int) -> None:
    """The tags of a TIFF may each say that the whole file is theirs, and Pillow keeps a copy for each."""
    file.seek(4)
    (start,) = struct.unpack(f"{order}I", file.read(4))
    file.seek(start)
    (count,) = struct.unpack(f"{order}H", file.read(2))
    claimed = 0
    for _ in range(count):
        entry = file.read(12)
        if len(entry) < 12:
            break
        _, kind, many = struct.unpack_from(f"{order}HHI", entry)
        claimed += _TIFF_SIZES.get(kind, 0) * many
    if claimed > max(size, 1 << 20):
        raise UnreadableError(_BOMB, f"TIFF tags of {claimed:,} bytes in a file of {size:,}")


def _picture(image: Image.Image, suffix: str) -> Picture:
    """A loaded image as a `Picture`."""
    done = []
    name = (
        "JPEG" if image.format == "MPO" else image.format or "?"
    )  # MPO: a JPEG with more pictures behind the first
    if _FORMAT_OF.get(suffix) != name:
        done.append(f"{name} image named {suffix or 'without a suffix'}, used")
    if image.format != "MPO" and getattr(image, "is_animated", False):
        image.seek(0)
        image.load()
        done.append("several frames, the first used")
    turn = _TURNS.get(_orientation(image.info.get("exif")))
    flat, conversion = _flatten(image)
    if conversion:
        done.append(conversion)
    if turn is not None:
        flat = flat.transpose(turn)
        done.append("EXIF rotation, applied")
    return Picture(flat, tuple(done))


def _flatten(image: Image.Image) -> tuple[Image.Image, str]:
    """`image` in mode L or RGB, and a phrase for what that took (`""` for plain grey and RGB)."""
    mode = image.mode
    if mode.startswith("I;16"):
        return _from_16_bit(np.asarray(image)), "16-bit, scaled to 8 bits"
    if mode in ("I", "F"):
        return _from_numbers(np.asarray(image), image.format)
    if _has_transparency(image):
        layer = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        flat = Image.alpha_composite(white, layer).convert("RGB")
        return (flat.convert("L") if mode in ("L", "LA", "La", "1") else flat), "transparency, laid on white"
    if mode in ("L", "RGB"):
        return image.copy(), ""
    if mode == "1":
        return image.convert("L"), ""
    phrase = "palette, converted to RGB" if mode == "P" else f"{mode}, converted to RGB"
    return image.convert("RGB"), phrase


def _has_transparency(image: Image.Image) -> bool:
    palette = image.palette.mode if image.mode == "P" and image.palette else ""
    return (
        image.mode in ("RGBA", "LA", "PA", "La", "RGBa")
        or "transparency" in image.info
        or palette.endswith("A")
    )


def _from_16_bit(values: npt.NDArray[np.generic]) -> Image.Image:
    """0 .. 65535 -> 0 .. 255, to the nearest; the same scale for every image, so that dark ones stay dark."""
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))


def _from_numbers(values: npt.NDArray[np.generic], form: str | None) -> tuple[Image.Image, str]:
    """Numbers of unknown range -> 8 bits: by the range that they seem to have, else stretched."""
    if not np.isfinite(values).all():
        raise UnreadableError("an image with values that are not finite numbers")
    numbers = values.astype(np.float64)
    low, high = float(numbers.min()), float(numbers.max())
    if values.dtype.kind == "i" and (form in ("PNG", "PPM") or (low >= 0 and high <= 65535)):
        return _from_16_bit(values), "16-bit, scaled to 8 bits"
    kind = "32-bit integers" if values.dtype.kind == "i" else "floating point"
    if values.dtype.kind == "f" and low >= 0 and high <= 255:
        scale, what = (255.0, "[0, 1]") if high <= 1 else (1.0, "[0, 255]")
        return Image.fromarray(
            np.rint(numbers * scale).astype(np.uint8)
        ), f"{kind} in {what}, scaled to 8 bits"
    stretched = (numbers - low) * (255.0 / max(high - low, 1e-30))
    return Image.fromarray(
        np.rint(stretched).astype(np.uint8)
    ), f"{kind}, lowest to highest value stretched to 8 bits"


def _orientation(exif: object) -> int:
    """The orientation tag of an EXIF block, 1 (upright) where there is none or the block is damaged.

    Pillow's reader warns about damaged blocks, and a warning cannot be silenced safely while many threads
    read.
    """
    if not isinstance(exif, bytes):
        return 1
    block = exif[6:] if exif.startswith(b"Exif\0\0") else exif
    order = {b"II": "<", b"MM": ">"}.get(block[:2])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(f"{order}I", block, 4)
        (count,) = struct.unpack_from(f"{order}H", block, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, _, _, value = struct.unpack_from(f"{order}HHIH", block, entry)
            if tag == 0x0112:
                return int(value)
    except struct.error:
        return 1
    return 1
