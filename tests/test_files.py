"""Files that are there whole or not at all, whatever fails and wherever."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from lehr.run import files
from lehr.run.files import flush, link, sha256_of, write_tensors, write_text

OLD, NEW = {"a": torch.zeros(3)}, {"a": torch.ones(5), "b": torch.arange(2)}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def old_link(path: Path) -> None:
    """Make `path` another name of a new file, which lies elsewhere."""
    there = path.parent.parent / "there"
    there.write_bytes(b"new")
    link(there, path)


WRITERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "text": (lambda path: write_text(path, "new, é\n"), "write"),
    "tensors": (lambda path: write_tensors(path, NEW), "save_file"),
    "link": (old_link, "hardlink"),
}


def full(*_: object, **__: object) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def test_a_text_comes_back(folder: Path) -> None:
    """A text is written in UTF-8, as it is, readable by all, over what was there; nothing is left beside it."""
    for text in ("one\r\n", "zwei: é\n", ""):
        write_text(folder / "a.txt", text)
        assert (folder / "a.txt").read_bytes() == text.encode()
    assert (folder / "a.txt").stat().st_mode & 0o044 == 0o044
    assert names(folder) == ["a.txt"]


def test_tensors_come_back(folder: Path) -> None:
    """Tensors of any layout and type come back with their bits, readable by all; nothing is left beside them."""
    wanted = {
        "turned": torch.randn(3, 4).t(),
        "channels last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "half": torch.randn(3).bfloat16(),
        "number": torch.tensor(7),
        "none": torch.empty(0),
    }
    write_tensors(folder / "a.safetensors", wanted)
    found = load_file(folder / "a.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert (folder / "a.safetensors").stat().st_mode & 0o044 == 0o044
    assert names(folder) == ["a.safetensors"]


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "bad disk"), KeyboardInterrupt()], ids=["disk", "Ctrl-C"]
)
@pytest.mark.parametrize("where", ["write", "fsync", "replace"])
def test_what_was_there_survives_what_fails(
    kind: str, error: BaseException, where: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever call fails, by the disk or by a person, the old file has its bytes and nothing is left beside."""
    write, call = WRITERS[kind]
    path = folder / "file"
    path.write_bytes(b"old")

    def fail(*_: object, **__: object) -> Any:
        raise error

    if where == "write" and kind == "link":
        monkeypatch.setattr(Path, "hardlink_to", fail)
        monkeypatch.setattr(os, "write", fail)
    elif where == "write":
        monkeypatch.setattr(files if call == "save_file" else os, call, fail)
    else:
        monkeypatch.setattr(os, where, fail)
    with pytest.raises(type(error)):
        write(path)
    assert path.read_bytes() == b"old"
    assert names(folder) == ["file"]


@pytest.mark.parametrize("kind", WRITERS)
def test_nothing_is_left_where_there_was_nothing(
    kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that could not be renamed into place is not there under any name."""
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        WRITERS[kind][0](folder / "file")
    assert names(folder) == []


@pytest.mark.parametrize("kind", WRITERS)
def test_the_order_of_what_reaches_the_disk(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes are flushed before the rename, and the name after it; else a power cut could leave an empty file."""
    path, told = folder / "file", []
    fsync, replace = os.fsync, os.replace

    def flushed(descriptor: int) -> None:
        told.append("folder" if os.path.samestat(os.fstat(descriptor), folder.stat()) else "bytes")
        fsync(descriptor)

    def renamed(aside: Path, to: Path) -> None:
        told.append("rename")
        replace(aside, to)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", renamed)
    WRITERS[kind][0](path)
    assert told == ["bytes", "rename", "folder"]


def test_a_half_written_file_of_a_killed_process_is_no_obstacle(folder: Path) -> None:
    """What a kill left beside a file is written over, and gone afterwards."""
    for kind, (write, _) in WRITERS.items():
        (folder / f".{kind}.part").write_bytes(b"half" * 1000)
        write(folder / kind)
    assert names(folder) == sorted(WRITERS)
    assert (folder / "text").read_text(encoding="utf-8") == "new, é\n"
    assert (folder / "link").read_bytes() == b"new"
    assert load_file(folder / "tensors").keys() == NEW.keys()


def test_a_disk_that_takes_a_part_gets_the_rest(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that takes some bytes only is gone on with."""
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, bytes(data)[:3]))
    write_text(folder / "a.txt", "0123456789")
    assert (folder / "a.txt").read_text(encoding="utf-8") == "0123456789"


def test_an_error_of_safetensors_is_one_of_the_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """safetensors tells of a full disk in an exception of its own, which comes as an OSError with its words."""

    def fail(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(files, "save_file", fail)
    with pytest.raises(OSError, match="No space left on device"):
        write_tensors(folder / "a", OLD)
    assert names(folder) == []


def test_a_real_place_that_cannot_be_written(tmp_path: Path) -> None:
    """A folder that is gone is an OSError, of texts, tensors and links alike."""
    (tmp_path / "there").touch()
    for write in (
        lambda path: write_text(path, "a"),
        lambda path: write_tensors(path, OLD),
        lambda path: link(tmp_path / "there", path),
    ):
        with pytest.raises(OSError, match="No such file or directory"):
            write(tmp_path / "gone" / "file")


def test_a_link_is_another_name(folder: Path) -> None:
    """A link costs no room; doing it again does nothing, and it may go over to another file."""
    for name in ("one", "two"):
        (folder / name).write_text(name, encoding="utf-8")
    link(folder / "one", folder / "best")
    assert (folder / "best").samefile(folder / "one")
    changed = (folder / "best").stat().st_ctime_ns
    link(folder / "one", folder / "best")
    assert (folder / "best").stat().st_ctime_ns == changed
    link(folder / "two", folder / "best")
    assert (folder / "best").samefile(folder / "two")
    assert (folder / "one").read_text(encoding="utf-8") == "one"
    assert names(folder) == ["best", "one", "two"]


def test_a_link_becomes_a_copy_where_there_are_none(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a file system without hard links the file is copied, also over an older copy."""

    def none(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", none)
    for content in (b"one", b"two" * 1000):
        (folder / "there").write_bytes(content)
        link(folder / "there", folder / "best")
        assert (folder / "best").read_bytes() == content
        assert not (folder / "best").samefile(folder / "there")
    assert names(folder) == ["best", "there"]


def test_the_sum_of_a_file(tmp_path: Path) -> None:
    """`sha256_of` is SHA-256 of all bytes, also of a file larger than it reads at once, or empty."""
    for content in (b"", b"abc", os.urandom(files._BLOCK + 17)):
        (tmp_path / "file").write_bytes(content)
        assert sha256_of(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_flushing_needs_what_is_there(tmp_path: Path) -> None:
    """Files and folders can be flushed, what is missing cannot, and no descriptor is left open."""
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0  # noqa: PTH208
    (tmp_path / "file").touch()
    flush(tmp_path / "file")
    flush(tmp_path)
    with pytest.raises(FileNotFoundError):
        flush(tmp_path / "none")
    after = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0  # noqa: PTH208
    assert after == before
