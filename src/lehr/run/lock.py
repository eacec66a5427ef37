"""One process at a time in a run's directory. It knows a path, nothing else.

A POSIX lock on a file, because the system gives it up when the process ends, however it ends, and because the
worker processes that load samples do not inherit it: after a kill, the next process need not wait for them.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lehr.errors import RequestError

_TAKEN = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)  # what systems say of a lock that another process holds
# A process may lock a file twice: the system would not mind, and two runs in it would.
_held: set[str] = set()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock at `path`, which is made where it is missing.

    Raises:
        RequestError: where another run holds it, in this process or another.
    """
    where = os.path.realpath(path)
    if where in _held:
        raise RequestError(_taken(path, "this process"))
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise RequestError(
            f"{path}: cannot be opened: {error.strerror}; expected a directory that may be written to"
        ) from None
    try:
        try:
            _lock(descriptor)
        except OSError as error:
            if error.errno not in _TAKEN:
                raise RequestError(
                    f"{path}: cannot be locked: {error.strerror}; choose a directory on a file system with locks"
                ) from None
            raise RequestError(_taken(path, "another process")) from None
        _held.add(where)
        try:
            yield
        finally:
            _held.discard(where)
    finally:
        os.close(descriptor)


def is_held(path: Path) -> bool:
    """Whether a run, in this process or another, holds the lock at `path` now."""
    if os.path.realpath(path) in _held:  # opening and closing it would give up this process's own
        return True
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:
        return False
    try:
        _lock(descriptor)
    except OSError as error:
        return error.errno in _TAKEN
    finally:
        os.close(descriptor)
    return False


def _taken(path: Path, who: str) -> str:
    return (
        f"{path.parent}: {who} trains in this directory now; let it end, or stop it, "
        "or choose another directory"
    )


if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int) -> None:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    def _lock(descriptor: int) -> None:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
