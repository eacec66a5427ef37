"""`lehr.bar`: what it keeps, what it draws, how often, and what it leaves behind."""

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
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm

import lehr
from lehr.bars import Bar
from lehr.errors import RequestError
from lehr.wording import width


class Terminal(io.StringIO):
    """A stream that says it is a terminal; its width comes from COLUMNS."""

    encoding = "utf-8"  # type: ignore[assignment]

    def isatty(self) -> bool:
        return True


class Clock:
    """Seconds that pass only when a test says so, and the number of times they were asked for."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Watched:
    """A value that counts how often it is made a number, and one that is made a text."""

    def __init__(self, value: float = 0.5) -> None:
        self.value, self.read = value, 0

    def item(self) -> float:
        self.read += 1
        return self.value


def drawings(output: str) -> list[str]:
    """Every state that a bar on a terminal was drawn in."""
    return [
        piece.rstrip() for piece in re.split(r"[\r\n]", re.sub(r"\x1b\[[A-Z]", "", output)) if piece.strip()
    ]


def made(
    stream: io.StringIO, clock: Clock, iterable: Any = None, *said: Any, columns: int = 80, **more: Any
) -> Bar[Any]:
    return lehr.bar(iterable, *said, stream=stream, clock=clock, environ={"COLUMNS": str(columns)}, **more)


def test_everything_comes_through() -> None:
    """Going through a bar gives every item once, in order, and its length is that of what it goes through."""
    bar = made(Terminal(), Clock(), range(7))
    assert list(bar) == list(range(7))
    assert bar.n == bar.total == len(bar) == 7
    assert list(made(Terminal(), Clock(), iter("abc"))) == ["a", "b", "c"]
    assert list(made(io.StringIO(), Clock(), range(3), mode="off")) == [0, 1, 2]
    assert list(bar) == list(range(7))
    assert bar.n == 7


def test_the_last_line_says_it_all() -> None:
    """When it is done the bar stands full, with the last values, formatted as in the bar of a run, and the next text
    begins a line of its own."""
    stream, clock = Terminal(), Clock()
    with made(stream, clock, range(4), "epoch 1", columns=110) as bar:
        for _ in bar:
            clock.now += 0.5
            bar.set_postfix(
                d_loss=0.69314, g_loss=torch.tensor(1.2039), valid_accuracy=0.94123, lr=2e-4, k=12000
            )
    last = drawings(stream.getvalue())[-1]
    assert re.fullmatch(
        r"epoch 1 \|█+\| 100% 4/4 · d_loss=0\.6931 g_loss=1\.204 valid_accuracy=0\.9412 lr=2\.0e-04 k=12,000 · 00:02",
        last,
    )
    assert width(last) == 109
    assert stream.getvalue().endswith("\n")


def test_it_is_drawn_at_most_ten_times_a_second() -> None:
    """However often values are set, a bar is drawn at most ten times a second, and once at each end; nothing that is
    not drawn is made a text or read from its device."""
    stream, clock, loss = Terminal(), Clock(), Watched()
    for _ in (bar := made(stream, clock, range(1000))):
        clock.now += 0.01
        bar.set_description("training")
        bar.set_postfix(loss=loss)
    drawn = len(drawings(stream.getvalue()))
    assert 90 <= drawn <= 102  # ten seconds
    assert 90 <= loss.read <= drawn


def test_values_of_a_slow_loop_are_shown_at_once() -> None:
    """Where a step takes long, what is set is drawn when it is set, not when the step is over."""
    stream, clock = Terminal(), Clock()
    bar = made(stream, clock, range(3))
    for item in bar:
        clock.now += 60
        bar.set_description(f"part {item}")
        assert f"part {item} " in drawings(stream.getvalue())[-1]
        clock.now += 60
        bar.set_postfix(loss=float(item))
        assert f"loss={item}.000" in drawings(stream.getvalue())[-1]


def test_tensors_are_kept_as_they_are() -> None:
    """A tensor that is set is kept, graph and all, until another is, and let go when the bar is closed; one of several
    elements is shown by its shape."""
    stream, clock = Terminal(), Clock()
    weight = torch.ones(2, requires_grad=True)
    with made(stream, clock, total=2) as bar:
        bar.set_postfix(
            loss=(3 * weight).sum(), weight=weight, share=np.float32(0.25), note="x\x1by", done=True
        )
        bar.refresh()
        shown = drawings(stream.getvalue())[-1]
        assert r"· loss=6.000 weight=[2] share=0.2500 note=x\x1by done=True" in shown
    assert not bar._postfix


def test_moved_by_hand() -> None:
    """Without an iterable a bar is moved by `update`, with or without a context, and says so when it is gone through."""
    stream, clock = Terminal(), Clock()
    bar = made(stream, clock, total=10)
    bar.update(4)
    clock.now += 1
    bar.update()
    assert bar.n == 5
    assert re.search(r" 5/10 · 00:01 left · 5 it/s$", drawings(stream.getvalue())[-1])
    bar.close()
    bar.close()
    assert stream.getvalue().count("\n") == 1
    with pytest.raises(RequestError, match="nothing to go through"):
        next(iter(bar))


@pytest.mark.parametrize("total", [-1, 2.5, True])
def test_a_total_that_cannot_be(total: Any) -> None:
    """A total that is no number from 0 on is refused."""
    with pytest.raises(RequestError, match=f"bar: total is {total}"):
        lehr.bar(total=total)


def test_an_unknown_mode() -> None:
    """A mode that does not exist is refused with the nearest one."""
    with pytest.raises(RequestError, match=r"bar: mode is 'line'; did you mean \"lines\""):
        lehr.bar([], mode="line")  # type: ignore[arg-type]


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


@pytest.mark.parametrize(
    "source", [iter(range(3)), DataLoader(Stream(), batch_size=None)], ids=["iterator", "loader"]
)
def test_without_a_total(source: Any) -> None:
    """Where it is not known how many there will be, the bar counts; so it does when there are more than was said."""
    stream, clock = Terminal(), Clock()
    bar = made(stream, clock, source, "reading")
    assert bool(bar)
    with pytest.raises(TypeError, match="no length"):
        len(bar)
    for _ in bar:
        clock.now += 1
    assert drawings(stream.getvalue())[-1] == "reading · 3 · 00:03 · 1 it/s"
    more = Terminal()
    list(made(more, Clock(), iter(range(3)), total=2))
    assert drawings(more.getvalue())[-1] == "3"
    none = Terminal()
    list(made(none, Clock(), []))
    assert drawings(none.getvalue())[-1].endswith("0/0")


def test_in_a_file() -> None:
    """Where there is no terminal there is a line every 30 seconds and one at the end, without a bar or escape codes."""
    stream, clock = io.StringIO(), Clock()
    for _ in (bar := made(stream, clock, range(100), "epoch 1")):
        clock.now += 0.7
        bar.set_postfix(loss=0.5)
    assert stream.getvalue().splitlines() == [
        "epoch 1 · 42/100 · loss=0.5000 · 00:41 left · 1.4 it/s",
        "epoch 1 · 85/100 · loss=0.5000 · 00:10 left · 1.4 it/s",
        "epoch 1 · 100/100 · loss=0.5000 · 01:10 · 1.4 it/s",
    ]
    quiet = io.StringIO()
    list(made(quiet, Clock(), range(5), leave=False))
    assert quiet.getvalue() == ""


@pytest.mark.parametrize("columns", [12, 20, 40, 60])
def test_narrow_terminals(columns: int) -> None:
    """No line reaches the terminal's width; the count is kept longest."""
    stream, clock = Terminal(), Clock()
    for _ in (bar := made(stream, clock, range(20), "a description of some length", columns=columns)):
        clock.now += 1
        bar.set_postfix(d_loss=0.69, g_loss=1.2, note="z" * 99)
    for line in drawings(stream.getvalue()):
        assert width(line) < columns
        assert re.search(r"\b\d+/20\b", line)


@given(
    text=st.text(alphabet="ab é花{}\n%", max_size=60),
    name=st.text(alphabet="ab花{}_", min_size=1, max_size=40),
    value=st.one_of(st.floats(), st.integers(), st.text(alphabet="xy\x1b{}\r", max_size=60), st.none()),
    columns=st.integers(12, 120),
)
def test_any_text_in_any_width(text: str, name: str, value: Any, columns: int) -> None:
    """Whatever is described or set, nothing is wider than the terminal, and no escape code comes through."""
    stream, clock = Terminal(), Clock()
    with made(stream, clock, range(2), text, columns=columns) as bar:
        for _ in bar:
            clock.now += 1
            bar.set_postfix({name: value})
    assert "\x1b" not in stream.getvalue()
    assert all(width(line) < columns for line in drawings(stream.getvalue()))


def test_break_and_errors_leave_a_true_bar() -> None:
    """A loop that is left by `break`, an error or Ctrl-C closes its bar on a line of its own, as far as it had come,
    and the next bar takes its place."""
    for leave in (None, RuntimeError, KeyboardInterrupt):
        stream, clock = Terminal(), Clock()
        try:
            for item in made(stream, clock, range(10)):
                if item == 4:
                    if leave is None:
                        break
                    raise leave
        except (RuntimeError, KeyboardInterrupt):
            pass
        assert drawings(stream.getvalue())[-1].endswith(" 4/10")
        assert stream.getvalue().endswith("\n")
        assert not [bar for bar in tqdm._instances if bar.fp.__dict__.get("_wrapped", bar.fp) is stream]


def test_nested() -> None:
    """An inner bar is drawn below the outer one and goes when it is done; the outer one stays; in a file each leaves its
    line."""
    stream, clock = Terminal(), Clock()
    for epoch in made(stream, clock, range(2), "epochs"):
        for _ in (inner := made(stream, clock, range(3), f"epoch {epoch}")):
            clock.now += 1
            inner.set_postfix(loss=1.0)
    rows = screen(stream.getvalue())
    assert [row for row in rows if row] == [drawings(stream.getvalue())[-1]]
    assert re.search(r"^epochs .* 2/2 · 00:06", rows[0])
    assert any(re.search(r"^epoch 1 .* 3/3 · loss=1\.000", line) for line in drawings(stream.getvalue()))
    file = io.StringIO()
    for epoch in made(file, Clock(), range(2), "epochs"):
        list(made(file, Clock(), range(3), f"epoch {epoch}"))
    assert file.getvalue().splitlines() == ["epoch 0 · 3/3", "epoch 1 · 3/3", "epochs · 2/2"]


def test_beside_a_bar_of_tqdms() -> None:
    """Bars of lehr's and of tqdm's stand below each other, whichever is the outer one."""
    stream = Terminal()
    for _ in tqdm(range(2), file=stream, ncols=60, desc="theirs"):
        list(made(stream, Clock(), range(3), "ours"))
    rows = [row for row in screen(stream.getvalue()) if row]
    assert len(rows) == 1
    assert rows[0].startswith("theirs: 100%")


def screen(output: str) -> list[str]:
    """What stands on a terminal after `output`: carriage returns overwrite, and `ESC [ A` goes up a line."""
    lines, row, at = [""], 0, 0
    for piece in re.findall(r"\x1b\[A|\r|\n|[^\x1b\r\n]+", output):
        if piece == "\n":
            row, at = row + 1, 0
            lines += [""] * (row == len(lines))
        elif piece == "\r":
            at = 0
        elif piece == "\x1b[A":
            row -= 1
        else:
            line = lines[row].ljust(at)
            lines[row], at = line[:at] + piece + line[at + len(piece) :], at + len(piece)
    return [line.rstrip() for line in lines]


@pytest.mark.parametrize(("env", "draws"), [({"RANK": "1"}, False), ({"RANK": "0"}, True)])
def test_only_rank_0_draws(env: dict[str, str], draws: bool) -> None:
    """Of several processes one draws; the loop goes on in all."""
    stream = Terminal()
    assert list(lehr.bar(range(3), stream=stream, environ=env)) == [0, 1, 2]
    assert bool(stream.getvalue()) == draws


@pytest.mark.parametrize("at", [0, 1])
def test_a_terminal_that_goes_away(at: int) -> None:
    """When the terminal is closed the loop goes on, and nothing is drawn any more."""

    class Gone(Terminal):
        calls = 0

        def write(self, text: str) -> int:
            self.calls += 1
            if drawn >= at:
                raise BrokenPipeError(32, "Broken pipe")
            return super().write(text)

    drawn, stream, clock = 0, Gone(), Clock()
    for _ in (bar := made(stream, clock, range(50))):
        clock.now += 1
        drawn += 1
        bar.set_postfix(loss=1.0)
    assert drawn == 50
    assert stream.calls < 10


def test_without_standard_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program without a console has no standard error, and loops all the same."""
    monkeypatch.setattr(sys, "stderr", None)
    assert list(lehr.bar(range(3), environ={})) == [0, 1, 2]


def test_a_real_terminal() -> None:
    """On a pseudo-terminal the width is the terminal's own, and a line of ASCII where the encoding has no more."""
    primary, secondary = pty.openpty()
    fcntl.ioctl(secondary, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 50, 0, 0))
    pieces: list[bytes] = []

    def listen() -> None:
        while piece := os.read(primary, 4096):
            pieces.append(piece)
            if b"\x04" in piece:
                return

    listener = threading.Thread(target=listen)
    listener.start()
    with open(secondary, "w", encoding="ascii") as stream:  # noqa: PTH123 - a file descriptor
        list(lehr.bar(range(3), "epoch 1", stream=stream, environ={}, clock=Clock()))
        stream.write("\x04")
        stream.flush()
        listener.join(timeout=10)
    os.close(primary)
    last = drawings(b"".join(pieces).decode().rstrip("\x04"))[-1]
    assert re.fullmatch(r"epoch 1 \|#+\| 100% 3/3", last)
    assert width(last) == 49


def test_a_notebook_gets_widgets(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a notebook the bar is tqdm.auto's, without a width; the outermost stays, an inner one does not."""
    bars: list[Any] = []

    class Widget:
        def __init__(self, **settings: Any) -> None:
            self.settings, self.n, self.total = settings, settings["initial"], settings["total"]
            self.pos, self.leave, self.closed = -sum(not bar.closed for bar in bars), None, False
            bars.append(self)

        def refresh(self) -> None:
            assert "{bar}" in self.bar_format

        def close(self) -> None:
            self.closed = True

    shell = types.SimpleNamespace(config={"IPKernelApp": {}})
    widgets = types.ModuleType("ipywidgets")
    widgets.__spec__ = ModuleSpec("ipywidgets", None)
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "ipywidgets", widgets)
    monkeypatch.setitem(sys.modules, "tqdm.auto", types.SimpleNamespace(tqdm=Widget))  # type: ignore[arg-type]
    for _ in lehr.bar(range(2), environ={}):
        list(lehr.bar(range(3), environ={}))
    assert [(bar.n, bar.total, bar.leave, bar.closed) for bar in bars] == [
        (2, 2, True, True), (3, 3, False, True), (3, 3, False, True)
    ]  # fmt: skip
    assert {bar.settings["ncols"] for bar in bars} == {None}


def test_it_needs_no_torch() -> None:
    """A bar loads neither torch nor anything of notebooks."""
    code = (
        "import io, sys, lehr; list(lehr.bar([1], stream=io.StringIO(), mode='bar'))\n"
        "print(sorted({'tqdm.auto', 'tqdm.notebook', 'torch', 'numpy', 'IPython'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
