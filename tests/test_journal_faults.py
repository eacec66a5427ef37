"""The journal on a bad disk: nothing that happens to it stops a run, and nothing is lost that can be kept."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lehr.errors import RunError
from lehr.events import Event, Interrupted, Note
from lehr.journal import Journal, read_journal

ROOT = os.geteuid() == 0


class Filling:
    """A file that takes as many bytes as there is room for, whose room is a person's to change."""

    def __init__(self, file: object, room: float) -> None:
        self._file, self.room = file, room

    def write(self, data: bytes) -> int:
        if self.room <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = int(self._file.write(data[: int(min(self.room, len(data)))]))  # type: ignore[attr-defined]
        self.room -= taken
        return taken

    def __getattr__(self, name: str) -> object:
        return getattr(self._file, name)


class Clock:
    """A clock that stands where it was put, so that the file's place is looked at when the test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def told(path: Path) -> list[Event]:
    return [record.event for record in read_journal(path)]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A run's folder, which a test may take away or lock."""
    path = tmp_path / "run"
    path.mkdir()
    yield path
    if path.exists():
        path.chmod(0o755)


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the disk is full lines wait and the file has whole lines only; with room again all are written."""
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        journal(Note("one"))
        filling = Filling(journal._lines._file, room=10)
        monkeypatch.setattr(journal._lines, "_file", filling)
        for step in range(3):
            journal(Interrupted(step))
            assert path.read_bytes().endswith(b'"one"}\n')
        assert journal.waiting == 3
        assert journal.records == 4
        assert journal.problem == f"{path}: the lines cannot be written (No space left on device); 3 wait"
        filling.room = 110  # one line and a half
        journal.flush()
        assert journal.waiting == 2
        assert told(path) == [Note("one"), Interrupted(0)]
        filling.room = float("inf")
        journal(Interrupted(3))
        assert (journal.waiting, journal.problem, journal.records) == (0, "", 5)
    assert told(path) == [Note("one"), *map(Interrupted, range(4))]


@given(rooms=st.lists(st.integers(0, 300), min_size=1, max_size=30))
def test_any_room(rooms: list[int], tmp_path_factory: pytest.TempPathFactory) -> None:
    """However little room comes free at a time, the file is always whole lines, in order, none twice."""
    path = tmp_path_factory.mktemp("full") / "journal.jsonl"
    journal = Journal(path, clock=lambda: 0.0)
    filling = Filling(journal._lines._file, room=0)
    journal._lines._file = filling  # type: ignore[assignment]
    for step, room in enumerate(rooms):
        filling.room += room
        journal(Interrupted(step))
        read = read_journal(path)
        assert read.torn == ""
        assert [record.event for record in read] == [
            Interrupted(n) for n in range(step + 1 - journal.waiting)
        ]
        assert bool(journal.problem) == (journal.waiting > 0)
    filling.room = float("inf")
    journal.close()
    assert journal.waiting == 0
    assert told(path) == [Interrupted(n) for n in range(len(rooms))]


def test_half_a_line_that_could_not_be_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a disk takes half a line and then refuses even to give it back, it is cut off before the next."""
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:

        class Stuck(Filling):
            def truncate(self, size: int) -> int:
                if self.room <= 0:
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                return int(self._file.truncate(size))  # type: ignore[attr-defined]

        stuck = Stuck(journal._lines._file, room=10)
        monkeypatch.setattr(journal._lines, "_file", stuck)
        journal(Note("one"))
        assert len(path.read_bytes()) == 10
        stuck.room = float("inf")
        journal(Note("two"))
    assert told(path) == [Note("one"), Note("two")]


def _in_a_child(work: object) -> int:
    """What `work` returns, run in a process of its own."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            code = work()  # type: ignore[operator]
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_real_limit(tmp_path: Path) -> None:
    """Against a limit of the system itself, lines wait, and are whole and in order once it is lifted."""
    path = tmp_path / "journal.jsonl"

    def work() -> int:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # Python ignores SIGXFSZ
        with Journal(path) as journal:
            for step in range(50):
                journal(Interrupted(step))
            if "File too large" not in journal.problem or read_journal(path).torn:
                return 1
            if len(read_journal(path)) + journal.waiting != 50:
                return 2
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
            journal.flush()
            return journal.waiting

    assert _in_a_child(work) == 0
    assert told(path) == [Interrupted(step) for step in range(50)]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_disk_that_was_always_full() -> None:
    """Where nothing can be written from the start, the run goes on, and the end of the block says so."""
    journal = Journal("/dev/full")
    journal(Note("one"))
    journal.sync()
    journal(Note("two"))
    with pytest.raises(RunError, match=r"cannot be written \(No space left on device\); 2 wait"), journal:
        pass
    assert journal.waiting == 2
    assert "No space left" in journal.problem


def test_the_end_of_a_block_hides_no_failure(folder: Path) -> None:
    """Where the block itself failed, its failure is what is raised, not the journal's."""
    with pytest.raises(ZeroDivisionError), Journal(folder / "journal.jsonl"):  # noqa: PT012
        shutil.rmtree(folder)
        raise ZeroDivisionError


def test_a_deleted_journal_is_made_anew(folder: Path) -> None:
    """A journal that was deleted while it was written is there again, whole, with the next event."""
    path, clock = folder / "journal.jsonl", Clock()
    with Journal(path, clock=clock) as journal:
        for step in range(3):
            journal(Interrupted(step))
        path.unlink()
        clock.now = 2.0
        journal(Interrupted(3))
        assert journal.problem == ""
        assert told(path) == [Interrupted(step) for step in range(4)]
        path.unlink()
    assert told(path) == [Interrupted(step) for step in range(4)]


def test_the_place_is_looked_at_once_a_second(folder: Path) -> None:
    """Whether the file is still there is asked at most once a second, also where the clock is set back."""
    path, clock = folder / "journal.jsonl", Clock()
    clock.now = 100.0
    journal = Journal(path, clock=clock)
    journal(Note("one"))
    path.unlink()
    clock.now = 100.9
    journal(Note("two"))
    assert not path.exists()
    clock.now = 50.0
    journal(Note("three"))
    assert told(path) == [Note("one"), Note("two"), Note("three")]
    journal.close()


def test_a_folder_that_vanished_is_not_made(folder: Path) -> None:
    """Where the folder was removed, no folder is made, the lines wait, and the end of the block says so."""
    path = folder / "journal.jsonl"
    journal = Journal(path, clock=Clock())
    journal(Note("one"))
    shutil.rmtree(folder)
    journal.sync()
    journal(Note("two"))
    assert journal.waiting == 1
    with pytest.raises(RunError, match=r"cannot be written \(No such file or directory\); 1 wait"), journal:
        pass
    assert not folder.exists()


def test_a_folder_that_was_removed_and_made_again(folder: Path) -> None:
    """Once there is a folder again, the whole journal is there again, from the file that was still open."""
    path = folder / "journal.jsonl"
    with Journal(path, clock=Clock()) as journal:
        journal(Note("one"))
        shutil.rmtree(folder)
        journal.flush()
        journal(Note("two"))
        folder.mkdir()
        journal(Note("three"))
        assert (journal.waiting, journal.problem) == (0, "")
    assert told(path) == [Note("one"), Note("two"), Note("three")]


def test_a_folder_that_was_moved(folder: Path) -> None:
    """Where the folder was moved, lines go on into the file in its new place, and the problem is told."""
    path, moved = folder / "journal.jsonl", folder.with_name("moved")
    journal = Journal(path, clock=Clock())
    journal(Note("one"))
    folder.rename(moved)
    journal.flush()
    journal(Note("two"))
    assert "this is no longer the file that was opened (No such file or directory)" in journal.problem
    assert told(moved / "journal.jsonl") == [Note("one"), Note("two")]
    moved.rename(folder)
    journal(Note("three"))
    assert journal.problem == ""
    journal.close()
    assert told(path) == [Note("one"), Note("two"), Note("three")]


def test_an_editor_that_saved_the_journal(folder: Path) -> None:
    """A journal that was replaced by a copy of itself, as editors do, is gone on with."""
    path = folder / "journal.jsonl"
    with Journal(path, clock=Clock()) as journal:
        journal(Note("one"))
        shutil.copy(path, folder / "copy")
        os.replace(folder / "copy", path)  # noqa: PTH105
        journal.flush()
        journal(Note("two"))
        assert journal.problem == ""
    assert told(path) == [Note("one"), Note("two")]


@pytest.mark.parametrize("text", ["someone else's\n", '{"v":2,"event":"note"}\n' * 9])
def test_another_file_is_left_alone(text: str, folder: Path) -> None:
    """Nothing is written into a file that came to lie where the journal was, and nothing taken from it."""
    path = folder / "journal.jsonl"
    journal = Journal(path, clock=Clock())
    journal(Note("one"))
    path.unlink()
    path.write_text(text)
    journal.flush()
    journal(Note("two"))
    journal.close()
    assert path.read_text() == text
    assert journal.waiting == 1
    assert "what lies there is not what was written" in journal.problem


def test_lines_of_another_process_are_left_alone(folder: Path) -> None:
    """A copy of the journal to which another process has added lines is not cut."""
    path = folder / "journal.jsonl"
    journal = Journal(path, clock=Clock())
    journal(Note("one"))
    shutil.copy(path, folder / "copy")
    with Journal(folder / "copy", append=True) as other:
        other(Note("other"))
    os.replace(folder / "copy", path)  # noqa: PTH105
    journal.close()
    assert told(path) == [Note("one"), Note("other")]
    assert "what lies there is not what was written" in journal.problem


def test_a_journal_that_was_cut(folder: Path) -> None:
    """Where lines were taken away from the file, those that follow are kept all the same, and it is told."""
    path = folder / "journal.jsonl"
    journal = Journal(path, clock=Clock())
    journal(Note("one"))
    os.truncate(path, 0)
    journal.flush()
    assert "what lies there is not what was written" in journal.problem
    journal(Note("two"))
    assert told(path) == [Note("two")]
    journal.close()


@pytest.mark.parametrize("half", [b"", b'{"v":2,"ev'])
def test_a_disk_that_comes_back(half: bytes, folder: Path) -> None:
    """Where the system has lost the open file and the disk is there again, the file at the path is gone on with."""
    path = folder / "journal.jsonl"
    with Journal(path, clock=Clock()) as journal:
        journal(Note("one"))
        number = journal._lines._file.fileno()
        other = os.open(folder / "other", os.O_RDWR | os.O_CREAT)
        os.dup2(other, number)  # what the number means now
        path.rename(folder / "gone")
        journal.flush()
        journal(Note("two"))
        assert journal.waiting == 1
        assert not path.exists()
        shutil.copy(folder / "gone", path)
        with path.open("ab") as file:
            file.write(half)
        journal(Note("three"))
        assert (journal.waiting, journal.problem) == (0, "")
    assert told(path) == [Note("one"), Note("two"), Note("three")]
    assert os.path.sameopenfile(other, number), "a file that is not the journal's was closed"
    os.close(other)
    os.close(number)
    assert (folder / "other").read_bytes() == b""


def test_a_file_that_the_system_has_lost(tmp_path: Path) -> None:
    """Where the file's number is no longer valid, the file is opened again."""
    path = tmp_path / "journal.jsonl"
    with Journal(path, clock=Clock()) as journal:
        journal(Note("one"))
        os.close(journal._lines._file.fileno())
        journal(Note("two"))
        assert "Bad file descriptor" in journal.problem
        journal(Note("three"))
        assert journal.problem == ""
    assert told(path) == [Note("one"), Note("two"), Note("three")]


def test_permission_lost(folder: Path) -> None:
    """Where the folder can no longer be entered, lines go on into the open file, and the problem is told."""
    path = folder / "journal.jsonl"
    journal = Journal(path, clock=Clock())
    journal(Note("one"))
    folder.chmod(0)
    try:
        if ROOT:  # who may enter everywhere
            os.seteuid(65534)
        journal.flush()
        journal(Note("two"))
        assert "Permission denied" in journal.problem
        assert journal.waiting == 0
    finally:
        if ROOT:
            os.seteuid(0)
        folder.chmod(0o755)
    journal(Note("three"))
    assert journal.problem == ""
    journal.close()
    assert told(path) == [Note("one"), Note("two"), Note("three")]


def test_a_program_that_changes_its_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A journal with a relative path stays where it was begun."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    with Journal("journal.jsonl", clock=Clock()) as journal:
        journal(Note("one"))
        monkeypatch.chdir(tmp_path / "elsewhere")
        journal.flush()
        assert journal.problem == ""
    assert told(tmp_path / "journal.jsonl") == [Note("one")]
    assert not (tmp_path / "elsewhere" / "journal.jsonl").exists()


def test_sync_reaches_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`sync` asks the device itself; that it refuses is told, and stops nothing."""
    asked: list[int] = []
    monkeypatch.setattr(os, "fsync", asked.append)
    with Journal(tmp_path / "journal.jsonl", clock=Clock()) as journal:
        journal(Note("one"))
        assert asked == []
        journal.sync()
        assert len(asked) == 1

        def refuse(number: int) -> None:
            raise OSError(errno.EIO, f"Input/output error of file {number}")

        monkeypatch.setattr(os, "fsync", refuse)
        journal.sync()
        assert "the device did not confirm the lines (Input/output error" in journal.problem
        journal(Note("two"))
        assert journal.problem == ""
