"""What breaks in the middle of a run, and the command line that meets it: for processes of their own (`nursery.py`).

Everything here is a function of a module, or a `partial` of one, so that it can be sent to another process.
"""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import shutil
import signal
import sys
import tempfile
import termios
import traceback
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

import lehr.job
import lehr.run.loop
from lehr.__main__ import main
from lehr.run.update import Update
from nursery import Ended, nursery

Fault = Callable[[], object]
SHORT = ("--set", "stages.0.length=4 steps", "--set", "stages.1.length=4 steps", "--workers", "0")
FIT = ("fit", "digits", "--no-scratch", "--device", "cpu", *SHORT)
"""Four steps of the head, four of all of it; each stage ends with a validation."""


def ends(*arguments: object, **said: Any) -> Ended:
    """Do `lehr ARGUMENTS` in another process, with what breaks (see `command`); how it ended."""
    return nursery(warm_up).run(partial(command, *(str(a) for a in arguments), **said))


def warm_up() -> None:
    """Load all that the command line needs."""
    with tempfile.TemporaryDirectory() as folder, redirect_stderr(None):
        torch.set_num_threads(1)
        with suppress(SystemExit):
            main([*FIT, "--out", f"{folder}/run"])


def command(*arguments: str, first: Fault | None = None, at: Mapping[int, Fault] | None = None) -> None:
    """The command line; `first` comes before it, and `at` right before the update of a step."""
    torch.set_num_threads(1)
    if first:
        first()
    if at:
        strike(at)
    code = 1
    try:
        main(arguments)
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 0
    except BaseException:
        traceback.print_exc()
    else:
        code = 0
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, AttributeError):  # what a test has broken
                stream.flush()
        os._exit(code)


def keep_no_pixels() -> None:
    """Every epoch reads the files of its images again."""
    os.environ["LEHR_DECODED"] = "off"


def strike(at: Mapping[int, Fault]) -> None:
    """From now on, these things happen right before the update of a step."""
    usual = Update.__call__

    def call(self: Update, window: Any, step: int) -> torch.Tensor:
        if step in at:
            at[step]()
        return usual(self, window, step)

    Update.__call__ = call  # type: ignore[method-assign]


def many(*faults: Fault) -> None:
    """One after the other."""
    for fault in faults:
        fault()


def press(*numbers: int) -> None:
    """Send signals to this process."""
    for number in numbers:
        os.kill(os.getpid(), number)


def press_in_a_worker(parent: int, number: int) -> None:
    """Send a signal to this process, unless it is `parent`."""
    if os.getpid() != parent:
        os.kill(os.getpid(), number)


def in_validation(fault: Fault) -> None:
    """From now on, this happens at the start of each validation."""
    usual = lehr.run.loop.validate

    def validate(*given: Any, **said: Any) -> Any:
        fault()
        return usual(*given, **said)

    lehr.run.loop.validate = validate  # type: ignore[attr-defined]


def while_checking(fault: Fault) -> None:
    """This happens when the first file of the data has been checked."""
    usual = lehr.job.open_data

    def open_data(source: str, **said: Any) -> Any:
        return usual(source, **{**said, "progress": lambda *_: fault()})

    lehr.job.open_data = open_data  # type: ignore[attr-defined]


def fill(disk: Path, leave: int = 0) -> None:
    """Fill a disk but for some bytes."""
    with (disk / "ballast").open("ab", buffering=0) as file:
        for size in (65536, 1):
            with suppress(OSError):
                while file.write(b"\0" * size):
                    pass
        file.truncate(max(0, file.tell() - leave))


def clear(disk: Path) -> None:
    """Free what `fill` has filled."""
    (disk / "ballast").unlink(missing_ok=True)


def limit(size: int | None) -> None:
    """No file may be longer than so many bytes, whoever writes; None for any length."""
    most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (most if size is None else size, most))


def lose_permission(folder: Path) -> None:
    """From now on, this process may not write into a folder and what is below it."""
    if os.geteuid():
        for path in (folder, *(below for below in folder.rglob("*") if below.is_dir())):
            path.chmod(0o555)
    else:  # root may do anything
        folder.chmod(0o700)
        os.seteuid(65534)


def failing_flushes() -> None:
    """From now on, the device takes nothing."""

    def fsync(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    os.fsync = fsync


def remove(path: Path) -> None:
    """Remove a folder, or a file."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def replace_by_a_folder(path: Path) -> None:
    """Where a file was, there is a folder now."""
    path.unlink()
    path.mkdir()


def overwrite(path: Path, content: bytes) -> None:
    """Put something else into a file."""
    path.write_bytes(content)


def broken_pipe() -> None:
    """Standard error becomes a pipe that nobody reads any more."""
    reads, writes = os.pipe()
    os.dup2(writes, 2)
    os.close(writes)
    os.close(reads)


def no_standard_error() -> None:
    """There is no standard error, as after `2>&-`."""
    os.close(2)
    sys.stderr = sys.__stderr__ = None  # type: ignore[misc]


_terminal: list[int] = []


def in_a_terminal() -> None:
    """Be a program in a terminal of its own."""
    master, slave = os.openpty()
    os.setsid()
    fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
    for standard in (0, 1, 2):
        os.dup2(slave, standard)
    os.close(slave)
    _terminal.append(master)


def hang_up() -> None:
    """Close that terminal."""
    os.close(_terminal.pop())


def ignore(number: int) -> None:
    """As nohup does."""
    signal.signal(number, signal.SIG_IGN)
