"""Progress: what a person sees on a terminal, in a file and in a notebook."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
import types
from collections.abc import Mapping
from importlib.machinery import ModuleSpec

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lehr.errors import RequestError
from lehr.events import (
    CheckpointFailed,
    CheckpointWritten,
    EpochEnded,
    Event,
    FreezeAudited,
    Interrupted,
    Note,
    Progressed,
    Resumed,
    RunEnded,
    RunFailed,
    RunStarted,
    StageEnded,
    StageStarted,
    StepsTaken,
    Validating,
)
from lehr.progress import progress
from lehr.wording import Part, fit, fold, prefix, width

BOTH = {"head": 1e-3, "backbone": 1e-4}
METRICS = {"valid_loss": 0.2871, "valid_accuracy": 0.94123}
RUN = RunStarted("0.1.0", "5f0c", 40, 4, 1437, 360, "cpu", "fp32", 2)
HEAD = StageStarted(0, "head", 0, 20, 0, 2, 6405, 2230277, {"head": 1e-3})
ALL = StageStarted(1, "all", 20, 40, 2, 2, 2230277, 2230277, BOTH)


def ended(epoch: int, stage: int, lr: Mapping[str, float], *, best: bool = True) -> EpochEnded:
    return EpochEnded(epoch, stage, 10 * epoch + 10, 0.31249, METRICS, lr, 3.21, 512.4, best)


def small_run(*, lr: Mapping[str, float] = BOTH) -> list[Event]:
    """A run of two stages with two epochs each, as the loop tells of it."""
    events: list[Event] = [RUN]
    for stage in (HEAD, ALL):
        events.append(stage)
        for epoch in range(stage.first_epoch, stage.first_epoch + 2):
            start = 10 * epoch
            for step in range(start + 2, start + 11, 2):
                events.append(Progressed(step, stage.stage, epoch, start, start + 10, 0.312, lr, 512.4))
            events.append(StepsTaken(start, start + 10, (0.3,) * 10))
            events.extend(Validating(done, 360) for done in (100, 360))
            events.append(ended(epoch, stage.stage, lr, best=epoch != 3))
        events.append(StageEnded(stage.stage, 10 * epoch + 10, "length", None))
    return [*events, RunEnded(40, "length", 2, METRICS, 83.0)]


class Terminal(io.StringIO):
    """A stream that says it is a terminal; its width comes from COLUMNS."""

    encoding = "utf-8"  # type: ignore[assignment]

    def isatty(self) -> bool:
        return True


class AsciiTerminal(Terminal):
    """A terminal that can show ASCII only, and fails loudly on all else."""

    encoding = "ascii"  # type: ignore[assignment]

    def write(self, text: str) -> int:
        text.encode("ascii")
        return super().write(text)


def drawn(
    events: list[Event],
    *,
    columns: int = 80,
    stream: io.StringIO | None = None,
    mode: str = "auto",
    **env: str,
) -> str:
    stream = Terminal() if stream is None else stream
    observer = progress(stream, mode=mode, environ={"COLUMNS": str(columns), **env}, clock=Ticks())  # type: ignore[arg-type]
    for event in events:
        observer(event)
    return stream.getvalue()


class Ticks:
    """A clock that goes on by a second each time it is looked at."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def screen(output: str, columns: int) -> list[str]:
    """What stands on a terminal after `output`: carriage returns overwrite, lines that are too long wrap."""
    lines: list[list[str]] = [[]]
    at = 0
    for character in re.sub(r"\x1b\[\d+m", "", output):
        assert character != "\x1b", "an escape code that is no colour"
        if character == "\n":
            lines.append([])
            at = 0
        elif character == "\r":
            at = 0
        else:
            assert at + width(character) <= columns, f"wraps: {''.join(lines[-1])!r}"
            lines[-1][at : at + 1] = [character]
            at += 1
    return ["".join(line).rstrip() for line in lines]


# In a file or a pipe


def test_lines_in_a_file() -> None:
    """A file gets one plain line an epoch, with everything in it, and a line where something else happens."""
    assert drawn(small_run(), stream=io.StringIO()).splitlines() == [
        "4 epochs, 40 steps · 1,437 samples, 360 to validate · cpu fp32",
        "stage 1/2 · head · 2 epochs · trains 6,405 of 2,230,277 parameters (0.3 %)",
        "epoch 1/4 · train_loss=0.3125 valid_loss=0.2871 valid_accuracy=0.9412"
        " · lr head=1.0e-03 backbone=1.0e-04 · 512 samples/s · 3.2 s · best",
        "epoch 2/4 · train_loss=0.3125 valid_loss=0.2871 valid_accuracy=0.9412"
        " · lr head=1.0e-03 backbone=1.0e-04 · 512 samples/s · 3.2 s · best",
        "stage 2/2 · all · 2 epochs · trains 2,230,277 of 2,230,277 parameters (100 %)",
        "epoch 3/4 · train_loss=0.3125 valid_loss=0.2871 valid_accuracy=0.9412"
        " · lr head=1.0e-03 backbone=1.0e-04 · 512 samples/s · 3.2 s · best",
        "epoch 4/4 · train_loss=0.3125 valid_loss=0.2871 valid_accuracy=0.9412"
        " · lr head=1.0e-03 backbone=1.0e-04 · 512 samples/s · 3.2 s",
        "done · 40 steps in 1 min 23 s · best epoch 3 · valid_loss=0.2871 valid_accuracy=0.9412",
    ]


@pytest.mark.parametrize("env", [{}, {"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_a_file_gets_no_control_characters(env: dict[str, str]) -> None:
    """What goes to a file has no carriage return and no escape code, nor has what goes to a dumb terminal."""
    stream = Terminal() if env.get("TERM") == "dumb" else io.StringIO()
    text = drawn(small_run(), stream=stream, **env)
    assert "\r" not in text
    assert "\x1b" not in text
    assert len(re.findall("^epoch", text, re.MULTILINE)) == 4


def test_every_line_is_flushed() -> None:
    """A line in a file is there when the call returns, so that the file can be followed."""
    raw = io.BytesIO()
    observer = progress(io.TextIOWrapper(raw, "utf-8"), environ={})
    observer(ended(0, 0, {}))
    assert raw.getvalue().endswith(b"best\n")


def test_a_file_is_never_cut() -> None:
    """The width of a terminal has nothing to do with what is written to a file."""
    note = "a word " * 40
    assert drawn([Note(note)], stream=io.StringIO(), columns=40) == f"! {note}\n"


# On a terminal


def test_the_bar() -> None:
    """A wide bar shows stage, epoch, loss, metric, each group's rate, speed and the time that is left."""
    events = [
        RUN,
        HEAD,
        ended(0, 0, BOTH),
        ALL,
        *(Progressed(s, 1, 2, 20, 30, 0.312, BOTH, 512.4) for s in (24, 26)),
    ]
    assert screen(drawn(events, columns=160), 160)[-1] == (
        "stage 2/2 all · epoch 3/4 |██████████████████            |  60% loss=0.3120 valid_accuracy=0.9412"
        " lr head=1.0e-03 backbone=1.0e-04 · 512 samples/s · 00:02 left"
    )


@pytest.mark.parametrize(
    ("columns", "bar"),
    [
        (40, "stage 2/2 all · epoch 3/4 loss=0.3120"),
        (60, "stage 2/2 all · epoch 3/4 |████████▍     |  60% loss=0.3120"),
        (80, "stage 2/2 all · epoch 3/4 |███████▏    |  60% loss=0.3120 valid_accuracy=0.9412"),
        (
            120,
            "stage 2/2 all · epoch 3/4 |████▊   | loss=0.3120 valid_accuracy=0.9412"
            " lr head=1.0e-03 backbone=1.0e-04 · 512 samples/s",
        ),
    ],
)
def test_narrow_terminals(columns: int, bar: str) -> None:
    """On a narrow terminal the rates go first, then the speed, then the metric, and then the bar itself."""
    events = [RUN, ALL, ended(1, 0, BOTH), Progressed(26, 1, 2, 20, 30, 0.312, BOTH, 512.4)]
    assert screen(drawn(events, columns=columns), columns)[-1] == bar


@pytest.mark.parametrize("columns", [20, 40, 57, 80, 120, 300])
def test_after_a_run_only_lines_are_left(columns: int) -> None:
    """However wide the terminal is, no line wraps, and no bar or half a line is left when the run is done."""
    rows = screen(drawn(small_run(), columns=columns), columns)
    assert rows[-1] == ""
    assert not any("|" in row or "%" in row.replace("0.3 %", "").replace("100 %", "") for row in rows)
    assert sum(row.startswith("epoch") and "/4 ·" in row for row in rows) >= 4


def test_epochs_too_short_for_a_bar() -> None:
    """An epoch that never sent its progress still leaves its line."""
    assert screen(drawn([RUN, HEAD, ended(0, 0, {}), ended(1, 0, {})], columns=80), 80)[2:4] == [
        "epoch 1/4 · train_loss=0.3125 valid_loss=0.2871 valid_accuracy=0.9412 · best",
        "epoch 2/4 · train_loss=0.3125 valid_loss=0.2871 valid_accuracy=0.9412 · best",
    ]


def test_validation_has_its_own_bar() -> None:
    """While the validation runs, the bar says so and counts its samples."""
    events = [RUN, ALL, Progressed(30, 1, 2, 20, 30, 0.312, BOTH, 512.4), Validating(90, 360)]
    assert screen(drawn(events), 80)[-1] == (
        "stage 2/2 all · epoch 3/4 · validating |█████▎               |  25% loss=0.3120"
    )


def test_one_drawing_an_event() -> None:
    """The terminal is written to once for a `Progressed`, and never for the losses of single steps."""
    stream = Terminal()
    observer = progress(stream, environ={"COLUMNS": "80"}, clock=Ticks())
    observer(Progressed(1, 0, 0, 0, 9, 0.5, {}, 10.0))
    before = stream.getvalue()
    observer(Progressed(5, 0, 0, 0, 9, 0.5, {}, 10.0))
    after = stream.getvalue()
    assert after.removeprefix(before).count("\r") == 1
    observer(StepsTaken(0, 5, (0.5,) * 5))
    assert stream.getvalue() == after
    observer.close()


def test_a_note_goes_above_the_bar() -> None:
    """A note leaves the bar as it is, below."""
    bar = Progressed(26, 1, 2, 20, 30, 0.312, BOTH, 512.4)
    rows = screen(drawn([RUN, ALL, bar, Note("one\ntwo"), bar]), 80)
    assert rows[-3:-1] == ["! one", "  two"]
    assert rows[-1].startswith("stage 2/2 all · epoch 3/4 |")


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (
            RunFailed(26, 1, "ValueError: no\n  such thing"),
            "failed in stage 2 after 26 steps: ValueError: no such thing",
        ),
        (Interrupted(1), "interrupted after 1 step"),
        (
            StageEnded(1, 26, "patience", 1),
            "stage 2 ended early (patience) · weights of epoch 2 restored",
        ),
    ],
)
def test_what_ends_early_takes_the_bar_away(event: Event, line: str) -> None:
    """A failure or an interruption leaves one whole line where the bar was."""
    rows = screen(drawn([RUN, ALL, Progressed(26, 1, 2, 20, 30, 0.312, BOTH, 512.4), event]), 80)
    assert rows[-2:] == [line, ""]
    assert not any("|" in row for row in rows)


def test_close_takes_the_bar_away() -> None:
    """`close` leaves the cursor on an empty line, and may be called twice."""
    stream = Terminal()
    observer = progress(stream, environ={"COLUMNS": "80"}, clock=Ticks())
    observer(Progressed(1, 0, 0, 0, 9, 0.5, {}, 10.0))
    assert screen(stream.getvalue(), 80) != [""]
    observer.close()
    observer.close()
    assert screen(stream.getvalue(), 80) == [""]


def test_colours_only_where_they_are_wanted() -> None:
    """Colours go to a terminal, and not where NO_COLOR is set; an empty NO_COLOR does not count."""
    assert "\x1b[33m! careful\x1b[0m\n" in drawn([Note("careful")])
    assert "\x1b[33m! careful\x1b[0m\n" in drawn([Note("careful")], NO_COLOR="")
    assert "\x1b" not in drawn(small_run(), NO_COLOR="1")


def test_many_groups_are_shown_as_a_span() -> None:
    """The rates of many groups are shown by their lowest and highest."""
    lr = {f"layer {index}": 1e-3 * 0.5**index for index in range(12)}
    assert " · lr 4.9e-07…1.0e-03 (12 groups) · " in drawn([ended(0, 0, lr)], stream=io.StringIO())


# A run that goes on


def test_a_resumed_run_says_where_it_goes_on() -> None:
    """Where a run goes on is told below how long it is, and its bar begins in the epoch it goes on in."""
    events = [Resumed(34, 1, 3, 99), RUN, ALL, Validating(90, 360)]
    *lines, bar = screen(drawn(events, columns=100), 100)
    assert lines == [
        "4 epochs, 40 steps · 1,437 samples, 360 to validate · cpu fp32",
        "resumed at step 34 of 40 · epoch 4 of 4",
        "stage 2/2 · all · 2 epochs · trains 2,230,277 of 2,230,277 parameters (100 %)",
    ]
    assert bar.startswith("stage 2/2 all · epoch 4/4 · validating |")
    assert "resumed" not in drawn([*events, RUN, ALL]).partition("stage 2/2 ·")[2]


def test_a_run_of_which_only_the_end_was_missing() -> None:
    """A run that is resumed after its last epoch has no epoch to go on in, and none is told."""
    lines = drawn([Resumed(40, 1, 4, 99), RUN, ALL], stream=io.StringIO()).splitlines()
    assert lines[1] == "resumed at step 40 of 40"


def test_a_bar_that_begins_in_an_epoch() -> None:
    """A bar that begins in the middle of an epoch shows how far the epoch is, and the time by its own speed."""
    events = [Resumed(26, 1, 2, 99), RUN, ALL]
    events += [Progressed(step, 1, 2, 20, 30, 0.312, {}, 512.4) for step in (26, 27)]
    first, second = (screen(drawn(events[:end], columns=100), 100)[-1] for end in (-1, None))
    assert re.search(r"epoch 3/4 \|█+[▏▎▍▌▋▊▉]? +\|  60% loss=0.3120 · 512 samples/s$", first)
    assert re.search(r"epoch 3/4 \|█+[▏▎▍▌▋▊▉]? +\|  70% loss=0.3120 · 512 samples/s · 00:03 left$", second)
    share = first.count("█") / len(first.split("|")[1])
    assert 0.5 < share <= 0.6


def test_a_second_resume_is_told_anew() -> None:
    """A resume that is followed by nothing but another is not told at the wrong place."""
    lines = drawn([Resumed(3, 0, 0, 9), Resumed(5, 0, 0, 9), RUN, HEAD], stream=io.StringIO()).splitlines()
    assert [line for line in lines if "resumed" in line] == ["resumed at step 5 of 40 · epoch 1 of 4"]


@pytest.mark.parametrize("mode", ["bar", "lines"])
def test_what_goes_well_is_not_told(mode: str) -> None:
    """Checkpoints that were written, and freezes that held, draw nothing."""
    quiet = [CheckpointWritten(26, 10**8, 0.01, 0.5), FreezeAudited(1, 26, 10, 2, "9b2f")]
    assert drawn([RUN, *quiet, ALL], mode=mode) == drawn([RUN, ALL], mode=mode)


def test_a_checkpoint_that_failed_is_told_above_the_bar() -> None:
    """A checkpoint that could not be written is told in red with what happens next, and the bar goes on below."""
    bar = Progressed(26, 1, 2, 20, 30, 0.312, BOTH, 512.4)
    failed = CheckpointFailed(1200, "no space\nleft on \x1bdevice", 30.0)
    text = drawn([RUN, ALL, bar, failed, bar], columns=130)
    assert "\x1b[31m! the checkpoint" in text
    rows = screen(text, 130)
    assert rows[-2] == (
        r"! the checkpoint of step 1,200 could not be written: no space left on \x1bdevice"
        " · training goes on, next try in 30.0 s"
    )
    assert rows[-1].startswith("stage 2/2 all · epoch 3/4 |")


# Names


def test_names_are_shown_escaped_and_cut() -> None:
    """No control character in a name reaches the terminal, and a very long name ends in an ellipsis."""
    label = "\x1b[2J\r\u202eevil{bar}" + "e" * 200
    events: list[Event] = [
        RUN,
        StageStarted(0, label, 0, 9, 0, 1, 1, 2, {}),
        Progressed(1, 0, 0, 0, 9, 0.5, {"\x07" * 99: 1.0}, 1.0),
        EpochEnded(0, 0, 9, 0.5, {"\x1b" * 99: 0.5}, {}, 1.0, 1.0, False),
        Progressed(11, 0, 1, 9, 18, 0.5, {}, 1.0),
        Note("\x1b]0;title\x07 \ud800"),
        RunFailed(1, 0, "\x1b[31mred"),
    ]
    text = drawn(events, columns=200, NO_COLOR="1")
    rows = screen(text, 200)
    assert not re.search(r"[\x00-\x09\x0b\x0c\x0e-\x1f\x7f\u202e\ud800]", text)
    assert r"stage 1/2 \x1b[2J\r\u202eevil(bar… · epoch 1/4 |" in text
    assert r"! \x1b]0;title\x07 \ud800" in rows
    assert r"failed in stage 1 after 1 step: \x1b[31mred" in rows
    assert any(re.search(r"train_loss=0\.5000 (\\x1b)+.{0,3}…=0\.5000", row) for row in rows)


def test_an_ascii_terminal() -> None:
    """A stream that cannot show our signs gets others, and names it cannot show are escaped."""
    label = StageStarted(0, "tête…", 0, 9, 0, 1, 1, 2, {})
    text = drawn([RUN, label, *small_run(), Note("Blütenstände " * 9)], stream=AsciiTerminal(), columns=60)
    assert r"stage 1/2 - t\xeate\u2026 - 1 epoch - trains 1 of" in text
    assert "epoch 4/4 |####" in text
    assert r"! Bl\xfctenst\xe4nde" in text
    screen(text, 60)
    assert "512 samples/s" in drawn(small_run(), stream=AsciiTerminal(), columns=200)


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "cp437", "utf-16", "utf-8"])
def test_any_encoding(encoding: str) -> None:
    """No encoding of a stream makes a run fail."""
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding, errors="strict")
    observer = progress(stream, mode="bar", environ={"COLUMNS": "80"}, clock=Ticks())
    for event in (*small_run(), Note("花 é \ud800")):
        observer(event)
    stream.flush()
    assert "! " in raw.getvalue().decode(encoding)


# Who draws


@pytest.mark.parametrize(
    ("env", "draws"),
    [
        ({"RANK": "1", "LOCAL_RANK": "0"}, False),
        ({"RANK": "0", "LOCAL_RANK": "0"}, True),
        ({"LOCAL_RANK": "3"}, False),
        ({"SLURM_PROCID": "2", "WORLD_SIZE": "4"}, False),
        ({"SLURM_PROCID": "2"}, True),
        ({}, True),
    ],
)
@pytest.mark.parametrize("mode", ["auto", "bar", "lines"])
def test_only_rank_0_draws(env: dict[str, str], draws: bool, mode: str) -> None:
    """Of several processes one draws; a sweep under Slurm is not one run of several processes."""
    assert bool(drawn(small_run(), mode=mode, **env)) == draws


def test_off() -> None:
    """With mode "off" nothing is drawn."""
    assert drawn(small_run(), mode="off") == ""


def test_an_unknown_mode() -> None:
    """A mode that does not exist is refused with the nearest one."""
    with pytest.raises(RequestError, match=r"mode is 'line'; did you mean \"lines\".*auto, bar, lines, off"):
        progress(mode="line")  # type: ignore[arg-type]


def test_without_standard_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program without a console has no standard error, and runs all the same."""
    monkeypatch.setattr(sys, "stderr", None)
    progress(environ={})(RUN)


def test_a_terminal_that_goes_away() -> None:
    """When the terminal is closed the run goes on, and nothing is written any more."""

    class Gone(Terminal):
        calls = 0

        def write(self, text: str) -> int:
            self.calls += 1
            raise BrokenPipeError(32, f"Broken pipe: {text!r}")

    stream = Gone()
    drawn(small_run(), stream=stream)
    assert stream.calls == 1


# The real thing


@pytest.mark.parametrize("columns", [40, 120])
def test_a_real_terminal(columns: int) -> None:
    """On a pseudo-terminal the width is the terminal's own, and no line reaches it."""
    primary, secondary = pty.openpty()
    fcntl.ioctl(secondary, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    pieces: list[bytes] = []

    def listen() -> None:
        while piece := os.read(primary, 4096):
            pieces.append(piece)
            if b"\x04" in piece:
                return

    listener = threading.Thread(target=listen)
    listener.start()
    with open(secondary, "w", encoding="utf-8") as stream:  # noqa: PTH123 - a file descriptor
        observer = progress(stream, environ={}, clock=Ticks())
        for event in small_run():
            observer(event)
        stream.write("\x04")
        stream.flush()
        listener.join(timeout=10)
    os.close(primary)
    text = b"".join(pieces).decode().rstrip("\x04").replace("\r\n", "\n")
    rows = screen(text, columns - 1)
    assert rows[-1] == ""
    assert max(map(len, rows)) > columns // 2
    assert any("\r" in line and "loss=" in line for line in text.split("\n"))


def test_a_notebook_gets_widgets(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In a notebook the bar is tqdm.auto's, without a width, and the lines go to standard output."""
    made: list[dict[str, object]] = []

    class Widget:
        def __init__(self, **settings: object) -> None:
            made.append(settings)
            self.n, self.total, self.closed_at = settings["initial"], settings["total"], None

        def update(self, steps: int) -> None:
            self.n += steps  # type: ignore[operator]

        def close(self) -> None:
            assert self.n == self.total, "a notebook keeps an unfinished bar, in red"

    shell = types.SimpleNamespace(config={"IPKernelApp": {}})
    widgets = types.ModuleType("ipywidgets")
    widgets.__spec__ = ModuleSpec("ipywidgets", None)
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "ipywidgets", widgets)
    monkeypatch.setitem(sys.modules, "tqdm.auto", types.SimpleNamespace(tqdm=Widget))  # type: ignore[arg-type]
    observer = progress(environ={}, clock=Ticks())
    for event in small_run():
        observer(event)
    assert [bar["ncols"] for bar in made] == [None] * 8  # four epochs, four validations
    assert "{bar}" in str(made[0]["bar_format"])
    captured = capsys.readouterr()
    assert captured.out.count("· 512 samples/s · 3.2 s") == 4
    assert captured.err == ""


def test_tqdm_auto_is_not_imported_outside_a_notebook() -> None:
    """On a terminal nothing of notebooks is loaded, nor torch."""
    code = (
        "import io, sys; from lehr.progress import progress; from lehr.events import Progressed\n"
        "progress(io.StringIO(), mode='bar')(Progressed(1, 0, 0, 0, 2, 0.5, {}, 1.0))\n"
        "print(sorted({'tqdm.auto', 'tqdm.notebook', 'torch', 'numpy', 'IPython'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# The parts


@given(text=st.text(alphabet="ab é花·", max_size=80), room=st.integers(10, 50))
def test_folding_keeps_everything_and_the_width(text: str, room: int) -> None:
    """A folded text fits its lines, and says the same."""
    lines = fold(text, room)
    assert all(width(line) <= room for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")


@given(text=st.text(max_size=30), room=st.integers(0, 30))
def test_prefix(text: str, room: int) -> None:
    """A prefix is as long as it can be without taking more columns than there are."""
    end = prefix(text, room)
    assert width(text[:end]) <= room
    assert end == len(text) or width(text[: end + 1]) > room


@given(
    parts=st.lists(
        st.builds(Part, st.integers(1, 9), st.text("x", max_size=9), st.text("x", max_size=4)), max_size=6
    ),
    room=st.integers(5, 40),
)
def test_parts_fit(parts: list[Part], room: int) -> None:
    """What is chosen of a line's parts is never wider than the line."""
    assert width(fit([Part(0, "lead"), *parts], room)) <= room
