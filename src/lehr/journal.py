"""The file that keeps the events of a run: one a line, only ever added to; its writer and its reader.

A run is worth more than its journal: one that cannot be written does not stop it (`lehr.line_file` keeps the
lines until they can be). The format of a line is `lehr.event_json`'s. This file must not know who makes the
events, what a tensor is, or how anything is shown.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Literal

from lehr.errors import RequestError, RunError
from lehr.event_json import format_line, is_written, parse_line
from lehr.events import Event, Note, Record, Resumed
from lehr.line_file import LineFile
from lehr.untrusted import read_bytes

_LARGEST: Final = 4 << 30
"""Bytes that a journal may have: two hundred million steps."""
_BEGINS: Final = '{"v":'


@dataclass(frozen=True)
class Records:
    """What a journal holds, oldest first; iterating goes over `records`.

    `torn` is what stands after the last whole line: a process that is killed while it writes leaves half a
    line, which is no event. It is "" in a journal that was closed well. `damaged` has the numbers, from 1, of
    the lines that could not be read, each of which `records` has as a `Note`.
    """

    records: tuple[Record, ...]
    torn: str = ""
    damaged: tuple[int, ...] = ()

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)


class Journal:
    """An observer that writes each event as one line of `path`, at once; passing events are left out.

    Every line goes to the system in one piece and is not held back, so that a process that is killed loses at
    most the line it was writing.

    Calling it never fails because of the disk. A line that cannot be written, on a full disk for example,
    waits in memory with all that follow, and is tried again with the next event, and by `flush`, `sync` and
    `close`. How many may wait is not limited: those of a million steps take about 20 MB. Where the file was
    moved, deleted or replaced while it was open, it is taken up again, or made anew, as soon as that can be
    done without harm; its folder is never made. `waiting` and `problem` say how it stands, and can be read
    after `close`.

    Use it as a context manager, or call `close`. It is for one thread.

    Args:
        path: the file; it is made where it is missing, its folder is not.
        append: go on with a journal that is there. Half a last line is cut off then, a damaged line is left
            where it is, and a `Note` about it is written; `notes` has them all.
        clock: gives the time of an event, in seconds since 1970-01-01 UTC. It may go backwards.

    Raises:
        RequestError: where `path` cannot be opened, or holds something and `append` was not asked for.
        RunError: where nothing in a file to go on with is a line of a journal; and from the end of a `with`
            block that did not fail itself, where the file at `path` is not the whole journal.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "journal.jsonl"
        >>> with Journal(path, clock=lambda: 0.0) as journal:
        ...     journal(Note("hello"))
        >>> print(path.read_text(), end="")
        {"v":4,"event":"note","time":"1970-01-01T00:00:00.000Z","text":"hello"}
    """

    def __init__(
        self, path: str | Path, *, append: bool = False, clock: Callable[[], float] = time.time
    ) -> None:
        self.path = Path(path)
        self._clock = clock
        try:
            data, self._records, self.notes = _taken_up(self.path, append)
            self._lines = LineFile(self.path, data)
        except OSError as error:
            raise RequestError(
                f"{self.path}: the journal cannot be opened for writing ({error.strerror}); "
                "expected a file in a folder that exists and may be written to"
            ) from error
        for note in self.notes:
            self(note)

    @property
    def records(self) -> int:
        """How many records the journal has: the lines of its file, damaged ones too, and those that wait."""
        return self._records

    @property
    def waiting(self) -> int:
        """How many lines could not be written yet."""
        return self._lines.waiting

    @property
    def problem(self) -> str:
        """What is wrong with the file, in words; "" when all is well."""
        return self._lines.problem

    def __call__(self, event: Event) -> None:
        """Write `event` down, unless it is a passing one.

        Raises:
            TypeError: where a field of `event` holds something that is not of its type.
            ValueError: after `close`.
        """
        if not is_written(event):
            return
        if self._lines.closed:
            raise ValueError(f"{self.path}: the journal is closed, and {event!r} came after that")
        record = Record(self._clock(), event)
        line = (format_line(record) + "\n").encode("ascii")
        self._records += 1
        self._lines.add(line, record.time)

    def flush(self) -> None:
        """Try again to write what waits; after `close` it does nothing."""
        self._lines.flush()

    def sync(self) -> None:
        """`flush`, and return when the device itself has the lines: a power cut loses none of them then.

        It never raises: where the device does not confirm them, `problem` says so until the next event.
        """
        self._lines.sync()

    def close(self) -> None:
        """Try once more to write what waits, and close the file; calling it again does nothing."""
        self._lines.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        if kind is None and self.problem:
            raise RunError(f"{self.problem}; so the journal at its path is not whole, though the run went on")


def read_journal(path: str | Path, *, damaged: Literal["refuse", "note"] = "refuse") -> Records:
    """Everything that the journal at `path` holds.

    Half a last line is left out and told in `Records.torn`. A last line of which only the line's end is
    missing counts as whole.

    Args:
        path: the file.
        damaged: "refuse" raises at a line that cannot be read; "note" gives a `Note` in its place, so that
            every other record keeps its number.

    Raises:
        RequestError: where the file cannot be read.
        RunError: for a damaged line, an unknown event or a newer version, with file and line.
    """
    try:
        data = read_bytes(path, most=_LARGEST)
    except OSError as error:
        raise RequestError(
            f"{path}: this journal cannot be read ({error.strerror}); expected the journal.jsonl of a run"
        ) from error
    return _records(data, Path(path), damaged)


def effective(records: Sequence[Record]) -> tuple[Record, ...]:
    """The records that count: those of steps that were lost, and done again by a resumed run, are left out.

    Where a run was resumed, its first `Resumed.records` records count, and what follows from `Resumed` on.
    Each `Resumed` is applied to what counted when its checkpoint was taken, so that one which was lost itself
    takes nothing away.

    Args:
        records: all that a journal holds, as `read_journal` gives it: `Resumed.records` counts them.

    Example:
        >>> told = [Note("kept"), Note("lost"), Resumed(step=0, stage=0, epoch=0, records=1), Note("again")]
        >>> [r.event.text for r in effective([Record(0.0, e) for e in told]) if isinstance(r.event, Note)]
        ['kept', 'again']
    """
    counted = []
    index = len(records) - 1
    while index >= 0:  # from the last one back: what comes before a record is known, what comes after is not
        event = records[index].event
        counted.append(records[index])
        index = min(index, event.records) - 1 if isinstance(event, Resumed) else index - 1
    return tuple(reversed(counted))


def _records(data: bytes, path: Path, damaged: Literal["refuse", "note"]) -> Records:
    lines = data.split(b"\n")
    last, torn = lines.pop(), ""
    if last:
        try:
            json.loads(last)
            lines.append(last)
        except (ValueError, RecursionError):
            torn = last.decode("utf-8", "backslashreplace")
    records: list[Record] = []
    unread: list[int] = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(parse_line(line, where=f"{path}:{number}"))
        except RunError as error:
            if damaged != "note":
                raise
            unread.append(number)
            records.append(Record(records[-1].time if records else 0.0, Note(f"damaged line: {error}")))
    return Records(tuple(records), torn, tuple(unread))


def _first_words(found: Records) -> str:
    event = found.records[0].event if found.records else None
    return event.text if isinstance(event, Note) else "half a line"


def _taken_up(path: Path, append: bool) -> tuple[bytes, int, tuple[Note, ...]]:
    """The whole lines of a journal to go on with, their number, and what had to be mended.

    Half a last line is cut off; a line that is damaged stays, since lines are counted.
    """
    if not path.is_file() or path.stat().st_size == 0:
        return b"", 0, ()
    if not append:
        raise RequestError(
            f"{path}: there is a journal here already, and a new run would be mixed into it; "
            "give another folder, or move this one away"
        )
    data = read_bytes(path, most=_LARGEST)
    found = _records(data, path, "note")
    begun = not found.records and _BEGINS.startswith(found.torn[: len(_BEGINS)])
    if len(found.damaged) == len(found) and not begun:
        raise RunError(
            f"{path}: nothing in this file is a line of a journal that can be read, so it is left as it is; "
            f"expected the journal.jsonl of a run; move it away to begin a new one ({_first_words(found)})"
        )
    notes = [
        f"line {number} of the journal is damaged; it is left as it is, and what it said is lost"
        for number in found.damaged
    ]
    with path.open("rb+") as file:
        if found.torn:
            cut = f"the journal ended in half a line of {len(found.torn)} characters, which was cut off"
            notes.append(cut)
            data = data[: data.rfind(b"\n") + 1]
            file.truncate(len(data))
        elif not data.endswith(b"\n"):  # a whole event, of which only the line's end is missing
            data += b"\n"
            file.seek(0, os.SEEK_END)
            file.write(b"\n")
    return data, len(found), tuple(Note(text) for text in notes)
