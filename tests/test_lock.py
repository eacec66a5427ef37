"""One process at a time in a run's directory, and none that has ended keeps the next one out."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

import lehr
from forking import ended, forked
from lehr.errors import RequestError
from lehr.run import lock
from lehr.run.lock import locked

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]
OTHER = (
    r"run: another process trains in this directory now; let it end, or stop it, or choose another directory"
)
SAME = r"run: this process trains in this directory now"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run" / ".lock"


def taken(path: Path) -> str:
    """Why the lock cannot be had by a process that has nothing to do with this one; empty where it can."""
    reading, writing = os.pipe()

    def work() -> None:
        lock._held.clear()  # a copy of this process, which would know what this one holds
        try:
            with locked(path):
                pass
        except RequestError as error:
            os.write(writing, str(error).encode())

    assert ended(work) == 0
    os.close(writing)
    said = os.read(reading, 10_000).decode()
    os.close(reading)
    return said


class Holder:
    """Another process that holds the lock, with a worker of its own, until it is killed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.told, telling = os.pipe()
        waiting, self.end = os.pipe()

        def work() -> None:
            os.close(self.end)
            with locked(self.path):
                worker = os.fork()
                if not worker:
                    os.read(waiting, 1)  # ends with the test
                    os._exit(0)
                os.write(telling, f"{worker}\n".encode())
                os.read(waiting, 1)

        self.process = forked(work)
        os.close(telling)
        os.close(waiting)
        self.worker = int(os.read(self.told, 100))

    def kill(self) -> None:
        os.kill(self.process, signal.SIGKILL)
        os.waitpid(self.process, 0)

    def release(self) -> None:
        """Let the worker end."""
        os.close(self.end)
        os.close(self.told)


@pytest.fixture
def holder(path: Path) -> Iterator[Holder]:
    found = Holder(path)
    yield found
    found.release()


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_another_process_is_refused_until_the_first_is_killed(holder: Holder, path: Path) -> None:
    """The second process is refused with words; a kill frees the lock at once, though workers still live."""
    with pytest.raises(RequestError, match=OTHER), locked(path):
        pass
    holder.kill()
    assert alive(holder.worker)
    with locked(path):
        assert alive(holder.worker)


def test_this_process_is_refused_too(path: Path, tmp_path: Path) -> None:
    """A second run in one process is refused, by whatever name it calls the directory, and frees nothing."""
    (tmp_path / "link").symlink_to(path.parent, target_is_directory=True)
    with locked(path):
        for other in (path, path.parent / ".." / "run" / ".lock", tmp_path / "link" / ".lock"):
            with (
                pytest.raises(RequestError, match="this process trains in this directory now"),
                locked(other),
            ):
                pass
        assert "another process" in taken(path)
    assert taken(path) == ""


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_it_is_free_afterwards(path: Path, error: type[BaseException]) -> None:
    """However a run ends, the lock is free for this process and others, and the file stays."""

    def broken() -> None:
        with locked(path):
            assert taken(path) != ""
            raise error

    for _ in range(2):
        with pytest.raises(error):
            broken()
        assert taken(path) == ""
        assert path.is_file()


def test_directories_are_locked_each_for_itself(path: Path, tmp_path: Path) -> None:
    """Two runs in two directories do not know of each other."""
    (tmp_path / "other").mkdir()
    with locked(path), locked(tmp_path / "other" / ".lock"):
        assert taken(path) != ""


def test_what_cannot_be_locked_is_refused(path: Path) -> None:
    """Where the file cannot be opened the message says which and why."""
    path.mkdir()
    with (
        pytest.raises(RequestError, match=r"\.lock: cannot be opened: Is a directory; expected a directory"),
        locked(path),
    ):
        pass
    with (
        pytest.raises(RequestError, match="cannot be opened: No such file"),
        locked(path.parent / "none" / ".lock"),
    ):
        pass


def test_a_run_holds_it(tmp_path: Path) -> None:
    """While a run trains, nothing else gets into its directory, resumed or not; nothing in it is harmed."""
    data = TensorDataset(torch.randn(16, 4), torch.arange(16) % 2)
    recipe = lehr.Recipe([lehr.Stage("1 epoch", train="all", lr=0.1)], batch_size=8)
    refused: list[str] = []

    def again(resume: Any) -> None:
        with pytest.raises(RequestError, match=SAME):
            lehr.fit(nn.Linear(4, 2), data, recipe=recipe, out=tmp_path / "run", resume=resume, device="cpu")
        refused.append(taken(tmp_path / "run" / ".lock"))

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        again("auto" if refused else True)
        return functional.cross_entropy(model(batch[0]), batch[1])

    result = lehr.fit(nn.Linear(4, 2), data, recipe=recipe, out=tmp_path / "run", loss=loss, device="cpu")
    assert len(refused) == 2
    assert all("another process trains" in said for said in refused)
    assert result.history[-1]["step"] == 2
    assert taken(tmp_path / "run" / ".lock") == ""


def test_whether_a_lock_is_held_can_be_asked(tmp_path: Path) -> None:
    """Asking changes nothing: neither of a file that is not there, nor of a lock of this process or another."""
    path = tmp_path / ".lock"
    assert not lock.is_held(path)
    assert not path.exists()
    with locked(path):
        assert lock.is_held(path)
        assert ended(lambda: os._exit(_asked_from_outside(path))) == 7  # it is still held
    assert not lock.is_held(path)


def _asked_from_outside(path: Path) -> int:
    lock._held.clear()
    return 7 if lock.is_held(path) else 0


def test_a_file_system_without_locks_is_not_called_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the system gives no lock for a reason of its own, that is said, and not that someone trains there."""

    def none_left(_: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock, "_lock", none_left)
    with (
        pytest.raises(RequestError, match="cannot be locked: No locks available"),
        locked(tmp_path / ".lock"),
    ):
        pass
    assert not lock.is_held(tmp_path / ".lock")
