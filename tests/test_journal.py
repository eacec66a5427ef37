"""The journal: what is written is read back, to the bit, and nothing else is taken for it."""

from __future__ import annotations

import json
import math
import re
import struct
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lehr import journal as module
from lehr.errors import RequestError, RunError
from lehr.journal import (
    EpochEnded,
    Event,
    Interrupted,
    Journal,
    Note,
    Progressed,
    Record,
    RunEnded,
    RunFailed,
    RunStarted,
    StageEnded,
    StageStarted,
    StepsTaken,
    Validating,
    format_line,
    parse_line,
    read_journal,
)

PAGE = Path(__file__).parents[1] / "docs" / "journal.md"

EXAMPLE = [
    RunStarted(
        "0.1.0",
        "5f0c2a9e7d41b86320f9ce158a3d7b640c92e5f17ab8364d0e71c95f2b8ad463",
        4,
        2,
        64,
        32,
        "cpu",
        "fp32",
        2,
    ),
    StageStarted(0, "head", 0, 2, 0, 1, 650, 24490, {"head": 1e-3}),
    StepsTaken(0, 2, (2.302585092994046, 2.1)),
    EpochEnded(
        0, 0, 2, 2.201, {"valid_loss": 2.05, "valid_accuracy": 0.25}, {"head": 1e-3}, 0.41, 160.0, True
    ),
    StageEnded(0, 2, "length", 0),
    StageStarted(1, "all", 2, 4, 1, 1, 24490, 24490, {"head": 1e-3, "backbone": 1e-4}),
    Note("the norms of the backbone are trained without weight decay"),
    StepsTaken(2, 4, (1.75, math.inf)),
    RunFailed(4, 1, "the loss is inf at step 3; try a lower rate"),
]

WRITTEN = [kind for kind in get_args(Event) if kind not in (Progressed, Validating)]
LINE = '{"v":1,"event":"interrupted","time":"2026-11-23T13:00:00.123Z","step":7}'

numbers = st.floats(allow_nan=True, allow_infinity=True)
by_kind = {
    "int": st.integers(-(2**63), 2**63),
    "int | None": st.none() | st.integers(0, 10**6),
    "float": numbers,
    "str": st.text() | st.sampled_from(["nan", "inf", "é\n\x00…"]),
    "bool": st.booleans(),
    "Mapping[str, float]": st.dictionaries(st.text(), numbers, max_size=4),
}
steps = st.tuples(st.integers(0, 2**40), st.lists(numbers, max_size=20)).map(
    lambda pair: StepsTaken(pair[0], pair[0] + len(pair[1]), tuple(pair[1]))
)


def events_of(kind: type[Event]) -> st.SearchStrategy[Event]:
    if kind is StepsTaken:
        return steps
    return st.builds(kind, **{field.name: by_kind[str(field.type)] for field in fields(kind)})


def bits(value: object) -> object:
    """A value with floats as their bits, so that NaN equals itself and -0.0 does not equal 0.0."""
    if isinstance(value, float):
        return "nan" if math.isnan(value) else struct.pack("<d", value)
    if isinstance(value, tuple):
        return tuple(map(bits, value))
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items()}
    return (type(value), value)


def write(path: Path, *events: Event, **settings: object) -> None:
    with Journal(path, clock=lambda: 1795438800.123, **settings) as journal:  # type: ignore[arg-type]
        for event in events:
            journal(event)


@given(event=st.sampled_from(WRITTEN).flatmap(events_of), time=st.integers(0, 4 * 10**12))
def test_round_trip(event: Event, time: int) -> None:
    """Every event, whatever it holds, is one line of strict ASCII JSON that reads back equal to the bit."""
    line = format_line(Record(time / 1000, event))
    assert line.isascii()
    assert "\n" not in line
    json.loads(line, parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))
    read = parse_line(line)
    assert type(read.event) is type(event)
    assert read.time == time / 1000
    for field in fields(event):
        assert bits(getattr(read.event, field.name)) == bits(getattr(event, field.name))


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (Interrupted(7), LINE),
        (
            StepsTaken(3, 7, (0.1, math.nan, -math.inf, 1e22)),
            '{"v":1,"event":"steps_taken","time":"2026-11-23T13:00:00.123Z","start":3,"stop":7,'
            '"losses":[0.1,"nan","-inf",1e+22]}',
        ),
        (
            RunEnded(90, "patience", None, {"valid_loss": 1}, 2.5),
            '{"v":1,"event":"run_ended","time":"2026-11-23T13:00:00.123Z","step":90,"reason":"patience",'
            '"best_epoch":null,"metrics":{"valid_loss":1.0},"seconds":2.5}',
        ),
        (Note("ø"), '{"v":1,"event":"note","time":"2026-11-23T13:00:00.123Z","text":"\\u00f8"}'),
    ],
)
def test_golden_lines(event: Event, line: str) -> None:
    """The format of version 1 stays as it is, to the letter."""
    assert format_line(Record(1795438800.123, event)) == line


def test_file_round_trip(tmp_path: Path) -> None:
    """A journal gives back the events in order, with their times, and nothing is torn."""
    path = tmp_path / "journal.jsonl"
    write(path, *EXAMPLE)
    records = read_journal(path)
    assert [record.event for record in records] == EXAMPLE
    assert {record.time for record in records} == {1795438800.123}
    assert len(records) == len(EXAMPLE)
    assert records.torn == ""


def test_passing_events_are_not_written(tmp_path: Path) -> None:
    """What only moves a bar is not written down."""
    path = tmp_path / "journal.jsonl"
    write(path, Progressed(1, 0, 0, 0, 9, 0.5, {}, 10.0), Validating(1, 2))
    assert path.read_bytes() == b""


def test_lines_are_there_at_once(tmp_path: Path) -> None:
    """An event can be read as soon as the call has returned, while the journal is open."""
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        journal(Note("one"))
        assert [record.event for record in read_journal(path)] == [Note("one")]
    journal.close()


def test_existing_journal_is_refused(tmp_path: Path) -> None:
    """A new run never mixes its events into those of another; an empty file is no journal."""
    path = tmp_path / "journal.jsonl"
    path.touch()
    write(path, Note("first"))
    before = path.read_bytes()
    with pytest.raises(
        RequestError, match=r"journal\.jsonl: there is a journal here already.*another folder"
    ):
        Journal(path)
    assert path.read_bytes() == before


def test_missing_folder_is_a_request_error(tmp_path: Path) -> None:
    """A journal that cannot be opened is told before the run begins, and so is one that cannot be read."""
    with pytest.raises(RequestError, match=r"cannot be opened.*No such file"):
        Journal(tmp_path / "missing" / "journal.jsonl")
    with pytest.raises(RequestError, match=r"cannot be read.*No such file"):
        read_journal(tmp_path / "journal.jsonl")


@given(cut=st.integers(1, len(LINE)))
def test_torn_last_line(cut: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    """However much of the last line is missing, all before it is read, and the rest is told."""
    path = tmp_path_factory.mktemp("torn") / "journal.jsonl"
    path.write_text(LINE + "\n" + LINE[:-cut])
    records = read_journal(path)
    assert [record.event for record in records] == [Interrupted(7)]
    assert records.torn == LINE[:-cut]


def test_last_line_without_its_end(tmp_path: Path) -> None:
    """A whole event of which only the line feed is missing is an event, and appending goes on after it."""
    path = tmp_path / "journal.jsonl"
    path.write_text(LINE)
    assert [record.event for record in read_journal(path)] == [Interrupted(7)]
    write(path, Note("more"), append=True)
    assert [record.event for record in read_journal(path)] == [Interrupted(7), Note("more")]


def test_append_cuts_half_a_line_off_and_says_so(tmp_path: Path) -> None:
    """Going on with a torn journal leaves a whole one, in which the cut is noted."""
    path = tmp_path / "journal.jsonl"
    path.write_text(LINE + "\n" + LINE[:30])
    write(path, Note("more"), append=True)
    notes = [record.event for record in read_journal(path)][1:]
    assert notes == [
        Note("the journal ended in half a line of 30 characters, which was cut off"),
        Note("more"),
    ]


def test_append_to_a_damaged_journal_is_refused(tmp_path: Path) -> None:
    """Nothing is added to a file that is no journal."""
    path = tmp_path / "notes.txt"
    path.write_text("milk\neggs\n")
    with pytest.raises(RunError, match=r"notes\.txt:1: not a line of a journal"):
        Journal(path, append=True)
    assert path.read_text() == "milk\neggs\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "not a line of a journal"),
        ('{"v":1,"event":"inter', "not a line of a journal"),
        ("[" * 100_000, "not a line of a journal"),
        ("[1]", "expected a JSON object, found list"),
        (LINE.replace('"v":1', '"v":2'), r"written in version 2 .* reads up to 1; update it"),
        (LINE.replace('"v":1', '"v":true'), '"v" is True'),
        (
            LINE.replace("interrupted", "interupted"),
            r"unknown event 'interupted'; did you mean \"interrupted\"\?",
        ),
        (LINE.replace("interrupted", "progressed"), "unknown event 'progressed'"),
        (LINE.replace("13:00:00.123Z", "13:00"), r'"time" is .*expected for example'),
        (LINE.replace("T13:", "T25:"), "interrupted: hour must be in"),
        (LINE.replace('"step":7', '"step":7.0'), "interrupted: step is 7.0; expected int"),
        (LINE.replace('"step":7', '"step":true'), "interrupted: step is True; expected int"),
        (LINE.replace('"step":7', '"step":NaN'), "NaN is not JSON"),
        (LINE.replace("step", "steps"), "missing are: step; unknown are: steps"),
        (
            '{"v":1,"event":"steps_taken","time":"2026-11-23T13:00:00.123Z","start":0,"stop":3,"losses":[1]}',
            r"StepsTaken\(0, 3\) carries 1 losses, expected 3",
        ),
    ],
)
def test_damage_is_told_with_its_place(line: str, message: str, tmp_path: Path) -> None:
    """A line that is not as the format says is an error with file and line, never skipped."""
    path = tmp_path / "journal.jsonl"
    path.write_text(f"{LINE}\n{line}\n{LINE}\n")
    with pytest.raises(RunError, match=r"journal\.jsonl:2: (?s:.*)" + message):
        read_journal(path)


def test_what_is_no_number_is_refused() -> None:
    """A field that holds something else than its type is a mistake of the caller, told by its name."""
    with pytest.raises(TypeError, match=r"StepsTaken\.losses is '0\.5', a str; expected float"):
        format_line(Record(0.0, StepsTaken(0, 1, ("0.5",))))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"Interrupted\.step is True, a bool; expected int"):
        format_line(Record(0.0, Interrupted(True)))


def test_full_disk_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line of which only a part could be written is taken back, so that the failure itself can be noted."""
    path = tmp_path / "journal.jsonl"

    class Filling:
        """A file that takes ten bytes, refuses once, and then has room again."""

        def __init__(self, file: object) -> None:
            self.file, self.left = file, [10, None]

        def write(self, data: bytes) -> int:
            if self.left and self.left.pop(0) is None:
                raise OSError(28, "No space left on device")
            return int(self.file.write(data[:10] if self.left else data))  # type: ignore[attr-defined]

        def __getattr__(self, name: str) -> object:
            return getattr(self.file, name)

    with Journal(path) as journal:
        journal(Note("one"))
        monkeypatch.setattr(journal, "_file", Filling(journal._file))
        with pytest.raises(RunError, match=r"could not be written \(No space left on device\)"):
            journal(Note("two"))
        journal(RunFailed(1, 0, "full"))
    assert [record.event for record in read_journal(path)] == [Note("one"), RunFailed(1, 0, "full")]


def test_events_are_frozen() -> None:
    """An observer cannot change an event."""
    with pytest.raises(FrozenInstanceError):
        Interrupted(1).step = 2  # type: ignore[misc]


def test_the_page_shows_a_real_journal(tmp_path: Path) -> None:
    """The example in docs/journal.md is what the writer writes."""
    path = tmp_path / "journal.jsonl"
    times = iter(range(0, 10_000, 250))
    with Journal(path, clock=lambda: 1795438800.123 + next(times) / 1000) as journal:
        for event in EXAMPLE:
            journal(event)
    shown = re.search(r"```jsonl\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert shown is not None
    assert shown.group(1) == path.read_text()


def test_the_page_names_every_event_and_field() -> None:
    """The table in docs/journal.md has one row for each written event, with its fields in order."""
    rows = re.findall(
        r"^\| `(\w+)` \| (`.*?`) \| .+ \|$",
        PAGE.read_text(encoding="utf-8").partition("## Events")[2],
        re.MULTILINE,
    )
    described = {name: re.findall(r"`(\w+)`", row) for name, row in rows}
    assert described == {
        name: [field.name for field in fields(kind)] for name, kind in module._WRITTEN.items()
    }
    assert set(module._WRITTEN.values()) == set(WRITTEN)
    assert f"| `v` | the version of the format: `{module.VERSION}` |" in PAGE.read_text(encoding="utf-8")


def test_the_journal_needs_no_torch() -> None:
    """A journal can be read where torch is not installed."""
    code = "import sys, lehr.journal; print(sorted({'torch', 'numpy', 'tqdm'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
