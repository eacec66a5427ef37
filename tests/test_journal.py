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

from lehr.errors import RequestError, RunError
from lehr.event_json import VERSION, WRITTEN, format_line, parse_line
from lehr.events import (
    CacheClosed,
    CheckpointFailed,
    CheckpointWritten,
    EpochEnded,
    Event,
    FreezeAudited,
    Interrupted,
    Note,
    PrefixCached,
    Progressed,
    Record,
    Resumed,
    RunEnded,
    RunFailed,
    RunStarted,
    StageEnded,
    StageStarted,
    StepsTaken,
    Validating,
)
from lehr.journal import Journal, effective, read_journal

PAGE = Path(__file__).parents[1] / "docs" / "journal.md"

RUN = RunStarted(
    "0.1.0",
    "5f0c2a9e7d41b86320f9ce158a3d7b640c92e5f17ab8364d0e71c95f2b8ad463",
    4,
    2,
    64,
    32,
    "cpu",
    "fp32",
    2,
)
ALL = StageStarted(1, "all", 2, 4, 1, 1, 24490, 24490, {"head": 1e-3, "backbone": 1e-4})
EXAMPLE = [
    RUN,
    StageStarted(0, "head", 0, 2, 0, 1, 650, 24490, {"head": 1e-3}),
    PrefixCached(0, 0, "train", "layer3", 0.805, 401408, 400, 500, "memory", "fx", True),
    StepsTaken(0, 2, (2.302585092994046, 2.1)),
    EpochEnded(
        0, 0, 2, 2.201, {"valid_loss": 2.05, "valid_accuracy": 0.25}, {"head": 1e-3}, 0.41, 160.0, True
    ),
    CacheClosed(0, 2, "train", 400, 3600, 81.25),
    FreezeAudited(0, 2, 12, 4, "9b2f6c0d51e8a734"),
    StageEnded(0, 2, "length", 0),
    CheckpointWritten(2, 198432, 0.002, 0.031),
    ALL,
    StepsTaken(2, 3, (1.75,)),
    Resumed(2, 1, 1, 8),
    RUN,
    ALL,
    Note("the norms of the backbone are trained without weight decay"),
    StepsTaken(2, 4, (1.75, math.inf)),
    CheckpointFailed(4, "no space left on device", 30.0),
    RunFailed(4, 1, "the loss is inf at step 3; try a lower rate"),
]

KINDS = [kind for kind in get_args(Event) if kind not in (Progressed, Validating)]
LINE = '{"v":4,"event":"interrupted","time":"2026-11-23T13:00:00.123Z","step":7}'

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


@given(event=st.sampled_from(KINDS).flatmap(events_of), time=st.integers(0, 4 * 10**12))
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
            '{"v":4,"event":"steps_taken","time":"2026-11-23T13:00:00.123Z","start":3,"stop":7,'
            '"losses":[0.1,"nan","-inf",1e+22]}',
        ),
        (
            RunEnded(90, "patience", None, {"valid_loss": 1}, 2.5),
            '{"v":4,"event":"run_ended","time":"2026-11-23T13:00:00.123Z","step":90,"reason":"patience",'
            '"best_epoch":null,"metrics":{"valid_loss":1.0},"seconds":2.5}',
        ),
        (
            Resumed(1200, 1, 4, 99),
            '{"v":4,"event":"resumed","time":"2026-11-23T13:00:00.123Z",'
            '"step":1200,"stage":1,"epoch":4,"records":99}',
        ),
        (Note("ø"), '{"v":4,"event":"note","time":"2026-11-23T13:00:00.123Z","text":"\\u00f8"}'),
    ],
)
def test_golden_lines(event: Event, line: str) -> None:
    """The format of version 2 stays as it is, to the letter."""
    assert format_line(Record(1795438800.123, event)) == line


def test_version_1_is_read() -> None:
    """A line of version 1, which had the same fields, is read as it always was."""
    line = (
        '{"v":1,"event":"epoch_ended","time":"2026-11-23T13:00:00.123Z","epoch":0,"stage":0,"step":2,"train_loss":2.2,'
        '"metrics":{"valid_loss":"nan"},"lr":{},"seconds":1.5,"samples_per_second":9.0,"best":false}'
    )
    event = parse_line(line).event
    assert isinstance(event, EpochEnded)
    assert (event.step, event.train_loss, event.seconds) == (2, 2.2, 1.5)
    assert math.isnan(event.metrics["valid_loss"])


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


@pytest.mark.parametrize("text", ["milk\neggs\n", "milk", "\x00" * 40, f"[{LINE}]\n"])
def test_append_to_what_is_no_journal_is_refused(text: str, tmp_path: Path) -> None:
    """Nothing is added to a file that has no line of a journal, nor is anything taken away from it."""
    path = tmp_path / "notes.txt"
    path.write_text(text)
    with pytest.raises(RunError, match=r"notes\.txt: nothing in this file is a line of a journal.*move it"):
        Journal(path, append=True)
    assert path.read_text() == text


@pytest.mark.parametrize("length", [1, 5, 30])
def test_append_to_a_journal_that_was_killed_in_its_first_line(length: int, tmp_path: Path) -> None:
    """A run that was killed while it wrote its very first line can be gone on with."""
    path = tmp_path / "journal.jsonl"
    path.write_text(LINE[:length])
    with Journal(path, append=True) as journal:
        assert journal.records == 1  # the note
    assert [type(record.event) for record in read_journal(path)] == [Note]


DAMAGED = "".join((LINE, "\n", LINE[:20], "\x00\xff", LINE[22:], "\n", "\n", LINE, "\n", LINE[:30]))


def test_a_damaged_journal_is_gone_on_with(tmp_path: Path) -> None:
    """Damaged lines are left as they are, each is noted, and what follows is added behind them."""
    path = tmp_path / "journal.jsonl"
    path.write_text(DAMAGED)
    with Journal(path, append=True) as journal:
        assert journal.records == 4 + 3
        journal(Interrupted(9))
        assert journal.records == 8
        noted = [note.text for note in journal.notes]
    assert noted == [
        "line 2 of the journal is damaged; it is left as it is, and what it said is lost",
        "line 3 of the journal is damaged; it is left as it is, and what it said is lost",
        "the journal ended in half a line of 30 characters, which was cut off",
    ]
    assert path.read_text().startswith(DAMAGED.removesuffix(LINE[:30]))
    with pytest.raises(RunError, match=r"journal\.jsonl:2: not a line of a journal"):
        read_journal(path)
    read = read_journal(path, damaged="note")
    assert read.damaged == (2, 3)
    assert [record.event for record in read][3:] == [Interrupted(7), *map(Note, noted), Interrupted(9)]
    assert "journal.jsonl:2: not a line" in getattr(read.records[1].event, "text", "")
    assert len(read) == len(path.read_bytes().splitlines()) == 8


def test_records_are_counted(tmp_path: Path) -> None:
    """`records` counts what is written, from the first line of the file on, and no passing event."""
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        assert journal.records == 0
        journal(Note("one"))
        journal(Validating(1, 2))
        assert journal.records == 1
    with Journal(path, append=True) as journal:
        assert journal.records == 1
        journal(Note("two"))
        assert journal.records == 2
    assert len(read_journal(path)) == 2


def test_a_closed_journal_takes_no_events(tmp_path: Path) -> None:
    """An event after `close` is a mistake of the caller, and is not swallowed."""
    journal = Journal(tmp_path / "journal.jsonl")
    journal.close()
    journal.flush()
    journal.sync()
    with pytest.raises(ValueError, match=r"the journal is closed, and Note\(text='late'\) came after"):
        journal(Note("late"))


@given(
    kept=st.lists(st.integers(0, 99), max_size=8),
    lost=st.lists(st.integers(100, 199), max_size=8),
    redone=st.lists(st.integers(200, 299), max_size=8),
)
def test_what_was_lost_does_not_count(kept: list[int], lost: list[int], redone: list[int]) -> None:
    """After a resume, what stood before its checkpoint counts, and what follows it; what lies between does not."""
    resumed = Resumed(0, 0, 0, len(kept))
    told = [*map(Interrupted, kept + lost), resumed, *map(Interrupted, redone)]
    counted = [*map(Interrupted, kept), resumed, *map(Interrupted, redone)]
    assert [record.event for record in effective([Record(0.0, event) for event in told])] == counted


@given(data=st.data())
def test_many_resumes(data: st.DataObject) -> None:
    """Whatever is killed and resumed from whatever checkpoint, what counts is what was known there, and what
    was done since.
    """
    raw: list[Record] = []
    known: list[tuple[int, list[Record]]] = [(0, [])]  # at each checkpoint: records so far, those that count
    counted: list[Record] = []
    for number, what in enumerate(data.draw(st.lists(st.sampled_from("sssck"), max_size=40))):
        event: Event = Interrupted(number)
        if what == "c":
            known.append((len(raw), list(counted)))
            event = CheckpointWritten(number, 1, 0.0, 0.0)
        elif what == "k":  # from any checkpoint, for newer ones may be damaged
            records, then = data.draw(st.sampled_from(known))
            counted = list(then)
            event = Resumed(number, 0, 0, records)
        raw.append(Record(float(number), event))
        counted.append(raw[-1])
    assert list(effective(raw)) == counted


@given(records=st.integers(-(2**70), 2**70))
def test_a_resume_that_counts_wrong_harms_nothing(records: int) -> None:
    """A number of records that cannot be, as in a journal that was edited, loses nothing after it."""
    told = [Record(0.0, event) for event in (Note("a"), Resumed(0, 0, 0, records), Note("b"))]
    assert effective(told)[-2:] == tuple(told[1:])


def test_effective_of_the_example() -> None:
    """In the page's example the step that was lost is left out, and done again."""
    records = [Record(0.0, event) for event in EXAMPLE]
    assert [record.event for record in effective(records)] == EXAMPLE[:8] + EXAMPLE[11:]


def test_a_clock_that_goes_backwards(tmp_path: Path) -> None:
    """A journal is written and read in order whatever the clock says, and the times are those of the clock."""
    path = tmp_path / "journal.jsonl"
    times = iter([5e9, 1e9, 1e6, 9e8])
    with Journal(path, clock=lambda: next(times)) as journal:
        for step in range(4):
            journal(Interrupted(step))
    read = read_journal(path)
    assert [record.event for record in read] == [Interrupted(step) for step in range(4)]
    assert [record.time for record in read] == [5e9, 1e9, 1e6, 9e8]


@given(
    data=st.binary(max_size=300) | st.lists(st.sampled_from(LINE), max_size=200).map("".join).map(str.encode)
)
def test_any_bytes(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Whatever is in the file, it is read or refused in words, and with "note" it is always read."""
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(data)
    read = read_journal(path, damaged="note")
    assert len(read) in (data.count(b"\n"), data.count(b"\n") + 1)
    if read.damaged:
        with pytest.raises(RunError, match=rf"any\.jsonl:{read.damaged[0]}: "):
            read_journal(path)
    else:
        assert read_journal(path) == read


@given(at=st.integers(0, len(LINE) - 1), bit=st.integers(0, 7))
def test_a_flipped_bit(at: int, bit: int) -> None:
    """A line with a flipped bit is refused in words, or is a line of a journal: never something else."""
    line = bytearray(LINE.encode())
    line[at] ^= 1 << bit
    try:
        record = parse_line(bytes(line), where="here")
    except RunError as error:
        assert str(error).startswith("here: ")  # noqa: PT017 - either is right
    else:
        assert isinstance(record.event, Interrupted)


def test_a_message_about_a_damaged_line_has_an_end() -> None:
    """A damaged line of a megabyte is refused in a message that can be read."""
    with pytest.raises(RunError) as caught:
        parse_line(LINE.replace("interrupted", "x" * 1_000_000))
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "not a line of a journal"),
        ('{"v":4,"event":"inter', "not a line of a journal"),
        ("[" * 100_000, "not a line of a journal"),
        ("[1]", "expected a JSON object, found list"),
        (LINE.replace('"v":4', '"v":5'), r"written in version 5 .* reads up to 4; update it"),
        (LINE.replace('"v":4', '"v":true'), '"v" is True'),
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
            '{"v":4,"event":"steps_taken","time":"2026-11-23T13:00:00.123Z","start":0,"stop":3,"losses":[1]}',
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
    assert described == {name: [field.name for field in fields(kind)] for name, kind in WRITTEN.items()}
    assert set(WRITTEN.values()) == set(KINDS)
    assert f"| `v` | the version of the format: `{VERSION}` |" in PAGE.read_text(encoding="utf-8")


def test_the_journal_needs_no_torch() -> None:
    """A journal can be read where torch is not installed."""
    code = "import sys, lehr.journal; print(sorted({'torch', 'numpy', 'tqdm'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
