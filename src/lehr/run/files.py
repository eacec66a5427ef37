"""Files that are there whole or not at all: written aside, flushed to the device, renamed into place.

A process that is killed at any byte leaves what was there before, and at most a `.NAME.part` beside it. This
file must not know what is written.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

ASIDE = ".part"
_BLOCK = 1 << 20
_SYSTEM = re.compile(r"\(os error (\d+)\)")


def write_text(path: Path, text: str) -> None:
    """Write `text` in UTF-8.

    Raises:
        OSError: where it cannot be written; what was at `path` before is unharmed.
    """
    _into_place(path, lambda aside: _write_bytes(aside, text.encode()))


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors as safetensors; each must own its memory.

    Raises:
        OSError: where it cannot be written; what was at `path` before is unharmed.
    """

    def write(aside: Path) -> None:
        try:
            save_file({name: t.contiguous() for name, t in tensors.items()}, aside, metadata={"format": "pt"})
        except SafetensorError as error:  # a full disk comes as one of these
            raise _of_system(error) from None
        except KeyError as dtype:
            raise OSError(None, f"a safetensors file cannot hold {dtype.args[0]}") from None
        aside.chmod(0o644)  # safetensors makes files that only their owner can read

    _into_place(path, write)


def link(there: Path, path: Path) -> None:
    """Make `path` another name of the file `there`, or a copy of it where the file system has no such names.

    Raises:
        OSError: where it cannot be made; what was at `path` before is unharmed.
    """
    if path.exists() and path.samefile(there):
        return

    def write(aside: Path) -> None:
        aside.unlink(missing_ok=True)
        try:
            aside.hardlink_to(there)
        except OSError:
            _write_bytes(aside, there.read_bytes())

    _into_place(path, write)


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the device."""
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _into_place(path: Path, write: Callable[[Path], None]) -> None:
    """Write beside `path`, flush, rename, flush the name."""
    aside = path.with_name(f".{path.name}{ASIDE}")
    try:
        write(aside)
        flush(aside)
        os.replace(aside, path)  # noqa: PTH105 - the tests stop a run at this very call
    except BaseException as error:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # a full disk does not say of which file
            error.filename = str(path)
        raise
    if os.name == "posix":  # elsewhere a folder cannot be opened
        flush(path.parent)


def _of_system(error: SafetensorError) -> OSError:
    """What the system said, where safetensors repeats it: "I/O error: ... (os error 28)"."""
    said = _SYSTEM.search(str(error)) if os.name == "posix" else None
    return OSError(int(said[1]), os.strerror(int(said[1]))) if said else OSError(None, str(error))


def _write_bytes(path: Path, content: bytes) -> None:
    how = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0)  # Windows would change line ends
    descriptor = os.open(path, how, 0o644)
    try:
        rest = memoryview(content)
        while rest:  # a full disk may take a part before it refuses
            rest = rest[os.write(descriptor, rest) :]
    finally:
        os.close(descriptor)
